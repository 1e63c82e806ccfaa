#include "products.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "driver.hpp"
#include "ort.hpp"

// Tests on machines without a GPU name another.
#ifndef MIRROR_PRODUCTS_PROVIDER
#define MIRROR_PRODUCTS_PROVIDER "CUDAExecutionProvider"
#endif

// products.cu as it stands, ended by a zero.
__asm__(
    ".pushsection .rodata\n"
    ".globl mirror_products_source\n"
    ".hidden mirror_products_source\n"
    "mirror_products_source:\n"
    ".incbin \"" MIRROR_PRODUCTS_SOURCE
    "\"\n"
    ".byte 0\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const char mirror_products_source[];

namespace mirror_products {
namespace {

constexpr int kBlock = 32;
constexpr int kFewestRows = 2, kMostRows = 16;  // ONNX Runtime multiplies one row in less time
constexpr int kStep = 4;                        // blocks
constexpr int kStepBytes = 2048;                // of shared memory, for eight rows
constexpr int kFirstCapability = 8;             // copies and products that the kernels are made of
// How a thread block is cut: see products.cu. Found by trying on an H200 (docs/log.md).
constexpr int kTiles = 2, kAcross = 2, kAlong = 8, kAhead = 1, kBlocksAtOnce = 1;
constexpr int kOutputs = 16 * kTiles * kAcross;
constexpr int kThreads = 32 * kAcross * kAlong;

struct Matrix {
  int outputs, inputs, bits;

  int tiles() const { return (outputs + kOutputs - 1) / kOutputs; }
  int steps() const { return (inputs / kBlock + kStep - 1) / kStep; }
};

// In how many parts the input is cut: two thread blocks for each multiprocessor if there are enough steps, and rows
// that fit its shared memory. It depends on matrix and GPU alone, since each number rounds otherwise.
int parts_of(const Matrix& matrix, const Gpu& gpu) {
  const int most_steps = gpu.shared_of_block / (kMostRows / 8) / kStepBytes;
  const int for_memory = (matrix.steps() + most_steps - 1) / most_steps;
  const int for_all = std::min(2 * gpu.multiprocessors / matrix.tiles(), matrix.steps() / kAlong);
  return std::max({1, for_memory, for_all});
}

struct Compiled {
  Kernel kernel = nullptr;
  int parts = 1, shared_bytes = 0;
};

// Memory that all products on a stream share, since they follow each other: sums of parts of the input, and who was
// last. It stays for good: recorded passes know its address.
struct Workspace {
  std::size_t sums = 0, tickets = 0;
  Address sums_at = 0, tickets_at = 0;
};

class Shared {
 public:
  const Compiled& compiled(const Gpu& gpu, const Matrix& matrix, int row_tiles) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Compiled& found = kernels_[{gpu.index, matrix.outputs, matrix.inputs, matrix.bits, row_tiles}];
    if (found.kernel == nullptr) {
      found.parts = parts_of(matrix, gpu);
      const int steps = (matrix.steps() + found.parts - 1) / found.parts;
      found.shared_bytes = std::max(steps * row_tiles * kStepBytes, kAlong * row_tiles * 8 * kOutputs * 4);
      const auto define = [](const char* name, int value) {
        return std::string("-D") + name + "=" + std::to_string(value);
      };
      found.kernel = compile(gpu, mirror_products_source,
                             {define("BITS", matrix.bits), define("TILES", kTiles), define("ROW_TILES", row_tiles),
                              define("ACROSS", kAcross), define("ALONG", kAlong), define("AHEAD", kAhead),
                              define("MIN_BLOCKS", kBlocksAtOnce), define("PARTS", found.parts),
                              define("OUTPUTS", matrix.outputs), define("BLOCKS", matrix.inputs / kBlock)},
                             "products", found.shared_bytes);
    }
    return found;
  }

  void plan(const Matrix& matrix, int parts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    most_tickets_ = std::max(most_tickets_, static_cast<std::size_t>(matrix.tiles()));
    if (parts > 1) most_sums_ = std::max(most_sums_, static_cast<std::size_t>(parts) * kMostRows * matrix.outputs);
  }

  // For all that was planned so far.
  Workspace workspace(int gpu, Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Workspace& found = workspaces_[{gpu, stream}];
    if (found.sums < most_sums_ || found.tickets < most_tickets_ || found.tickets_at == 0) {
      found.sums = most_sums_;
      found.tickets = most_tickets_;
      found.sums_at = most_sums_ > 0 ? allocate(most_sums_ * sizeof(float)) : 0;
      found.tickets_at = allocate(most_tickets_ * sizeof(int));
      clear(found.tickets_at, most_tickets_ * sizeof(int), stream);
    }
    return found;
  }

 private:
  std::mutex mutex_;
  std::map<std::array<int, 5>, Compiled> kernels_;
  std::map<std::pair<int, Stream>, Workspace> workspaces_;
  std::size_t most_sums_ = 0, most_tickets_ = 1;
};

Shared& shared() {
  static Shared* const made = new Shared;  // sessions may end after static objects do
  return *made;
}

// A status of ONNX Runtime's on its way out.
struct Failed {
  Status status;
};

void pass_on(Status status) {
  if (status != nullptr) throw Failed{status};
}

Status status_of(const Api& api, const std::string& words) {
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
class Product {
 public:
  Product(const Api& api, Handle info) : api_(api) {
    matrix_ = {number(info, "N"), number(info, "K"), number(info, "bits")};
    const int block = number(info, "block_size");
    std::size_t inputs = 0;
    pass_on(api.call(kKernelInfoGetInputCount, info, &inputs));
    // What a pass of one row runs, or of many, or with a matrix of another kind.
    const std::array<std::pair<const char*, std::int64_t>, 5> given = {{{"K", matrix_.inputs},
                                                                        {"N", matrix_.outputs},
                                                                        {"bits", matrix_.bits},
                                                                        {"block_size", block},
                                                                        {"accuracy_level", 0}}};
    std::vector<Owned> owned;
    std::vector<Handle> attributes(given.size());
    for (std::size_t index = 0; index < given.size(); ++index) {
      pass_on(api.call(kCreateOpAttr, given[index].first, static_cast<const void*>(&given[index].second), 1,
                       static_cast<int>(kIntAttribute), &attributes[index]));
      owned.emplace_back(attributes[index], Release{&api, kReleaseOpAttr});
    }
    // Versions of ONNX Runtime differ in what types their operator names.
    const std::array<const char*, 4> names = {"T1", "T2", "T3", "T4"};
    Status made = nullptr;
    Handle other = nullptr;
    for (const int third : {kUint8, kFloat16}) {
      const std::array<int, 4> types = {kFloat16, kUint8, third, kInt32};
      for (int count = 4; count >= 2 && other == nullptr; --count) {
        if (made != nullptr) api.release(kReleaseStatus, made);
        made = api.call(kCreateOp, info, "MatMulNBits", "com.microsoft", 1, names.data(), types.data(), count,
                        static_cast<const Handle*>(attributes.data()), static_cast<int>(given.size()),
                        static_cast<int>(inputs), 1, &other);
      }
    }
    pass_on(made);
    other_ = Owned(other, Release{&api, kReleaseOp});
    gpu_ = current_gpu();
    known_ = inputs == 3 && block == kBlock && (matrix_.bits == 4 || matrix_.bits == 8) &&
             matrix_.inputs % kBlock == 0 && gpu_.major >= kFirstCapability;
    inputs_ = inputs;
    // A window's kernel is compiled at loading; that it can't be is said there too.
    if (known_) shared().plan(matrix_, shared().compiled(gpu_, matrix_, 1).parts);
  }
  void compute(Handle context) {
    const Handle x = input(context, 0);
    std::vector<std::int64_t> shape = shape_of(x);
    std::int64_t rows = 1;
    for (std::size_t index = 0; index + 1 < shape.size(); ++index) rows *= shape[index];
    shape.back() = matrix_.outputs;
    Handle y = nullptr;
    pass_on(api_.call(kKernelContextGetOutput, context, std::size_t{0}, static_cast<const std::int64_t*>(shape.data()),
                      shape.size(), &y));
    if (rows == 0) return;
    if (known_ && kFewestRows <= rows && rows <= kMostRows)
      multiply(context, x, y, static_cast<int>(rows));
    else
      invoke_other(context, y);
  }

 private:
  int number(Handle info, const char* name) const {
    std::int64_t value = 0;
    pass_on(api_.call(kKernelInfoGetAttributeInt64, info, name, &value));
    return static_cast<int>(value);
  }

  Handle input(Handle context, std::size_t index) const {
    Handle value = nullptr;
    pass_on(api_.call(kKernelContextGetInput, context, index, &value));
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

  Address address(Handle value) const {
    void* data = nullptr;
    pass_on(api_.call(kGetTensorMutableData, value, &data));
    return reinterpret_cast<Address>(data);
  }

  void multiply(Handle context, Handle x, Handle y, int rows) {
    Stream stream = nullptr;
    pass_on(api_.call(kKernelContextGetGpuComputeStream, context, &stream));
    const Compiled& compiled = shared().compiled(gpu_, matrix_, (rows + 7) / 8);
    const Workspace workspace = shared().workspace(gpu_.index, stream);
    Address at[] = {address(input(context, 1)), address(input(context, 2)), address(x), address(y),
                    workspace.sums_at,          workspace.tickets_at};
    void* arguments[] = {&at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &rows};
    launch(compiled.kernel, matrix_.tiles(), compiled.parts, kThreads, compiled.shared_bytes, stream, arguments);
  }

  void invoke_other(Handle context, Handle y) {
    std::vector<Handle> inputs(inputs_);
    for (std::size_t index = 0; index < inputs_; ++index) inputs[index] = input(context, index);
    pass_on(api_.call(kInvokeOp, context, other_.get(), static_cast<const Handle*>(inputs.data()),
                      static_cast<int>(inputs_), &y, 1));
  }

  const Api& api_;
  Matrix matrix_{};
  Gpu gpu_;
  bool known_ = false;
  std::size_t inputs_ = 0;
  Owned other_{nullptr, {}};
};

const Api* api_of_process = nullptr;

Status create(const CustomOp*, const Api* api, Handle info, void** kernel) {
  return guarded(*api, [&] { *kernel = new Product(*api, info); });
}

Status compute(void* kernel, Handle context) {
  return guarded(*api_of_process, [&] { static_cast<Product*>(kernel)->compute(context); });
}

// Rows, weights, scales, and what a bundle's matrices don't have: zero points, places, a bias.
constexpr std::array<int, 6> kInputs = {kFloat16, kUint8, kFloat16, kUint8, kInt32, kFloat16};

const CustomOp& operation() {
  static const CustomOp made = [] {
    CustomOp op{};
    op.version = kApiVersion;
    op.get_name = [](const CustomOp*) { return "MatMulNBits"; };
    op.get_provider = [](const CustomOp*) { return MIRROR_PRODUCTS_PROVIDER; };
    op.get_input_type = [](const CustomOp*, std::size_t index) { return kInputs[index]; };
    op.get_input_count = [](const CustomOp*) { return kInputs.size(); };
    op.get_output_type = [](const CustomOp*, std::size_t) { return static_cast<int>(kFloat16); };
    op.get_output_count = [](const CustomOp*) { return std::size_t{1}; };
    op.destroy = [](void* kernel) { delete static_cast<Product*>(kernel); };
    op.get_input_characteristic = [](const CustomOp*, std::size_t index) {
      return static_cast<int>(index < 3 ? kRequired : kOptional);
    };
    op.get_output_characteristic = [](const CustomOp*, std::size_t) { return static_cast<int>(kRequired); };
    op.get_input_memory_type = [](const CustomOp*, std::size_t) { return static_cast<int>(kDefaultMemory); };
    op.get_variadic_input_arity = [](const CustomOp*) { return 1; };
    op.get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
    op.get_variadic_output_arity = [](const CustomOp*) { return 1; };
    op.get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
    op.create_kernel_v2 = create;
    op.compute_v2 = compute;
    return op;
  }();
  return made;
}

}  // namespace
}  // namespace mirror_products

const char* mirror_products_missing() {
  const std::string& missing = mirror_products::driver_missing();
  return missing.empty() ? nullptr : missing.c_str();
}

void* mirror_products_register(void* options, const void* api_base) {
  using namespace mirror_products;
  const Api* api = static_cast<const ApiBase*>(api_base)->get_api(kApiVersion);
  if (const char* missing = mirror_products_missing()) return status_of(*api, missing);
  static std::mutex mutex;
  static Handle domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  return guarded(*api, [&] {
    if (domain == nullptr) {
      api_of_process = api;
      Handle made = nullptr;
      // The name of a built-in operator: ONNX Runtime takes a session's own before those.
      pass_on(api->call(kCreateCustomOpDomain, "com.microsoft", &made));
      pass_on(api->call(kCustomOpDomainAdd, made, &operation()));
      domain = made;
    }
    pass_on(api->call(kAddCustomOpDomain, options, domain));
  });
}

#if !defined(MIRROR_KERNELS_STATIC)
void* RegisterCustomOps(void* options, const void* api_base) { return mirror_products_register(options, api_base); }
#endif
