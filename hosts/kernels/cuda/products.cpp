#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuts.hpp"
#include "driver.hpp"
#include "embedded.hpp"
#include "operations.hpp"
#include "operator.hpp"
#include "operators.h"
#include "workspace.hpp"

MIRROR_EMBEDDED(mirror_gated_source, "gated.cu");

namespace mirror_gpu {
namespace {

constexpr int kFirstCapability = 8;  // copies and products that the kernels are made of
constexpr int kGateThreads = 256;

struct Compiled {
  Kernel kernel = nullptr;
  int shared_bytes = 0;
};

class Kernels {
 public:
  Compiled compiled(const Gpu& gpu, const Matrix& matrix, const Cut& cut, int row_tiles) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Compiled& found = kernels_[{gpu.index, matrix.outputs, matrix.inputs, matrix.bits, matrix.gated, row_tiles}];
    if (found.kernel == nullptr) {
      found.shared_bytes = cut.shared_bytes(row_tiles);
      const std::string source = std::string(mirror_gated_source) + cut.source;
      found.kernel = compile(gpu, source.c_str(), cut.numbers(row_tiles), cut.name, found.shared_bytes);
    }
    return found;
  }

 private:
  std::mutex mutex_;
  std::map<std::array<int, 6>, Compiled> kernels_;
};

Kernels& kernels() {
  static Kernels* const made = new Kernels;  // sessions may end after static objects do
  return *made;
}

// For products that ONNX Runtime has computed.
Kernel gate(const Gpu& gpu) { return compiled_once(gpu, mirror_gated_source, "gate_rows"); }

bool is_gated(const Signature& of) { return std::strncmp(of.name, "Gated", 5) == 0; }

// Rows by a matrix, and perhaps the gate of what comes of it: by our kernels where they are faster, else by a built-in
// operator and, if there is one, a kernel for the gate.
class Product : public Node {
 public:
  void compute(Handle context) {
    const int spans = matrix_.gated ? 2 : 1;
    const std::int64_t outputs = outputs_of(context);
    const Rows given = rows_of(context, outputs / spans);
    const Handle y = output(context, 0, given.shape);
    if (given.count == 0) return;
    if (cut_ && cut_->fewest_rows <= given.count && given.count <= cut_->most_rows)
      return multiply(context, y, static_cast<int>(given.count));
    if (!matrix_.gated) return invoke_built_in(context, {y});
    const Temporary both(*this, context, y, rows_of(context, outputs).shape);
    invoke_built_in(context, {both.value()});
    gate_rows(context, both.address(), address(y), static_cast<int>(outputs / spans), given.count);
  }

 protected:
  using Node::Node;

  virtual ~Product() = default;
  virtual std::int64_t outputs_of(Handle) const { return matrix_.outputs; }

  // What our kernels need. A window's is compiled at loading; that it can't be is said there too.
  void prepare(bool known) {
    if (matrix_.gated) gate(gpu_);
    known = known && matrix_.outputs > 0 && matrix_.inputs > 0 && matrix_.inputs % kBlock == 0 &&
            gpu_.major >= kFirstCapability;
    if (!known) return;
    cut_ = cut_of(matrix_, gpu_);
    kernels().compiled(gpu_, matrix_, *cut_, 1);
    const int groups = cut_->groups(cut_->most_rows), row_tiles = cut_->row_tiles(cut_->most_rows);
    const std::size_t shared = cut_->parts > 1 ? static_cast<std::size_t>(groups) : 0;
    plan_workspace(shared * cut_->sums(row_tiles), shared * cut_->tickets());
  }

  Matrix matrix_{};

 private:
  void multiply(Handle context, Handle y, int count) const {
    const Stream on = stream(context);
    const int row_tiles = cut_->row_tiles(count);
    const Compiled compiled = kernels().compiled(gpu_, matrix_, *cut_, row_tiles);
    const Workspace memory = workspace(gpu_.index, on);
    const bool scaled = matrix_.bits < 16;
    Address at[] = {address(input(context, 1)),
                    scaled ? address(input(context, 2)) : 0,
                    address(input(context, 0)),
                    address(y),
                    memory.sums_at,
                    memory.tickets_at};
    void* arguments[] = {&at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &count};
    launch(compiled.kernel, {cut_->blocks, cut_->parts, cut_->groups(count)}, cut_->threads, compiled.shared_bytes, on,
           arguments);
  }

  // The gate of a product that the built-in operator computed, `both` its result.
  void gate_rows(Handle context, Address both, Address y, int inner, std::int64_t rows) const {
    void* arguments[] = {&both, &y, &inner};
    const int across = divided_up(inner, kGateThreads);
    launch(gate(gpu_), {across, static_cast<int>(rows), 1}, kGateThreads, 0, stream(context), arguments);
  }

  std::unique_ptr<const Cut> cut_;  // of what our kernels multiply, none where they don't
};

// Of integers; the built-in operator is MatMulNBits.
class IntegerProduct : public Product {
 public:
  IntegerProduct(const Api& api, Handle info, const Signature& of) : Product(api, info) {
    const auto small = [&](const char* name) { return static_cast<int>(integer(info, name)); };
    matrix_ = {small("N"), small("K"), small("bits"), is_gated(of)};
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
    prepare(inputs_ == 3 && block == kBlock && (matrix_.bits == 4 || matrix_.bits == 8));
  }
};

// Of float16 numbers; the built-in operator is FusedMatMul. Ours takes small matrices, whose sizes the node says.
class HalfProduct : public Product {
 public:
  HalfProduct(const Api& api, Handle info, const Signature& of) : Product(api, info) {
    transposed_ = integer(info, "transB", 0) != 0;
    const float alpha = number(info, "alpha", 1);
    make_built_in(info, "FusedMatMul", {{"transA", 0}, {"transB", transposed_}, {"transBatchA", 0}, {"transBatchB", 0}},
                  {{"alpha", alpha}}, {{{"T", kFloat16}}}, 1);
    matrix_ = {static_cast<int>(integer(info, "N", 0)), static_cast<int>(integer(info, "K", 0)), 16, is_gated(of)};
    prepare(transposed_ && alpha == 1 && matrix_.small());
  }

 private:
  std::int64_t outputs_of(Handle context) const override { return shape_of(input(context, 1)).at(transposed_ ? 0 : 1); }

  bool transposed_ = false;
};

}  // namespace

const CustomOp& products_operation() {
  // Rows, weights, scales, and what a bundle's matrices don't have: zero points, places, a bias.
  static const Operation made =
      operation_of<IntegerProduct>({"MatMulNBits", {kFloat16, kUint8, kFloat16, kUint8, kInt32, kFloat16}, 3});
  return made;
}

const CustomOp& gated_products_operation() {
  static const Operation made = operation_of<IntegerProduct>({"GatedMatMulNBits", {kFloat16, kUint8, kFloat16}, 3});
  return made;
}

const CustomOp& half_products_operation() {
  static const Operation made = operation_of<HalfProduct>({"SmallFusedMatMul", {kFloat16, kFloat16}, 2});
  return made;
}

const CustomOp& gated_half_products_operation() {
  static const Operation made = operation_of<HalfProduct>({"GatedFusedMatMul", {kFloat16, kFloat16}, 2});
  return made;
}

}  // namespace mirror_gpu
