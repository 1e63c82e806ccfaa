// NVIDIA GPUs: what the driver lists, and streams of the CUDA runtime that ONNX Runtime has loaded. Both libraries
// are looked for when first needed; a host without a GPU needs neither.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "device_stream.hpp"

namespace mirror {

// How many GPUs the driver lists; 0 without a driver.
int cuda_gpus();

// What a GPU's memory has left, nothing where the driver doesn't say.
std::optional<std::uint64_t> cuda_free_bytes(int index);

// A stream of one GPU; the kernels of an urgent one go first where they compete for it.
// Throws Error(device): no CUDA runtime, or it failed.
std::shared_ptr<DeviceStream> open_cuda_stream(int index, bool urgent);

}  // namespace mirror
