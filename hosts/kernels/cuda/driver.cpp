#include "driver.hpp"

#include <dlfcn.h>

#include <list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "embedded.hpp"

MIRROR_EMBEDDED(mirror_numbers_source, "numbers.cu");

namespace mirror_gpu {
namespace {

// The driver's numbers for what is asked of a device.
enum Attribute : int {
  kMultiprocessors = 16,
  kMajor = 75,
  kMinor = 76,
  kSharedOfBlock = 97,
};
constexpr int kMostDynamicShared = 8;  // attribute of a function

struct Libraries {
  std::string missing;

  int (*get_error)(int, const char**);
  int (*context_device)(int*);
  int (*device_attribute)(int*, int, int);
  int (*load)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
  int (*get_kernel)(void**, void*, const char*);
  int (*set_attribute)(int, int, void*, int);
  int (*allocate)(Address*, std::size_t);
  int (*clear)(Address, unsigned char, std::size_t, Stream);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);

  int (*create_program)(void**, const char*, const char*, int, const char* const*, const char* const*);
  int (*compile_program)(void*, int, const char* const*);
  int (*destroy_program)(void**);
  int (*log_size)(void*, std::size_t*);
  int (*get_log)(void*, char*);
  int (*binary_size)(void*, std::size_t*);
  int (*get_binary)(void*, char*);
  int (*ptx_size)(void*, std::size_t*);
  int (*get_ptx)(void*, char*);

  template <typename Function>
  void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && missing.empty())
      missing = std::string("the library in this process has no ") + name + "; update the NVIDIA driver and CUDA";
  }

  Libraries() {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver == nullptr) {
      missing = "there is no NVIDIA driver (libcuda.so.1); install it, or let this container see the GPU";
      return;
    }
    void* compiler = nullptr;
    for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"})
      if (compiler == nullptr) compiler = dlopen(name, RTLD_NOW);
    if (compiler == nullptr) {
      missing = "CUDA's run-time compiler (libnvrtc) isn't there; install the package nvidia-cuda-nvrtc of your CUDA";
      return;
    }
    find(driver, "cuGetErrorString", get_error);
    find(driver, "cuCtxGetDevice", context_device);
    find(driver, "cuDeviceGetAttribute", device_attribute);
    find(driver, "cuLibraryLoadData", load);
    find(driver, "cuLibraryGetKernel", get_kernel);
    find(driver, "cuKernelSetAttribute", set_attribute);
    find(driver, "cuMemAlloc_v2", allocate);
    find(driver, "cuMemsetD8Async", clear);
    find(driver, "cuLaunchKernel", launch);
    find(compiler, "nvrtcCreateProgram", create_program);
    find(compiler, "nvrtcCompileProgram", compile_program);
    find(compiler, "nvrtcDestroyProgram", destroy_program);
    find(compiler, "nvrtcGetProgramLogSize", log_size);
    find(compiler, "nvrtcGetProgramLog", get_log);
    find(compiler, "nvrtcGetCUBINSize", binary_size);
    find(compiler, "nvrtcGetCUBIN", get_binary);
    find(compiler, "nvrtcGetPTXSize", ptx_size);
    find(compiler, "nvrtcGetPTX", get_ptx);
  }
};

// What was missing is looked for again: a library may have been loaded since. What was found before stays: others may
// still read it.
const Libraries& libraries() {
  static std::mutex mutex;
  static std::list<Libraries>& found = *new std::list<Libraries>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (found.empty() || !found.back().missing.empty()) found.emplace_back();
  return found.back();
}

void check(int result, const char* what) {
  if (result == 0) return;
  const char* said = nullptr;
  libraries().get_error(result, &said);
  throw std::runtime_error(std::string(what) + " said: " + (said != nullptr ? said : std::to_string(result)));
}

int attribute(int index, Attribute which) {
  int value = 0;
  check(libraries().device_attribute(&value, which, index), "cuDeviceGetAttribute");
  return value;
}

