#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "driver.hpp"
#include "embedded.hpp"
#include "operations.hpp"
#include "operator.hpp"
#include "operators.h"
#include "workspace.hpp"

MIRROR_EMBEDDED(mirror_products_source, "products.cu");
MIRROR_EMBEDDED(mirror_gated_source, "gated.cu");

namespace mirror_gpu {
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

constexpr int kGateThreads = 256;

struct Matrix {
  int outputs, inputs, bits;
  bool gated = false;  // whether its outputs' first half is a gate of the second

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

class Kernels {
 public:
  const Compiled& compiled(const Gpu& gpu, const Matrix& matrix, int row_tiles) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Compiled& found = kernels_[{gpu.index, matrix.outputs, matrix.inputs, matrix.bits, matrix.gated, row_tiles}];
    if (found.kernel == nullptr) {
      found.parts = parts_of(matrix, gpu);
      const int steps = (matrix.steps() + found.parts - 1) / found.parts;
      found.shared_bytes = std::max(steps * row_tiles * kStepBytes, kAlong * row_tiles * 8 * kOutputs * 4);
      const std::string source = matrix.gated ? std::string(mirror_gated_source) + mirror_products_source : "";
      found.kernel =
          compile(gpu, matrix.gated ? source.c_str() : mirror_products_source,
                  {define("BITS", matrix.bits), define("TILES", kTiles), define("ROW_TILES", row_tiles),
                   define("ACROSS", kAcross), define("ALONG", kAlong), define("AHEAD", kAhead),
                   define("MIN_BLOCKS", kBlocksAtOnce), define("PARTS", found.parts), define("OUTPUTS", matrix.outputs),
                   define("BLOCKS", matrix.inputs / kBlock), define("GATED", matrix.gated)},
                  "products", found.shared_bytes);
    }
    return found;
  }

  // For products that ONNX Runtime has computed.
  Kernel gate(const Gpu& gpu) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Kernel& found = gates_[gpu.index];
    if (found == nullptr) found = compile(gpu, mirror_gated_source, {}, "gate_rows", 0);
    return found;
  }

 private:
  std::mutex mutex_;
  std::map<std::array<int, 6>, Compiled> kernels_;
  std::map<int, Kernel> gates_;
};

Kernels& kernels() {
  static Kernels* const made = new Kernels;  // sessions may end after static objects do
  return *made;
}

// Rows by a matrix of integers; the built-in operator, which all of these have, is MatMulNBits.
class Product : public Node {
 public:
  Product(const Api& api, Handle info) : Product(api, info, false) {}

  void compute(Handle context) {
    const Rows given = rows_of(context, matrix_.outputs);
    const Handle y = output(context, 0, given.shape);
    if (given.count == 0) return;
    if (takes(given.count))
      multiply(context, y, static_cast<int>(given.count));
    else
      invoke_built_in(context, {y});
  }

 protected:
  Product(const Api& api, Handle info, bool gated) : Node(api, info) {
    const auto small = [&](const char* name) { return static_cast<int>(integer(info, name)); };
    matrix_ = {small("N"), small("K"), small("bits"), gated};
    const int block = small("block_size");
    // What a pass of one row runs, or of many, or with a matrix of another kind.
    using Types = std::vector<std::pair<const char*, int>>;
    std::vector<Types> types;
    for (const int third : {kUint8, kFloat16}) {
      const Types all = {{"T1", kFloat16}, {"T2", kUint8}, {"T3", third}, {"T4", kInt32}};
      for (int count = 4; count >= 2; --count) types.emplace_back(all.begin(), all.begin() + count);
    }
    make_built_in(info, "MatMulNBits",
                  {{"K", matrix_.inputs},
                   {"N", matrix_.outputs},
                   {"bits", matrix_.bits},
                   {"block_size", block},
                   {"accuracy_level", 0}},
                  {}, types, 1);
    known_ = inputs_ == 3 && block == kBlock && (matrix_.bits == 4 || matrix_.bits == 8) &&
             matrix_.inputs % kBlock == 0 && gpu_.major >= kFirstCapability;
    if (!known_) return;
    // A window's kernel is compiled at loading; that it can't be is said there too.
    const auto parts = static_cast<std::size_t>(kernels().compiled(gpu_, matrix_, 1).parts);
    plan_workspace(parts > 1 ? parts * kMostRows * static_cast<std::size_t>(matrix_.outputs) : 0,
                   static_cast<std::size_t>(matrix_.tiles()));
  }

