// Streams of the CUDA runtime that ONNX Runtime has loaded. It is looked for when first needed; a host without a GPU
// has none.
#pragma once

#include <memory>

#include "device_stream.hpp"

namespace mirror {

// A stream of one GPU; the kernels of an urgent one go first where they compete for it. They run on a share of the
// GPU's multiprocessors, or on all where the driver gives no part (before 550).
// Throws Error(device): no CUDA runtime, or it failed.
std::shared_ptr<DeviceStream> open_cuda_stream(int index, bool urgent, double share);

}  // namespace mirror
