#include "cuda_driver.hpp"

#include <cmath>

#include "library.hpp"

namespace mirror {
namespace {

// Numbers of the driver's interface.
constexpr int multiprocessor_resource = 1;   // a kind of resource
constexpr unsigned with_default_stream = 1;  // of a green context: the driver makes no others
constexpr unsigned non_blocking_stream = 1;  // it doesn't wait for the default stream's work

// CUdevResource: its kind, then, past the driver's own bytes, how many multiprocessors.
struct Resource {
  int kind;
  unsigned char own[92];
  unsigned multiprocessors;
  unsigned char more[108];  // more than any version has
};

// A function of the driver, called by its name; says whether the driver has it and it did what it was told.
template <typename... Arguments>
class Call {
 public:
  Call(const CudaDriver::Lookup& lookup, const char* name)
      : function_(reinterpret_cast<int (*)(Arguments...)>(lookup(name))) {}
  bool operator()(Arguments... arguments) const { return function_ != nullptr && function_(arguments...) == 0; }

 private:
  int (*function_)(Arguments...);
};

}  // namespace

CudaDriver::CudaDriver(Lookup lookup) : lookup_(std::move(lookup)) {
  const bool told = Call<unsigned>(lookup_, "cuInit")(0) && Call<int*>(lookup_, "cuDeviceGetCount")(&gpus_);
  if (!told) gpus_ = 0;
}

std::optional<std::uint64_t> CudaDriver::free_bytes(int index) const {
  int device = 0;
  void* context = nullptr;
  std::size_t free = 0, total = 0;
  // The context that ONNX Runtime uses too. It is kept: letting it go would tear down what sessions are
  // about to make again.
  if (gpus_ == 0 || !Call<int*, int>(lookup_, "cuDeviceGet")(&device, index) ||
      !Call<void**, int>(lookup_, "cuDevicePrimaryCtxRetain")(&context, device) ||
      !Call<void*>(lookup_, "cuCtxPushCurrent_v2")(context))
    return std::nullopt;
  const bool told = Call<std::size_t*, std::size_t*>(lookup_, "cuMemGetInfo_v2")(&free, &total);
  Call<void**>(lookup_, "cuCtxPopCurrent_v2")(&context);
  if (!told) return std::nullopt;
  return free;
}

void* CudaDriver::part_stream(int index, double share, int priority) {
  const std::lock_guard<std::mutex> lock(mutex_);
  void*& part = parts_[{index, share}];
  if (part == nullptr) part = make_part(index, share);
  void* stream = nullptr;
  const Call<void**, void*, unsigned, int> create(lookup_, "cuGreenCtxStreamCreate");
  return part != nullptr && create(&stream, part, non_blocking_stream, priority) ? stream : nullptr;
}

void* CudaDriver::make_part(int index, double share) const {
  const Call<Resource*, unsigned*, const Resource*, Resource*, unsigned, unsigned> split(lookup_,
                                                                                         "cuDevSmResourceSplitByCount");
  const Call<void**, Resource*, unsigned> describe(lookup_, "cuDevResourceGenerateDesc");
  const Call<void**, void*, int, unsigned> create(lookup_, "cuGreenCtxCreate");
  int device = 0;
  Resource whole{}, part{}, rest{};
  unsigned groups = 1;
  void *description = nullptr, *context = nullptr;
  const bool made =
      Call<int*, int>(lookup_, "cuDeviceGet")(&device, index) &&
      Call<int, Resource*, int>(lookup_, "cuDeviceGetDevResource")(device, &whole, multiprocessor_resource) &&
      split(&part, &groups, &whole, &rest, 0, static_cast<unsigned>(std::lrint(share * whole.multiprocessors))) &&
      describe(&description, &part, 1) && create(&context, description, device, with_default_stream);
  return made ? context : nullptr;
}

CudaDriver& cuda_driver() {
#ifdef _WIN32
  static void* const library = find_library({"nvcuda.dll"});
#else
  static void* const library = find_library({"libcuda.so.1"});
#endif
  static CudaDriver found(
      [](const char* name) -> void* { return library == nullptr ? nullptr : library_function(library, name); });
  return found;
}

}  // namespace mirror
