// The kernels for GPUs, as far as a machine without one can tell: `mirror_gpu_operators`, and with stand-ins for the
// driver and NVRTC, `mirror_gpu_operators STAND_INS BUNDLES`. What they say of ONNX Runtime's interface is checked
// against its headers.

#include "gpu_operators.hpp"

#include <cstddef>
#include <filesystem>

#include "checks.hpp"
#include "environment.hpp"
#include "error.hpp"
#include "kernels/cuda/operators.h"
#include "kernels/cuda/ort.hpp"
#include "library.hpp"
#include "session_device.hpp"

namespace mirror_gpu {

// As ONNX Runtime 1.16 declared them, and every later one does.
static_assert(kApiVersion <= ORT_API_VERSION);
static_assert(offsetof(ApiBase, get_api) == offsetof(OrtApiBase, GetApi) &&
              offsetof(ApiBase, get_version) == offsetof(OrtApiBase, GetVersionString) &&
              sizeof(ApiBase) == sizeof(OrtApiBase));

// Its enumerations travel as int.
#define SAME(ours, theirs) static_assert(static_cast<int>(ours) == theirs && sizeof(int) == sizeof(theirs))
SAME(kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SAME(kUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
SAME(kInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
SAME(kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
SAME(kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SAME(kRequired, INPUT_OUTPUT_REQUIRED);
SAME(kOptional, INPUT_OUTPUT_OPTIONAL);
SAME(kIntAttribute, ORT_OP_ATTR_INT);
SAME(kFloatAttribute, ORT_OP_ATTR_FLOAT);
SAME(kHostMemory, OrtMemTypeCPUInput);
SAME(kDefaultMemory, OrtMemTypeDefault);
SAME(kRuntimeException, ORT_RUNTIME_EXCEPTION);

#define PLACE(ours, theirs) static_assert(ours * sizeof(void*) == offsetof(OrtApi, theirs))
PLACE(kCreateStatus, CreateStatus);
PLACE(kCreateCustomOpDomain, CreateCustomOpDomain);
PLACE(kCustomOpDomainAdd, CustomOpDomain_Add);
PLACE(kAddCustomOpDomain, AddCustomOpDomain);
PLACE(kCreateTensorWithDataAsOrtValue, CreateTensorWithDataAsOrtValue);
PLACE(kGetTensorMutableData, GetTensorMutableData);
PLACE(kGetDimensionsCount, GetDimensionsCount);
PLACE(kGetDimensions, GetDimensions);
PLACE(kGetTensorTypeAndShape, GetTensorTypeAndShape);
PLACE(kAllocatorAlloc, AllocatorAlloc);
PLACE(kAllocatorFree, AllocatorFree);
PLACE(kKernelInfoGetAttributeFloat, KernelInfoGetAttribute_float);
PLACE(kKernelInfoGetAttributeInt64, KernelInfoGetAttribute_int64);
PLACE(kKernelContextGetInput, KernelContext_GetInput);
PLACE(kKernelContextGetOutput, KernelContext_GetOutput);
PLACE(kReleaseStatus, ReleaseStatus);
PLACE(kReleaseValue, ReleaseValue);
PLACE(kReleaseTensorTypeAndShapeInfo, ReleaseTensorTypeAndShapeInfo);
PLACE(kAddSessionConfigEntry, AddSessionConfigEntry);
PLACE(kReleaseAllocator, ReleaseAllocator);
PLACE(kKernelContextGetGpuComputeStream, KernelContext_GetGPUComputeStream);
PLACE(kGetTensorMemoryInfo, GetTensorMemoryInfo);
PLACE(kCreateOpAttr, CreateOpAttr);
PLACE(kReleaseOpAttr, ReleaseOpAttr);
PLACE(kCreateOp, CreateOp);
PLACE(kInvokeOp, InvokeOp);
PLACE(kReleaseOp, ReleaseOp);
PLACE(kKernelInfoGetInputCount, KernelInfo_GetInputCount);
PLACE(kKernelContextGetAllocator, KernelContext_GetAllocator);
static_assert(offsetof(Api, functions) == 0 && sizeof(Api) <= sizeof(OrtApi));

#define MEMBER(ours, theirs) static_assert(offsetof(CustomOp, ours) == offsetof(OrtCustomOp, theirs))
MEMBER(version, version);
MEMBER(create_kernel, CreateKernel);
MEMBER(get_name, GetName);
MEMBER(get_provider, GetExecutionProviderType);
MEMBER(get_input_type, GetInputType);
MEMBER(get_input_count, GetInputTypeCount);
MEMBER(get_output_type, GetOutputType);
MEMBER(get_output_count, GetOutputTypeCount);
MEMBER(compute, KernelCompute);
MEMBER(destroy, KernelDestroy);
MEMBER(get_input_characteristic, GetInputCharacteristic);
MEMBER(get_output_characteristic, GetOutputCharacteristic);
MEMBER(get_input_memory_type, GetInputMemoryType);
MEMBER(get_variadic_input_arity, GetVariadicInputMinArity);
MEMBER(get_variadic_input_homogeneity, GetVariadicInputHomogeneity);
MEMBER(get_variadic_output_arity, GetVariadicOutputMinArity);
MEMBER(get_variadic_output_homogeneity, GetVariadicOutputHomogeneity);
MEMBER(create_kernel_v2, CreateKernelV2);
MEMBER(compute_v2, KernelComputeV2);
// What version 17 added is not there.
static_assert(sizeof(CustomOp) == offsetof(OrtCustomOp, InferOutputShapeFn));

}  // namespace mirror_gpu

namespace {

using namespace mirror;
namespace fs = std::filesystem;

Checks checks;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

SegmentFacts with_layers(const std::vector<DType>& dtypes) {
  SegmentFacts facts;
  for (const DType dtype : dtypes) facts.kv.push_back({static_cast<int>(facts.kv.size()), 1, 64, dtype});
  return facts;
}

const SegmentFacts exit_head = with_layers({}), halves = with_layers({DType::float16, DType::float16});

// `missing`: why this process can't have them.
void what_is_missing_is_said(const std::string& missing) {
  checks.check(!takes_operators(halves) && !takes_operators(exit_head), "no segment takes what isn't there");
  checks.equal(operators_lack(halves).value_or("nothing"), missing, "what a segment lacks");
  checks.check(!operators_lack(exit_head) && !operators_lack(with_layers({DType::bfloat16})), "others lack nothing");
  choose("off");
  checks.check(!operators_lack(halves), "nobody lacks what is off");
  choose(nullptr);
  Ort::SessionOptions options;
  OrtSessionOptions* const given = options;
  const Ort::Status said(static_cast<OrtStatus*>(mirror_operators_register(given, OrtGetApiBase())));
  checks.check(!said.IsOK() && said.GetErrorMessage() == missing, "ONNX Runtime hears why: " + missing);
  try {
    add_operators(options);
    checks.check(false, "nobody says " + missing);
  } catch (const Error& error) {
    checks.check(error.kind() == ErrorKind::device && has(error.what(), missing), error.what());
  }
}

void segments_in_half_precision_take_them() {
  checks.check(takes_operators(halves) && takes_operators(exit_head), "half precision, and no cache at all");
  for (const DType other : {DType::float32, DType::bfloat16})
    checks.check(!takes_operators(with_layers({DType::float16, other})), "a layer in another precision");
  for (const auto& [value, taken] : {std::pair{" OFF ", false}, std::pair{"avx2", true}, std::pair{"", true}}) {
    choose(value);
    checks.equal(takes_operators(halves), taken, std::string("MIRROR_KERNELS is ") + value);
    checks.check(!operators_lack(halves), "what is there, or off, isn't lacking");
  }
  choose(nullptr);
}

// A session reads the operator's table before it looks at its graph.
void sessions_know_the_operator(const fs::path& bundle) {
  const SegmentFacts draft = read_manifest(bundle).segment("draft");
  Provider provider;
  provider.name = "CPUExecutionProvider";
  int made = 0;
  for (int session = 0; session < 2; ++session)
    SessionDevice(provider, [&made](Ort::SessionOptions& options, const SegmentFacts& facts, int, int) {
      made += facts.name == "draft";
      add_operators(options);
    }).load_segment(bundle, draft, 64, {{1, 0}}, {}, 1);
  checks.equal(made, 2, "sessions are made one after another with the one operator");
}

}  // namespace

int main(int argc, char** argv) {
  choose(nullptr);
  // As whoever keeps them elsewhere does.
  if (argc == 3)
    for (const char* name : {"libcuda.so.1", "libnvrtc.so.13"})
      checks.check(find_library({(fs::path(argv[1]) / name).c_str()}) != nullptr, std::string("no ") + name);
  const char* why = mirror_operators_missing();
  if (why != nullptr) {
    const std::string missing = why;
    if (!has(missing, "left out of this library")) {
      checks.check(argc != 3, "with the stand-ins, said: " + missing);
      const bool driver = find_library({"libcuda.so.1"}) != nullptr;
      checks.check(has(missing, driver ? "libnvrtc" : "there is no NVIDIA driver (libcuda.so.1); install it"), missing);
    }
    checks.group("missing", [&missing] { what_is_missing_is_said(missing); });
  } else {
    checks.group("segments", segments_in_half_precision_take_them);
    if (argc == 3) checks.group("sessions", [argv] { sessions_know_the_operator(fs::path(argv[2]) / "context"); });
  }
  return checks.end();
}
