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

class Kernels {
 public:
  const Compiled& compiled(const Gpu& gpu, const Matrix& matrix, int row_tiles) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Compiled& found = kernels_[{gpu.index, matrix.outputs, matrix.inputs, matrix.bits, row_tiles}];
    if (found.kernel == nullptr) {
      found.parts = parts_of(matrix, gpu);
      const int steps = (matrix.steps() + found.parts - 1) / found.parts;
      found.shared_bytes = std::max(steps * row_tiles * kStepBytes, kAlong * row_tiles * 8 * kOutputs * 4);
      found.kernel = compile(gpu, mirror_products_source,
                             {define("BITS", matrix.bits), define("TILES", kTiles), define("ROW_TILES", row_tiles),
                              define("ACROSS", kAcross), define("ALONG", kAlong), define("AHEAD", kAhead),
                              define("MIN_BLOCKS", kBlocksAtOnce), define("PARTS", found.parts),
                              define("OUTPUTS", matrix.outputs), define("BLOCKS", matrix.inputs / kBlock)},
                             "products", found.shared_bytes);
    }
    return found;
  }

 private:
  std::mutex mutex_;
  std::map<std::array<int, 5>, Compiled> kernels_;
};

Kernels& kernels() {
  static Kernels* const made = new Kernels;  // sessions may end after static objects do
  return *made;
}

class Product : public Node {
 public:
  Product(const Api& api, Handle info) : Node(api, info) {
    const auto small = [&](const char* name) { return static_cast<int>(integer(info, name)); };
    matrix_ = {small("N"), small("K"), small("bits")};
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

  void compute(Handle context) {
    const Handle x = input(context, 0);
    std::vector<std::int64_t> shape = shape_of(x);
    std::int64_t rows = 1;
    for (std::size_t index = 0; index + 1 < shape.size(); ++index) rows *= shape[index];
    shape.back() = matrix_.outputs;
    const Handle y = output(context, 0, shape);
    if (rows == 0) return;
    if (known_ && kFewestRows <= rows && rows <= kMostRows)
      multiply(context, x, y, static_cast<int>(rows));
    else
      invoke_built_in(context, {y});
  }

 private:
  void multiply(Handle context, Handle x, Handle y, int rows) const {
    const Stream on = stream(context);
    const Compiled& compiled = kernels().compiled(gpu_, matrix_, (rows + 7) / 8);
    const Workspace memory = workspace(gpu_.index, on);
    Address at[] = {address(input(context, 1)), address(input(context, 2)), address(x), address(y), memory.sums_at,
                    memory.tickets_at};
    void* arguments[] = {&at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &rows};
    launch(compiled.kernel, {matrix_.tiles(), compiled.parts, 1}, kThreads, compiled.shared_bytes, on, arguments);
  }

  Matrix matrix_{};
  bool known_ = false;
};

}  // namespace

const CustomOp& products_operation() {
  // Rows, weights, scales, and what a bundle's matrices don't have: zero points, places, a bias.
  static const Operation made =
      operation_of<Product>({"MatMulNBits", {kFloat16, kUint8, kFloat16, kUint8, kInt32, kFloat16}, 3});
  return made;
}

}  // namespace mirror_gpu
