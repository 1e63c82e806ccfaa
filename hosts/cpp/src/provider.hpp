// An execution provider, its buffers, and the two kinds of passes over them: those that wait for their end
// (host_pass.cpp) and those that are launched on a stream (stream_pass.cpp). Knows ONNX Runtime's memory and bindings.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.hpp"
#include "device_stream.hpp"

namespace mirror {

// One execution provider, as sessions need to know it.
struct Provider {
  std::string name;            // as ONNX Runtime calls it
  std::string device = "cpu";  // as users call it
  Form form = Form::inplace;
  // Whether it has kernels for products that round what they multiply to 8 bits.
  bool int8_drafts = false;
  std::string memory;  // ONNX Runtime's name of its memory; empty for host memory
  int index = 0;
  // Whether a session is compiled for each pass shape; else one session takes them all.
  bool compiles = false;
  // Rows up to which a draft's pass takes little longer than for one: they are padded to share a session.
  int padded_width = 1;
  // Whether it takes the widths that it was loaded for and no others.
  bool fixed_widths = false;
  // Whether its sessions read and write buffers that are bound once, as ONNX Runtime's own providers do.
  // Else they are given their inputs anew at every pass, and what they return is copied.
  bool binds = true;
  // Whether its kernels choose themselves by total_sequence_length, in host memory. Passes then get few numbers:
  // another one could mean another kernel, and its plan.
  bool sized_total = false;
  // What its passes are launched on and recorded by; null where a run waits for its end.
  std::shared_ptr<DeviceStream> stream;
  // What is left of its memory; empty for host memory.
  std::function<FreeMemory()> free_memory;
  // What it does without though it was asked for or is usual, a sentence each; null where nothing can be missing.
  std::shared_ptr<std::vector<std::string>> notices;
};

// Whether a text begins with another.
bool begins(const std::string& text, const std::string& start);

// Names of cache inputs and outputs begin so.
extern const std::string past_prefix, present_prefix;
// Names past_key_values.L.key of present.L.key.
std::string past_name(const std::string& present);

// What the symbols in a graph's shapes stand for.
struct Sizes {
  int width, rows;
  std::int32_t capacity;
};
std::vector<std::int64_t> concrete(const TensorSpec& spec, const Sizes& sizes);
std::size_t byte_count(const std::vector<std::int64_t>& shape, DType dtype);

using SharedSession = std::shared_ptr<Ort::Session>;

// A fixed tensor. `host` is its memory where that is the host's to read, else null.
struct Buffer {
  Ort::Value value{nullptr};
  std::shared_ptr<void> owner;
  std::byte* host = nullptr;
  std::vector<std::int64_t> shape;
  DType dtype = DType::float32;
};

// A tensor over memory that is there: the host's, or a provider's own.
Ort::Value host_view(void* data, const std::vector<std::int64_t>& shape, DType dtype);
Ort::Value device_view(const Provider& provider, void* data, const std::vector<std::int64_t>& shape, DType dtype);

// Memory of a provider; the session whose allocator made it lives as long as it does.
std::shared_ptr<void> device_bytes(const SharedSession& session, const Provider& provider, std::size_t bytes);

// Zeroed tensors: in host memory, and where a provider's passes keep theirs.
Buffer host_buffer(const std::vector<std::int64_t>& shape, DType dtype);
Buffer make_buffer(const SharedSession& session, const Provider& provider, const std::vector<std::int64_t>& shape,
                   DType dtype);

struct OrtCache final : KVCache {
  int capacity = 0;
  std::map<std::string, Buffer> buffers;  // by the name of the past

  // Throws Error(bundle) if there is none of that name.
  Buffer& at(const std::string& name, const std::string& segment);
};

// The exit layer's states of a pass, [1, width, hidden], where their writer keeps them. Readers on the same stream
// bind them as they are; others read them in host memory.
struct Hidden {
  Buffer buffer;
  std::shared_ptr<DeviceStream> stream;  // the writer's, null if it has none
  std::shared_ptr<void> copy;            // in host memory, where the feeds want that and the writer's is another
  std::unique_ptr<Mark> copied;

  std::byte* host() const { return copy ? static_cast<std::byte*>(copy.get()) : buffer.host; }
  // Launches the copy.
  void send() const;
  void wait() const {
    if (copied) copied->wait();
  }
};

// What a pass is bound over. The feeds must outlive it.
struct PassParts {
  const SegmentFacts& facts;
  const Graph& graph;
  const Provider& provider;
  SharedSession session;
  PassFeeds& feeds;
  Sizes sizes;
  std::shared_ptr<OrtCache> cache;  // null for a segment without one

  // The buffer of a cache input. Throws Error(bundle).
  Buffer& past(const std::string& name) const;
  // The states that the feeds hold, if they are those that the graph takes. Throws Error(bundle).
  std::shared_ptr<Hidden> hidden(const TensorSpec& spec) const;
};

// Throws Error(device) if a pass of some rows would not fit.
void check_slots(const std::string& segment, const OrtCache* cache, int past_length, int width);

// Where the host's own inputs of a catalogue name are; sized by the pass where it is `features`.
void* input_data(PassFeeds& feeds, const std::string& name);

// Notes where a pass leaves an output in host memory, if it is one that is read whole.
void note(PassOutputs& outputs, const std::string& name, const void* host, const std::vector<std::int64_t>& shape);

std::unique_ptr<BoundPass> bind_host_pass(const PassParts& parts);
std::unique_ptr<BoundPass> bind_stream_pass(const PassParts& parts);

}  // namespace mirror
