// Memory that all of our kernels on a stream share, since they follow each other: what parts of a result come to, and
// who was last. It stays for good: recorded passes know its address.
#pragma once

#include <cstddef>

#include "driver.hpp"

namespace mirror_gpu {

struct Workspace {
  std::size_t sums = 0, tickets = 0;  // float32 and int32 numbers; tickets are zero before and after a kernel
  Address sums_at = 0, tickets_at = 0;
};

// Notes what a kernel will need.
void plan_workspace(std::size_t sums, std::size_t tickets);

// For all that was planned so far.
Workspace workspace(int gpu, Stream stream);

}  // namespace mirror_gpu
