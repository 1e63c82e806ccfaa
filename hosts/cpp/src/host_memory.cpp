#include "host_memory.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _WIN32
#include <malloc.h>
#endif

namespace mirror {
namespace {

constexpr std::size_t alignment = 64;
constexpr std::size_t large_page = std::size_t{2} << 20;

std::size_t rounded(std::size_t bytes) {
  return (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
}

#ifdef _WIN32
void* take(std::size_t bytes) { return _aligned_malloc(rounded(bytes), alignment); }
void give(void* memory) { _aligned_free(memory); }
#else
void* take(std::size_t bytes) { return std::aligned_alloc(alignment, rounded(bytes)); }
void give(void* memory) { std::free(memory); }
#endif

// Decoding reads all weights once per token, so the page tables count: large pages took 2 to 3% off a token
// of 135M float32 weights. They are asked for, not required: a system without them gives small ones.
void* take_large(std::size_t bytes) {
#ifdef __linux__
  if (bytes >= large_page) {
    void* memory = nullptr;
    if (posix_memalign(&memory, large_page, bytes) != 0) return nullptr;
    // Whole pages only: the rest of the last one would be memory for nothing.
    madvise(memory, bytes / large_page * large_page, MADV_HUGEPAGE);
    return memory;
  }
#endif
  return take(bytes);
}

#ifdef __linux__
// What ONNX Runtime asks for host memory: weights by Reserve, a pass's temporaries by Alloc.
class HostAllocator final : public OrtAllocator {
 public:
  HostAllocator() : OrtAllocator{}, info_(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)) {
    version = ORT_API_VERSION;
    OrtAllocator::Alloc = [](OrtAllocator*, std::size_t bytes) { return bytes == 0 ? nullptr : take(bytes); };
    OrtAllocator::Reserve = [](OrtAllocator*, std::size_t bytes) { return bytes == 0 ? nullptr : take_large(bytes); };
    OrtAllocator::Free = [](OrtAllocator*, void* memory) { give(memory); };
    OrtAllocator::Info = [](const OrtAllocator* self) -> const OrtMemoryInfo* {
      return static_cast<const HostAllocator*>(self)->info_;
    };
  }

 private:
  Ort::MemoryInfo info_;
};
#endif

}  // namespace

std::shared_ptr<void> zeroed_memory(std::size_t bytes) {
  std::shared_ptr<void> memory(take_large(bytes), give);
  if (!memory) throw std::bad_alloc();
  std::memset(memory.get(), 0, bytes);
  return memory;
}

void register_host_memory([[maybe_unused]] Ort::Env& environment) {
#ifdef __linux__
  static HostAllocator allocator;
  // Refused where the process has registered one: then sessions share that one.
  Ort::Status(Ort::GetApi().RegisterAllocator(environment, &allocator));
#endif
}

void share_host_memory([[maybe_unused]] Ort::SessionOptions& options) {
#ifdef __linux__
  options.AddConfigEntry("session.use_env_allocators", "1");
#endif
}

}  // namespace mirror
