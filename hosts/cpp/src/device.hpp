// What the engine asks of a device. A device that isn't there is an Error(device); nothing falls back.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "feeds.hpp"
#include "manifest.hpp"

namespace mirror {

// The free sizes of a pass; `rows` is how many rows' logits are wanted, 0 for all.
struct PassShape {
  int width = 1;
  int rows = 0;

  bool operator<(const PassShape& other) const {
    return width != other.width ? width < other.width : rows < other.rows;
  }
};

// The key and value buffers of some layers on one device, [1, heads, capacity, head_dim] each.
class KVCache {
 public:
  virtual ~KVCache() = default;
};

// The exit layer's states of a pass, copied to the host: raw elements, [rows, hidden].
struct States {
  std::vector<std::byte> bytes;
  int rows = 0;
};

// What a pass gives besides logits; host memory of the pass, valid until it runs again.
struct PassOutputs {
  const std::int64_t* token_ids = nullptr;      // [rows]; null where the graph has none
  const std::int64_t* candidate_ids = nullptr;  // [rows, top]
  const float* candidate_logprobs = nullptr;    // [rows, top]
  int top = 0;
};

// A segment bound to the buffers of one pass: nothing is allocated or looked up any more.
class BoundPass {
 public:
  virtual ~BoundPass() = default;
  // Runs and writes the new KV rows to slots past_length.. of the cache; a device with a stream only launches that.
  // Throws Error(device).
  virtual void run(int past_length) = 0;
  // Where a device with a stream leaves its token_ids, for the feeds of a pass that follows; else nothing.
  virtual std::optional<LaunchedIds> launched_ids() const { return std::nullopt; }
  // Starts to bring these to host memory, to a place of their own: the pass may run again meanwhile.
  virtual std::shared_ptr<SentIds> send_ids() { return nullptr; }
  // The same with all outputs but logits; who runs other passes before reading calls it.
  virtual void send() {}
  // These wait for the last run. `row`: a wanted one.
  virtual const PassOutputs& outputs() = 0;
  virtual const float* logits(int row) = 0;  // [vocab]
  virtual float logit(int row, std::int64_t token) = 0;
  // The exit layer's state that it wrote, where the feeds want that in host memory; else null.
  virtual const std::byte* hidden() = 0;
};

// One graph, loaded on one device.
class Segment {
 public:
  virtual ~Segment() = default;
  // The widths that it takes, ascending; empty if any.
  virtual const std::vector<int>& widths() const = 0;
  // Whether its passes are only launched, in order.
  virtual bool launches() const { return false; }
  // Binds `feeds` (which must outlive the pass), `rows` wanted rows, and a cache of the same device.
  virtual std::unique_ptr<BoundPass> bind(PassFeeds& feeds, int rows, const std::shared_ptr<KVCache>& cache) = 0;
  // A zeroed cache for its layers.
  virtual std::shared_ptr<KVCache> make_cache() = 0;
};

// What is left of the memory that a device allocates from.
struct FreeMemory {
  std::string pool;                    // its name; devices that share one have the same
  std::optional<std::uint64_t> bytes;  // nothing where nobody says
};

// The host's.
FreeMemory host_memory_left();

class Device {
 public:
  virtual ~Device() = default;
  // As the user writes it: cpu, cuda:0, openvino:CPU.
  virtual const std::string& name() const = 0;
  // The cache form of the graphs that it takes.
  virtual Form form() const = 0;
  // Whether drafts run in the segments draft_int8 and draft_trunk_int8 here, where a bundle has them.
  virtual bool int8_drafts() const { return false; }
  // Whether those of them that have a program run by kernels of our own, which hold the weights of both segments once.
  virtual bool runs_programs() const { return false; }
  // What a draft that is loaded and run so runs with, amx, avx512 or avx2; null if none is.
  virtual const char* draft_kernels() const { return nullptr; }
  virtual FreeMemory free_memory() const { return host_memory_left(); }
  // Rows up to which a draft's pass takes little longer than for one: they are padded to share what is compiled.
  // 1 where any width runs as it is.
  virtual int padded_width() const { return 1; }
  // Passes that were recorded and are replayed, so far.
  virtual int recorded_passes() const { return 0; }
  // What it does without though it was asked for or is usual, a sentence each, some perhaps twice; known once segments
  // are loaded.
  virtual std::vector<std::string> notices() const { return {}; }
  // `capacity`: slots of its cache. `shapes`: the passes it will be asked for; a device that compiles
  // ahead compiles these, and those of `later` when they are first asked for. `threads`: CPU threads it may use.
  virtual std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts,
                                                int capacity, const std::vector<PassShape>& shapes,
                                                const std::vector<PassShape>& later, int threads) = 0;

  // Whether it computes on this machine's CPU cores.
  bool on_cpu() const { return name() == "cpu" || name().rfind("openvino:CPU", 0) == 0; }
};

// Whom a device is for. A draft that shares its target's GPU goes first there: its small kernels find their way
// between those of a target that fills it.
enum class Role { target, draft };

// What the device that a user's name stands for calls itself. Throws Error(device): no such name.
std::string device_name(const std::string& name);

// A device by the name that a user writes; `cuda:0:0.25` is a quarter of a GPU's multiprocessors, where the driver has
// parts. Throws Error(device): no such name, or not there.
std::shared_ptr<Device> open_device(const std::string& name, Role role = Role::target);

// Makes a plugin's execution providers known to ONNX Runtime, once per process and name.
// Throws Error(device) if the library can't be loaded.
void register_provider_library(const std::string& name, const std::filesystem::path& path);

}  // namespace mirror
