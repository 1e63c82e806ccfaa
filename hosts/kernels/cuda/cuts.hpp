// How a product with a matrix is cut into thread blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "driver.hpp"

namespace mirror_gpu {

constexpr int kBlock = 32;       // integers that share a scale
constexpr int kWindowRows = 16;  // what a pass of the target has at most; more are multiplied in groups

struct Matrix {
  int outputs, inputs, bits;
  bool gated = false;  // whether its outputs' first half is a gate of the second

  // Matrices of up to so many numbers are small: a thread block has few outputs of one, so that there are enough.
  bool small() const { return static_cast<std::int64_t>(outputs) * inputs <= 1 << 23; }
};

// It depends on matrix and GPU alone, since each cut rounds otherwise; but for how many rows a thread block has.
class Cut {
 public:
  virtual ~Cut() = default;

  const char* name = "";    // of the kernel
  const char* source = "";  // behind gated.cu
  int blocks = 0, parts = 1, threads = 0;
  int fewest_rows = 1, most_rows = 0;  // that it is for, found by trying on an H200 (docs/log.md)
  int group_tiles = kWindowRows / 8;   // of eight rows, in a group of many

  // How many tiles of eight rows a thread block has.
  int row_tiles(int rows) const { return rows <= 8 ? 1 : rows <= kWindowRows ? 2 : group_tiles; }
  int groups(int rows) const { return divided_up(rows, row_tiles(rows) * 8); }

  virtual int shared_bytes(int row_tiles) const = 0;
  virtual std::vector<std::string> numbers(int row_tiles) const = 0;
  // Of a group, where there are parts: float32 numbers that they come to, and tickets.
  virtual std::size_t sums(int row_tiles) const = 0;
  virtual std::size_t tickets() const = 0;
};

std::unique_ptr<const Cut> cut_of(const Matrix& matrix, const Gpu& gpu);

}  // namespace mirror_gpu