// A program compiled for one architecture: machine code for `sm_..`, PTX for `compute_..`. Empty where it can't be,
// with the compiler's words in `log`.
std::string compiled(const char* source, std::vector<std::string> options, const std::string& architecture,
                     std::string& log) {
  const Libraries& library = libraries();
  options.push_back("--gpu-architecture=" + architecture);
  options.push_back("--std=c++17");
  std::vector<const char*> words;
  for (const std::string& option : options) words.push_back(option.c_str());
  void* program = nullptr;
  if (library.create_program(&program, source, "mirror.cu", 0, nullptr, nullptr) != 0) return {};
  std::string result;
  std::size_t size = 0;
  if (library.compile_program(program, static_cast<int>(words.size()), words.data()) == 0) {
    const bool machine_code = architecture.rfind("sm_", 0) == 0;
    if ((machine_code ? library.binary_size : library.ptx_size)(program, &size) == 0) {
      result.resize(size);
      (machine_code ? library.get_binary : library.get_ptx)(program, result.data());
    }
  } else if (library.log_size(program, &size) == 0) {
    log.resize(size);
    library.get_log(program, log.data());
  }
  library.destroy_program(&program);
  return result;
}

}  // namespace

const std::string& driver_missing() { return libraries().missing; }

Gpu current_gpu() {
  Gpu gpu;
  check(libraries().context_device(&gpu.index), "cuCtxGetDevice");
  gpu.major = attribute(gpu.index, kMajor);
  gpu.minor = attribute(gpu.index, kMinor);
  gpu.multiprocessors = attribute(gpu.index, kMultiprocessors);
  gpu.shared_of_block = attribute(gpu.index, kSharedOfBlock);
  return gpu;
}

Kernel compile(const Gpu& gpu, const char* source, const std::vector<std::string>& options, const char* name,
               int shared_bytes) {
  const std::string text = std::string(mirror_numbers_source) + source;
  std::string log;
  std::string code = compiled(text.c_str(), options, "sm_" + std::to_string(gpu.major * 10 + gpu.minor), log);
  // A GPU that is newer than the compiler: its driver goes on from PTX.
  if (code.empty()) code = compiled(text.c_str(), options, "compute_80", log);
  if (code.empty())
    throw std::runtime_error("NVRTC can't compile mirror's kernels, MIRROR_KERNELS=off does without: " + log);
  void *loaded = nullptr, *kernel = nullptr;
  check(libraries().load(&loaded, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
  check(libraries().get_kernel(&kernel, loaded, name), "cuLibraryGetKernel");
  check(libraries().set_attribute(kMostDynamicShared, shared_bytes, kernel, gpu.index), "cuKernelSetAttribute");
  return kernel;
}

Kernel compiled_once(const Gpu& gpu, const char* source, const char* name) {
  static std::mutex mutex;
  static auto& kernels = *new std::map<std::pair<int, std::string>, Kernel>;  // sessions end after static objects do
  const std::lock_guard<std::mutex> lock(mutex);
  Kernel& found = kernels[{gpu.index, name}];
  if (found == nullptr) found = compile(gpu, source, {}, name, 0);
  return found;
}

Address allocate(std::size_t bytes) {
  Address address = 0;
  check(libraries().allocate(&address, bytes), "cuMemAlloc");
  return address;
}

void clear(Address address, std::size_t bytes, Stream stream) {
  check(libraries().clear(address, 0, bytes, stream), "cuMemsetD8Async");
}

void launch(Kernel kernel, const std::array<int, 3>& grid, int threads, int shared_bytes, Stream stream,
            void** arguments) {
  const auto count = [](int value) { return static_cast<unsigned>(value); };
  check(libraries().launch(kernel, count(grid[0]), count(grid[1]), count(grid[2]), count(threads), 1, 1,
                           count(shared_bytes), stream, arguments, nullptr),
        "cuLaunchKernel");
}

}  // namespace mirror_gpu
