// Host memory for tensors: weights that a session keeps, caches, a pass's inputs and outputs.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstddef>
#include <memory>

namespace mirror {

// Zeroed memory, aligned to 64 bytes; in large pages where it is large and the system has them.
// Throws std::bad_alloc.
std::shared_ptr<void> zeroed_memory(std::size_t bytes);

// Lets sessions that ask for it (share_host_memory) keep their weights in large pages. Does nothing on
// systems other than Linux, nor in a process that has given this environment an allocator of its own.
void register_host_memory(Ort::Env& environment);

// Makes a session take its host memory from what the environment has registered.
void share_host_memory(Ort::SessionOptions& options);

}  // namespace mirror
