#include "gpu_operators.hpp"

#include <algorithm>

#include "error.hpp"
#include "kernel_segment.hpp"
#include "kernels/cuda/operators.h"

namespace mirror {

bool takes_operators(const SegmentFacts& facts) {
  const bool halves =
      std::all_of(facts.kv.begin(), facts.kv.end(), [](const LayerKV& layer) { return layer.dtype == DType::float16; });
  return halves && wanted_kernels() != "off" && mirror_operators_missing() == nullptr;
}

void add_operators(Ort::SessionOptions& options) {
  OrtSessionOptions* const given = options;
  const Ort::Status said(static_cast<OrtStatus*>(mirror_operators_register(given, OrtGetApiBase())));
  if (!said.IsOK())
    throw Error(ErrorKind::device, "this library's kernels for GPUs can't be had: " + said.GetErrorMessage() +
                                       "; set MIRROR_KERNELS to off in the environment");
}

}  // namespace mirror
