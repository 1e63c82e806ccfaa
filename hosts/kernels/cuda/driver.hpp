// The CUDA driver and NVRTC, found when they are needed: nothing here is linked against either.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

namespace mirror_gpu {

using Stream = void*;
using Kernel = void*;
using Address = unsigned long long;  // in a GPU's memory

// What a GPU can do, of the calling thread's context.
struct Gpu {
  int index = -1;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int shared_of_block = 0;  // bytes, the most that a thread block may ask for
};

// Why there is no driver or no NVRTC; empty where there are both.
const std::string& driver_missing();

// Throw std::runtime_error, saying what the driver or the compiler said. A kernel's source lies behind numbers.cu.
Gpu current_gpu();
Kernel compile(const Gpu& gpu, const char* source, const std::vector<std::string>& options, const char* name,
               int shared_bytes);
// The same for kernels that are one for all sizes, compiled once for each GPU.
Kernel compiled_once(const Gpu& gpu, const char* source, const char* name);
Address allocate(std::size_t bytes);
void clear(Address address, std::size_t bytes, Stream stream);
void launch(Kernel kernel, const std::array<int, 3>& grid, int threads, int shared_bytes, Stream stream,
            void** arguments);

// How many of some size it takes for all.
inline int divided_up(int count, int by) { return (count + by - 1) / by; }

// A number that a kernel is compiled for.
inline std::string define(const char* name, int value) {
  return std::string("-D") + name + "=" + std::to_string(value);
}

}  // namespace mirror_gpu
