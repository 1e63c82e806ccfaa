// The part of ONNX Runtime's C API that an operator of one's own needs, declared by what its binary interface promises:
// functions keep their places in the table, and an operator says up to which version its own table goes. So the
// kernels build where ONNX Runtime's headers are not at hand, as beside a Python package; hosts/cpp/tests checks every
// line here against the headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mirror_gpu {

constexpr std::uint32_t kApiVersion = 16;  // of ONNX Runtime 1.16; the last that gave functions used here

// ONNX Runtime's own types are known by their addresses alone.
using Handle = void*;
using Status = void*;  // null where all is well

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum AttributeType : int { kIntAttribute = 1, kFloatAttribute = 3 };
enum MemoryType : int { kHostMemory = -2, kDefaultMemory = 0 };
enum ErrorCode : int { kRuntimeException = 6 };

// Places in the table of functions.
enum Function : std::size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kCreateTensorWithDataAsOrtValue = 49,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kAllocatorAlloc = 75,
  kAllocatorFree = 76,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseValue = 96,
  kReleaseTensorTypeAndShapeInfo = 99,
  kAddSessionConfigEntry = 130,
  kReleaseAllocator = 132,
  kKernelContextGetGpuComputeStream = 193,
  kGetTensorMemoryInfo = 194,
  kCreateOpAttr = 211,
  kReleaseOpAttr = 212,
  kCreateOp = 213,
  kInvokeOp = 214,
  kReleaseOp = 215,
  kKernelInfoGetInputCount = 230,
  kKernelContextGetAllocator = 253,
  kFunctions,
};

struct Api {
  void* functions[kFunctions];

  template <typename... Arguments>
  Status call(Function place, Arguments... arguments) const {
    return reinterpret_cast<Status (*)(Arguments...)>(functions[place])(arguments...);
  }
  template <typename... Arguments>
  void release(Function place, Arguments... arguments) const {
    reinterpret_cast<void (*)(Arguments...)>(functions[place])(arguments...);
  }
};

struct ApiBase {
  const Api* (*get_api)(std::uint32_t version);
  const char* (*get_version)();
};

struct CustomOp {
  std::uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, Handle info);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, std::size_t index);
  std::size_t (*get_input_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, std::size_t index);
  std::size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, Handle context);
  void (*destroy)(void* kernel);
  int (*get_input_characteristic)(const CustomOp*, std::size_t index);
  int (*get_output_characteristic)(const CustomOp*, std::size_t index);
  int (*get_input_memory_type)(const CustomOp*, std::size_t index);
  int (*get_variadic_input_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status (*create_kernel_v2)(const CustomOp*, const Api*, Handle info, void** kernel);
  Status (*compute_v2)(void* kernel, Handle context);
};

}  // namespace mirror_gpu
