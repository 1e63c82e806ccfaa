// What an operator of one's own does with ONNX Runtime: errors on their way out, what a node says of itself, and the
// built-in operator of the same name, for passes that ours is not made for.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "ort.hpp"

// Tests on machines without a GPU name another.
#ifndef MIRROR_OPERATORS_PROVIDER
#define MIRROR_OPERATORS_PROVIDER "CUDAExecutionProvider"
#endif

namespace mirror_gpu {

// A status of ONNX Runtime's on its way out.
struct Failed {
  Status status;
};

inline void pass_on(Status status) {
  if (status != nullptr) throw Failed{status};
}

inline Status status_of(const Api& api, const std::string& words) {
  return api.call(kCreateStatus, static_cast<int>(kRuntimeException), words.c_str());
}

template <typename Function>
Status guarded(const Api& api, Function function) {
  try {
    function();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return status_of(api, error.what());
  }
}

// What ONNX Runtime made and wants back.
struct Release {
  const Api* api;
  Function place;

  void operator()(Handle given) const { api->release(place, given); }
};
using Owned = std::unique_ptr<void, Release>;

// One node.
class Node {
 public:
  Node(const Api& api, Handle info) : api_(api) {
    pass_on(api.call(kKernelInfoGetInputCount, info, &inputs_));
    gpu_ = current_gpu();
  }

 protected:
  using Integers = std::vector<std::pair<const char*, std::int64_t>>;
  using Floats = std::vector<std::pair<const char*, float>>;

  std::int64_t integer(Handle info, const char* name) const {
    std::int64_t value = 0;
    pass_on(api_.call(kKernelInfoGetAttributeInt64, info, name, &value));
    return value;
  }
  // Where a node needn't say.
  std::int64_t integer(Handle info, const char* name, std::int64_t otherwise) const {
    std::int64_t value = 0;
    return said(api_.call(kKernelInfoGetAttributeInt64, info, name, &value)) ? value : otherwise;
  }
  float number(Handle info, const char* name, float otherwise) const {
    float value = 0;
    return said(api_.call(kKernelInfoGetAttributeFloat, info, name, &value)) ? value : otherwise;
  }

  // Makes the built-in operator. `types`: by the names of its type parameters; versions of ONNX Runtime differ in which
  // they have, so these are tried in turn.
  void make_built_in(Handle info, const char* name, const Integers& integers, const Floats& floats,
                     const std::vector<std::vector<std::pair<const char*, int>>>& types, int outputs) {
    std::vector<Owned> owned;
    std::vector<Handle> attributes;
    const auto add = [&](const char* of, const void* value, AttributeType type) {
      Handle made = nullptr;
      pass_on(api_.call(kCreateOpAttr, of, value, 1, static_cast<int>(type), &made));
      owned.emplace_back(made, Release{&api_, kReleaseOpAttr});
      attributes.push_back(made);
    };
    for (const auto& [of, value] : integers) add(of, &value, kIntAttribute);
    for (const auto& [of, value] : floats) add(of, &value, kFloatAttribute);
    Status failed = nullptr;
    Handle made = nullptr;
    for (const auto& chosen : types) {
      if (made != nullptr) break;
      if (failed != nullptr) api_.release(kReleaseStatus, failed);
      std::vector<const char*> names;
      std::vector<int> values;
      for (const auto& [of, type] : chosen) names.push_back(of), values.push_back(type);
      failed = api_.call(kCreateOp, info, name, "com.microsoft", 1, names.data(), values.data(),
                         static_cast<int>(names.size()), static_cast<const Handle*>(attributes.data()),
                         static_cast<int>(attributes.size()), static_cast<int>(inputs_), outputs, &made);
    }
    pass_on(failed);
    built_in_ = Owned(made, Release{&api_, kReleaseOp});
  }

  // Null for one that isn't given.
  Handle input(Handle context, std::size_t index) const {
    Handle value = nullptr;
    if (index < inputs_) pass_on(api_.call(kKernelContextGetInput, context, index, &value));
    return value;
  }

  Handle output(Handle context, std::size_t index, const std::vector<std::int64_t>& shape) const {
    Handle value = nullptr;
    pass_on(api_.call(kKernelContextGetOutput, context, index, static_cast<const std::int64_t*>(shape.data()),
                      shape.size(), &value));
    return value;
  }

  std::vector<std::int64_t> shape_of(Handle value) const {
    Handle facts = nullptr;
    std::size_t rank = 0;
    pass_on(api_.call(kGetTensorTypeAndShape, value, &facts));
    const Owned owned(facts, Release{&api_, kReleaseTensorTypeAndShapeInfo});
    pass_on(api_.call(kGetDimensionsCount, facts, &rank));
    std::vector<std::int64_t> shape(rank);
    pass_on(api_.call(kGetDimensions, facts, shape.data(), rank));
    return shape;
  }

  // The rows of the first input, and the shape of as many of another width.
  struct Rows {
    std::vector<std::int64_t> shape;
    std::int64_t count = 1;
  };
  Rows rows_of(Handle context, std::int64_t width) const {
    Rows found{shape_of(input(context, 0))};
    for (std::size_t index = 0; index + 1 < found.shape.size(); ++index) found.count *= found.shape[index];
    found.shape.back() = width;
    return found;
  }

