// Products with int4 and int8 weights on NVIDIA GPUs by kernels of our own (hosts/kernels/cuda): an operator that a
// session's options bring, which ONNX Runtime takes in place of its MatMulNBits.
#pragma once

#include <onnxruntime_cxx_api.h>

#include "manifest.hpp"

namespace mirror {

// Whether a segment's sessions on a GPU get it: one in half precision, which is what it multiplies, where this process
// can have it, unless MIRROR_KERNELS in the environment says off. NVRTC is looked for by name, so whoever asks has
// loaded the provider's libraries.
bool takes_products(const SegmentFacts& facts);

// Adds it to a session's options. Throws Error(device) if it can't be had.
void add_products(Ort::SessionOptions& options);

}  // namespace mirror
