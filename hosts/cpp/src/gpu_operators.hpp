// Operators for NVIDIA GPUs by kernels of our own (hosts/kernels/cuda), products with int4 and int8 weights and attention,
// that a session's options bring and ONNX Runtime takes in place of its own.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <optional>
#include <string>

#include "manifest.hpp"

namespace mirror {

// Whether a segment's sessions on a GPU get them: one in half precision, which is what they compute in, where this process
// can have them, unless MIRROR_KERNELS in the environment says off. NVRTC is looked for by name, so whoever asks has
// loaded the provider's libraries.
bool takes_operators(const SegmentFacts& facts);

// Why the sessions of a segment that would get them don't, though nobody said off; nothing where there is no such reason.
std::optional<std::string> operators_lack(const SegmentFacts& facts);

// Adds them to a session's options. Throws Error(device) if they can't be had.
void add_operators(Ort::SessionOptions& options);

}  // namespace mirror