  Address address(Handle value) const {
    if (value == nullptr) return 0;
    void* data = nullptr;
    pass_on(api_.call(kGetTensorMutableData, value, &data));
    return reinterpret_cast<Address>(data);
  }

  Stream stream(Handle context) const {
    Stream found = nullptr;
    pass_on(api_.call(kKernelContextGetGpuComputeStream, context, &found));
    return found;
  }

  // A tensor in float16 for this run alone, beside `like`: ONNX Runtime may give its memory to what comes next on the
  // stream.
  class Temporary {
   public:
    Temporary(const Node& node, Handle context, Handle like, const std::vector<std::int64_t>& shape) : api_(node.api_) {
      std::size_t bytes = 2;
      for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
      Handle found = nullptr;
      pass_on(api_.call(kGetTensorMemoryInfo, like, &found));
      pass_on(api_.call(kKernelContextGetAllocator, context, found, &allocator_));
      try {
        pass_on(api_.call(kAllocatorAlloc, allocator_, bytes, &data_));
        pass_on(api_.call(kCreateTensorWithDataAsOrtValue, found, data_, bytes,
                          static_cast<const std::int64_t*>(shape.data()), shape.size(), static_cast<int>(kFloat16),
                          &value_));
      } catch (...) {
        give_back();
        throw;
      }
    }
    Temporary(const Temporary&) = delete;
    Temporary& operator=(const Temporary&) = delete;
    ~Temporary() { give_back(); }

    Handle value() const { return value_; }
    Address address() const { return reinterpret_cast<Address>(data_); }

   private:
    void give_back() {
      if (value_ != nullptr) api_.release(kReleaseValue, value_);
      if (data_ != nullptr)
        if (Status failed = api_.call(kAllocatorFree, allocator_, data_)) api_.release(kReleaseStatus, failed);
      api_.release(kReleaseAllocator, allocator_);
    }

    const Api& api_;
    Handle allocator_ = nullptr, value_ = nullptr;
    void* data_ = nullptr;
  };

  void invoke_built_in(Handle context, std::vector<Handle> outputs) const {
    std::vector<Handle> inputs(inputs_);
    for (std::size_t index = 0; index < inputs_; ++index) inputs[index] = input(context, index);
    pass_on(api_.call(kInvokeOp, context, built_in_.get(), static_cast<const Handle*>(inputs.data()),
                      static_cast<int>(inputs_), outputs.data(), static_cast<int>(outputs.size())));
  }

  const Api& api_;
  Gpu gpu_;
  std::size_t inputs_ = 0;

 private:
  bool said(Status status) const {
    if (status != nullptr) api_.release(kReleaseStatus, status);
    return status == nullptr;
  }

  Owned built_in_{nullptr, {}};
};

// How many inputs and outputs an operator has, and where ONNX Runtime keeps them.
struct Signature {
  const char* name;
  std::vector<int> inputs;  // element types
  std::size_t required;     // of the inputs
  int on_host = -1;         // an input that is read in the host's memory
  std::size_t outputs = 1;  // float16 all
};

struct Operation : CustomOp {
  Signature signature;
};

const Api*& api_of_process();

// The table of an operator whose kernel is a `Kernel`, made of an Api, a node's facts and the signature, with `compute(context)`.
template <typename Kernel>
Operation operation_of(Signature signature) {
  Operation op{};
  op.signature = std::move(signature);
  op.version = kApiVersion;
  op.get_name = [](const CustomOp* given) { return static_cast<const Operation*>(given)->signature.name; };
  op.get_provider = [](const CustomOp*) { return MIRROR_OPERATORS_PROVIDER; };
  op.get_input_type = [](const CustomOp* given, std::size_t index) {
    return static_cast<const Operation*>(given)->signature.inputs[index];
  };
  op.get_input_count = [](const CustomOp* given) {
    return static_cast<const Operation*>(given)->signature.inputs.size();
  };
  op.get_output_type = [](const CustomOp*, std::size_t) { return static_cast<int>(kFloat16); };
  op.get_output_count = [](const CustomOp* given) { return static_cast<const Operation*>(given)->signature.outputs; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.get_input_characteristic = [](const CustomOp* given, std::size_t index) {
    return static_cast<int>(index < static_cast<const Operation*>(given)->signature.required ? kRequired : kOptional);
  };
  op.get_output_characteristic = [](const CustomOp*, std::size_t) { return static_cast<int>(kRequired); };
  op.get_input_memory_type = [](const CustomOp* given, std::size_t index) {
    const bool on_host = static_cast<int>(index) == static_cast<const Operation*>(given)->signature.on_host;
    return static_cast<int>(on_host ? kHostMemory : kDefaultMemory);
  };
  op.get_variadic_input_arity = [](const CustomOp*) { return 1; };
  op.get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
  op.get_variadic_output_arity = [](const CustomOp*) { return 1; };
  op.get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const CustomOp* given, const Api* api, Handle info, void** kernel) {
    return guarded(*api, [&] { *kernel = new Kernel(*api, info, static_cast<const Operation*>(given)->signature); });
  };
  op.compute_v2 = [](void* kernel, Handle context) {
    return guarded(*api_of_process(), [&] { static_cast<Kernel*>(kernel)->compute(context); });
  };
  return op;
}

}  // namespace mirror_gpu
