#include "gpu_operators.hpp"

#include <algorithm>

#include "error.hpp"
#include "kernel_segment.hpp"
#include "kernels/cuda/operators.h"

namespace mirror {

namespace {

bool wants_operators(const SegmentFacts& facts) {
  const bool halves =
      std::all_of(facts.kv.begin(), facts.kv.end(), [](const LayerKV& layer) { return layer.dtype == DType::float16; });
  return halves && wanted_kernels() != "off";
}

}  // namespace

bool takes_operators(const SegmentFacts& facts) {
  return wants_operators(facts) && mirror_operators_missing() == nullptr;
}

std::optional<std::string> operators_lack(const SegmentFacts& facts) {
  // A segment without layers is in no precision of its own.
  if (facts.kv.empty() || !wants_operators(facts)) return std::nullopt;
  const char* missing = mirror_operators_missing();
  return missing == nullptr ? std::nullopt : std::optional<std::string>(missing);
}

void add_operators(Ort::SessionOptions& options) {
  OrtSessionOptions* const given = options;
  const Ort::Status said(static_cast<OrtStatus*>(mirror_operators_register(given, OrtGetApiBase())));
  if (!said.IsOK())
    throw Error(ErrorKind::device, "this library's kernels for GPUs can't be had: " + said.GetErrorMessage() +
                                       "; set MIRROR_KERNELS to off in the environment");
}

}  // namespace mirror