  bool takes(std::int64_t count) const { return known_ && kFewestRows <= count && count <= kMostRows; }

  void multiply(Handle context, Handle y, int count) const {
    const Stream on = stream(context);
    const Compiled& compiled = kernels().compiled(gpu_, matrix_, (count + 7) / 8);
    const Workspace memory = workspace(gpu_.index, on);
    Address at[] = {address(input(context, 1)), address(input(context, 2)), address(input(context, 0)), address(y),
                    memory.sums_at,             memory.tickets_at};
    void* arguments[] = {&at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &count};
    launch(compiled.kernel, {matrix_.tiles(), compiled.parts, 1}, kThreads, compiled.shared_bytes, on, arguments);
  }

  Matrix matrix_{};

 private:
  bool known_ = false;
};

// The gate of a product that the built-in operator computes, `both` its result.
void gate_rows(const Gpu& gpu, Stream on, Address both, Address y, int inner, std::int64_t rows) {
  void* arguments[] = {&both, &y, &inner};
  const int across = (inner + kGateThreads - 1) / kGateThreads;
  launch(kernels().gate(gpu), {across, static_cast<int>(rows), 1}, kGateThreads, 0, on, arguments);
}

// silu(gate) * up of a product with a matrix of integers.
class GatedProduct : public Product {
 public:
  GatedProduct(const Api& api, Handle info) : Product(api, info, true) { kernels().gate(gpu_); }

  void compute(Handle context) {
    const int inner = matrix_.outputs / 2;
    const Rows given = rows_of(context, inner);
    const Handle y = output(context, 0, given.shape);
    if (given.count == 0) return;
    if (takes(given.count)) return multiply(context, y, static_cast<int>(given.count));
    const Temporary both(*this, context, y, rows_of(context, matrix_.outputs).shape);
    invoke_built_in(context, {both.value()});
    gate_rows(gpu_, stream(context), both.address(), address(y), inner, given.count);
  }
};

// The same of a product with a matrix in float16, which ONNX Runtime computes.
class GatedHalfProduct : public Node {
 public:
  GatedHalfProduct(const Api& api, Handle info) : Node(api, info) {
    transposed_ = integer(info, "transB", 0) != 0;
    make_built_in(info, "FusedMatMul",
                  {{"transA", 0}, {"transB", transposed_}, {"transBatchA", 0}, {"transBatchB", 0}},
                  {{"alpha", number(info, "alpha", 1)}}, {{{"T", kFloat16}}}, 1);
    kernels().gate(gpu_);
  }

  void compute(Handle context) {
    const std::int64_t outputs = shape_of(input(context, 1)).at(transposed_ ? 0 : 1);
    const Rows given = rows_of(context, outputs / 2);
    const Handle y = output(context, 0, given.shape);
    if (given.count == 0) return;
    const Temporary both(*this, context, y, rows_of(context, outputs).shape);
    invoke_built_in(context, {both.value()});
    gate_rows(gpu_, stream(context), both.address(), address(y), static_cast<int>(outputs / 2), given.count);
  }

 private:
  bool transposed_ = false;
};

}  // namespace

const CustomOp& products_operation() {
  // Rows, weights, scales, and what a bundle's matrices don't have: zero points, places, a bias.
  static const Operation made =
      operation_of<Product>({"MatMulNBits", {kFloat16, kUint8, kFloat16, kUint8, kInt32, kFloat16}, 3});
  return made;
}

const CustomOp& gated_products_operation() {
  static const Operation made = operation_of<GatedProduct>({"GatedMatMulNBits", {kFloat16, kUint8, kFloat16}, 3});
  return made;
}

const CustomOp& gated_half_products_operation() {
  static const Operation made = operation_of<GatedHalfProduct>({"GatedFusedMatMul", {kFloat16, kFloat16}, 2});
  return made;
}

}  // namespace mirror_gpu
