#include "cuts.hpp"

#include <algorithm>

#include "embedded.hpp"

MIRROR_EMBEDDED(mirror_products_source, "products.cu");
MIRROR_EMBEDDED(mirror_streamed_source, "streamed.cu");

namespace mirror_gpu {
namespace {

std::vector<std::string> numbers_of(const Matrix& matrix, int row_tiles, int parts) {
  return {define("BITS", matrix.bits),       define("ROW_TILES", row_tiles),           define("PARTS", parts),
          define("OUTPUTS", matrix.outputs), define("BLOCKS", matrix.inputs / kBlock), define("GATED", matrix.gated)};
}

// A thread block has some outputs: see products.cu.
class BlockCut : public Cut {
 public:
  // Few outputs and the whole input, or many and, if that leaves multiprocessors idle, a part of the input: two thread
  // blocks for each of them if there are enough steps, and rows that fit its shared memory.
  BlockCut(const Matrix& matrix, const Gpu& gpu) : matrix_(matrix), steps_(divided_up(matrix.inputs / kBlock, 4)) {
    name = "products";
    source = mirror_products_source;
    if (matrix.small()) {
      across_ = matrix.gated ? 2 : 1;
      along_ = std::min(steps_, kMostThreads / 32 / across_);
    } else {
      tiles_ = across_ = 2;
      along_ = std::min(steps_, 8);
    }
    blocks = divided_up(matrix.outputs, outputs());
    threads = 32 * across_ * along_;
    if (!matrix.small()) {
      const int for_memory = divided_up(steps_, gpu.shared_of_block / (kWindowRows / 8) / kStepBytes);
      const int for_all = std::min(2 * gpu.multiprocessors / blocks, steps_ / along_);
      parts = std::max({1, for_memory, for_all});
    }
    // ONNX Runtime's kernel for one row by a large matrix of integers is as fast. For many rows it unpacks a matrix of
    // integers, each time; cuBLAS, which it asks for float16, has kernels for many rows that lose nothing to ours.
    fewest_rows = matrix.small() ? 1 : 2;
    const bool in_fours = shared_bytes(4) <= gpu.shared_of_block;
    if (in_fours) group_tiles = 4;
    most_rows = !in_fours ? kWindowRows : !matrix.small() ? 32 : matrix.bits < 16 ? 64 : kWindowRows;
  }

  int shared_bytes(int row_tiles) const override {
    const int rows = matrix_.small() ? 0 : divided_up(steps_, parts) * row_tiles * kStepBytes;
    return std::max(rows, along_ * row_tiles * 8 * outputs() * 4);
  }

  std::vector<std::string> numbers(int row_tiles) const override {
    std::vector<std::string> all = numbers_of(matrix_, row_tiles, parts);
    const int together = matrix_.small() && row_tiles == 1 ? 2 : 1;
    all.insert(all.end(), {define("TILES", tiles_), define("STAGED", !matrix_.small()), define("ACROSS", across_),
                           define("ALONG", along_), define("AHEAD", 1), define("MIN_BLOCKS", together)});
    return all;
  }

  std::size_t sums(int row_tiles) const override {
    return static_cast<std::size_t>(parts) * static_cast<std::size_t>(row_tiles * 8) *
           static_cast<std::size_t>(matrix_.outputs);
  }
  std::size_t tickets() const override { return static_cast<std::size_t>(blocks); }

 private:
  static constexpr int kMostThreads = 512;  // whose registers a multiprocessor has
  static constexpr int kStepBytes = 2048;   // of shared memory, for eight rows

  int outputs() const { return 16 * tiles_ * across_; }

  Matrix matrix_;
  int steps_, tiles_ = 1, across_ = 1, along_ = 1;
};

// A multiprocessor reads a stretch of the matrix: see streamed.cu.
class StreamCut : public Cut {
 public:
  StreamCut(const Matrix& matrix, const Gpu& gpu)
      : matrix_(matrix), memory_(gpu.shared_of_block), steps_(matrix.inputs / kBlock / kStepBlocks) {
    name = "streamed";
    source = mirror_streamed_source;
    threads = 32 * kWarps;
    most_rows = 2 * kWindowRows;
    // As few parts as leave room for a window's rows and three steps of the matrix.
    while (parts < steps_ && bytes(kWindowRows / 8, 3) > memory_) ++parts;
    blocks = std::max(1, gpu.multiprocessors / parts);
  }

  // Whether a GPU has the memory for it, and a matrix is one of those that it is for.
  bool fits() const {
    return matrix_.bits < 16 && steps_ * kStepBlocks * kBlock == matrix_.inputs && parts <= 8 &&
           bytes(kWindowRows / 8, 3) <= memory_;
  }

  int shared_bytes(int row_tiles) const override { return bytes(row_tiles, ahead(row_tiles)) - begun_bytes(row_tiles); }

  std::vector<std::string> numbers(int row_tiles) const override {
    std::vector<std::string> all = numbers_of(matrix_, row_tiles, parts);
    all.insert(all.end(), {define("WARPS", kWarps), define("AHEAD", ahead(row_tiles))});
    return all;
  }

  std::size_t sums(int row_tiles) const override {
    return tickets() * static_cast<std::size_t>(parts * row_tiles * 32 * 4);
  }
  std::size_t tickets() const override {
    return static_cast<std::size_t>(matrix_.gated ? divided_up(matrix_.outputs / 2, 8)
                                                  : divided_up(matrix_.outputs, 16));
  }

 private:
  static constexpr int kWarps = 8, kStepBlocks = 8;

  // Of shared memory, that the kernel has by itself and that it is given.
  static int begun_bytes(int row_tiles) { return kWarps * row_tiles * 512; }
  int bytes(int row_tiles, int ahead) const {
    const int of_stage = 16 * kStepBlocks * (4 * matrix_.bits + 2);
    const int of_rows = divided_up(steps_, parts) * row_tiles * kStepBlocks * 512;
    return begun_bytes(row_tiles) + kWarps * ahead * of_stage + of_rows;
  }
  int ahead(int row_tiles) const { return bytes(row_tiles, 4) <= memory_ ? 4 : 3; }

  Matrix matrix_;
  int memory_, steps_;
};

}  // namespace

std::unique_ptr<const Cut> cut_of(const Matrix& matrix, const Gpu& gpu) {
  if (!matrix.small()) {
    auto streamed = std::make_unique<const StreamCut>(matrix, gpu);
    if (streamed->fits()) return streamed;
  }
  return std::make_unique<const BlockCut>(matrix, gpu);
}

}  // namespace mirror_gpu
