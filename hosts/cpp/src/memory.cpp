#include "memory.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string_view>

#include "error.hpp"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#endif

namespace mirror {
namespace {

// Field numbers and kinds of ONNX's protocol buffers.
enum Field { model_graph = 7, graph_initializer = 5, tensor_raw = 9, tensor_external = 13, entry_key = 1, entry_value = 2 };
enum Kind { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

// The fields of one message, in turn.
class Message {
 public:
  explicit Message(std::string_view data) : data_(data) {}

  // The next length-delimited field of this number; nothing at the end.
  std::optional<std::string_view> next(int wanted) {
    while (place_ < data_.size()) {
      const std::uint64_t tag = number();
      if ((tag & 7) == varint) {
        number();
        continue;
      }
      const std::string_view content = take((tag & 7) == bytes ? number() : size_of_fixed(tag & 7));
      if ((tag & 7) == bytes && static_cast<int>(tag >> 3) == wanted) return content;
    }
    return std::nullopt;
  }

 private:
  // Seven bits to a byte.
  std::uint64_t number() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    throw std::out_of_range("a number without end");
  }

  static std::uint64_t size_of_fixed(std::uint64_t kind) {
    if (kind == fixed64 || kind == fixed32) return kind == fixed64 ? 8 : 4;
    throw std::out_of_range("a field of an unknown kind");
  }

  std::string_view take(std::uint64_t count) {
    if (count > data_.size() - place_) throw std::out_of_range("a field past the end");
    const std::string_view found = data_.substr(place_, static_cast<std::size_t>(count));
    place_ += static_cast<std::size_t>(count);
    return found;
  }

  std::string_view data_;
  std::size_t place_ = 0;
};

// One initializer: inside the file, or where its `length` entry says how many.
std::uint64_t tensor_bytes(std::string_view tensor) {
  std::uint64_t count = 0;
  Message fields(tensor);
  while (const auto raw = fields.next(tensor_raw)) count += raw->size();
  Message entries(tensor);
  while (const auto entry = entries.next(tensor_external))
    if (Message(*entry).next(entry_key) == std::string_view("length"))
      count += std::stoull(std::string(Message(*entry).next(entry_value).value_or("0")));
  return count;
}

std::string gib(std::uint64_t count) {
  std::array<char, 40> text{};
  std::snprintf(text.data(), text.size(), "%.2f GiB", static_cast<double>(count) / 1073741824.0);
  return text.data();
}

std::string sentence(const SegmentMemory& segment) {
  const std::string cache = segment.cache_bytes > 0 ? " + " + gib(segment.cache_bytes) + " of cache" : "";
  return segment.name + " " + gib(segment.weight_bytes) + cache;
}

#ifdef __linux__
std::optional<std::string> first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return line;
}

// What Linux counts as available: free, and caches that it can drop.
std::optional<std::uint64_t> meminfo_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  std::uint64_t count = 0;
  while (file >> name >> count) {
    if (name == "MemAvailable:") return count * 1024;
    std::getline(file, unit);
  }
  return std::nullopt;
}

// What this container's limit leaves; nothing without a limit.
std::optional<std::uint64_t> cgroup_bytes() {
  const auto limit = first_line("/sys/fs/cgroup/memory.max"), current = first_line("/sys/fs/cgroup/memory.current");
  std::ifstream statistics("/sys/fs/cgroup/memory.stat");
  if (!limit || !current || !statistics || *limit == "max") return std::nullopt;
  std::uint64_t used = std::stoull(*current), count = 0;
  for (std::string name; statistics >> name >> count;)
    if (name == "inactive_file") used -= std::min(used, count);  // files can be dropped
  return std::stoull(*limit) - std::min<std::uint64_t>(used, std::stoull(*limit));
}
#endif

}  // namespace

std::uint64_t weight_bytes(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string data{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  std::uint64_t count = 0;
  try {
    Message model(data);
    while (const auto graph = model.next(model_graph)) {
      Message tensors(*graph);
      while (const auto tensor = tensors.next(graph_initializer)) count += tensor_bytes(*tensor);
    }
  } catch (const std::exception& error) {
    throw Error(ErrorKind::bundle, path.filename().string() + " is not a graph (" + error.what() +
                                       "): it was truncated or edited; export the bundle again");
  }
  return count;
}

std::uint64_t slot_bytes(const std::vector<LayerKV>& layers) {
  std::uint64_t count = 0;
  for (const LayerKV& layer : layers)
    count += 2 * static_cast<std::uint64_t>(layer.heads) * static_cast<std::uint64_t>(layer.head_dim) *
             size_of(layer.dtype);
  return count;
}

SegmentMemory segment_memory(const std::filesystem::path& folder, const SegmentFacts& facts, Form form, int capacity) {
  const auto graph = facts.graphs.find(form);
  const auto slots = static_cast<std::uint64_t>(capacity);
  return {facts.name,
          graph == facts.graphs.end() ? 0 : weight_bytes(folder / std::filesystem::u8path(graph->second.file)),
          slots * slot_bytes(facts.kv)};
}

void check_room(const std::vector<MemoryNeed>& needs) {
  std::map<std::string, std::vector<SegmentMemory>> pools;
  for (const MemoryNeed& need : needs) {
    auto& pool = pools[need.free.pool];
    pool.insert(pool.end(), need.segments.begin(), need.segments.end());
  }
  for (const MemoryNeed& need : needs) {
    std::uint64_t total = 0;
    std::string listed;
    for (const SegmentMemory& segment : pools[need.free.pool]) {
      total += segment.bytes();
      listed += (listed.empty() ? "" : ", ") + sentence(segment);
    }
    if (need.free.bytes && total > *need.free.bytes)
      throw Error(ErrorKind::device, need.free.pool + " has " + gib(*need.free.bytes) +
                                         " free, these segments need at least " + gib(total) + ": " + listed +
                                         "; ask for a smaller max_length, place segments on other devices, or export "
                                         "with a smaller --precision");
  }
}

std::optional<std::uint64_t> host_free_bytes() {
#if defined(_WIN32)
  MEMORYSTATUSEX status{};
  status.dwLength = sizeof status;
  if (GlobalMemoryStatusEx(&status) == 0) return std::nullopt;
  return status.ullAvailPhys;
#elif defined(__linux__)
  const auto machine = meminfo_bytes(), container = cgroup_bytes();
  if (machine && container) return std::min(*machine, *container);
  return machine ? machine : container;
#else
  return std::nullopt;
#endif
}

FreeMemory host_memory_left() { return {"host memory", host_free_bytes()}; }

}  // namespace mirror
