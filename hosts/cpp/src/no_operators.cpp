// In place of hosts/kernels/cuda, where it can't be compiled: no process can have the operators.
#include <onnxruntime_c_api.h>

#include "kernels/cuda/operators.h"

extern "C" {

const char* mirror_operators_missing() {
  return "mirror's kernels for GPUs were left out of this library; build it on Linux, with MIRROR_KERNELS on";
}

void* mirror_operators_register(void*, const void* api_base) {
  const OrtApi* api = static_cast<const OrtApiBase*>(api_base)->GetApi(ORT_API_VERSION);
  return api->CreateStatus(ORT_NOT_IMPLEMENTED, mirror_operators_missing());
}
}
