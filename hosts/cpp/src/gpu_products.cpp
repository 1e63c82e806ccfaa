#include "gpu_products.hpp"

#include <algorithm>

#include "error.hpp"
#include "kernel_segment.hpp"
#include "kernels/cuda/products.h"

namespace mirror {

bool takes_products(const SegmentFacts& facts) {
  const bool halves =
      std::all_of(facts.kv.begin(), facts.kv.end(), [](const LayerKV& layer) { return layer.dtype == DType::float16; });
  return halves && wanted_kernels() != "off" && mirror_products_missing() == nullptr;
}

void add_products(Ort::SessionOptions& options) {
  OrtSessionOptions* const given = options;
  const Ort::Status said(static_cast<OrtStatus*>(mirror_products_register(given, OrtGetApiBase())));
  if (!said.IsOK())
    throw Error(ErrorKind::device, "this library's kernels for GPUs can't be had: " + said.GetErrorMessage() +
                                       "; set MIRROR_KERNELS to off in the environment");
}

}  // namespace mirror
