// A pass on CPUs with AVX-512 and its 8-bit dot products (VNNI).
#include "avx512_floats.inl"
#include "draft.hpp"
#include "kernels.hpp"

namespace {

using mirror_kernels::Matrix;
using mirror_kernels::padded_inputs;
using mirror_kernels::tile_columns;

// totals += four products of 8 bits for each column, in place: through the intrinsic GCC 12 moves each total to another
// register and back, which takes twice the time.
inline void add_operators(__m512i& totals, __m512i inputs, __m512i weights) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(totals) : "v"(inputs), "v"(weights));
#else
  totals = _mm512_dpbusd_epi32(totals, inputs, weights);
#endif
}

// What some tiles of a matrix are multiplied with: rows of rounded inputs, and their scales.
struct Inputs {
  const uint8_t* rounded;
  const float* scales;
  int stride, scale_stride;

  MIRROR_INLINE Inputs from(int row) const {
    return {rounded + static_cast<int64_t>(row) * stride, scales + static_cast<int64_t>(row) * scale_stride, stride,
            scale_stride};
  }
};

// Where results go: out [rows, stride], whose first column is the first tile's.
struct Results {
  float* out;
  int64_t stride;
  bool add;
};

// With `fine`, the sums of 64 products each are scaled before they are added up.
template <int rows, int tiles, bool fine>
void multiply_block(const Inputs& inputs, const Matrix& matrix, int tile, const Results& results) {
  const int size = matrix.row_bytes(), block = fine ? padded_inputs : size;
  const int8_t* weights = matrix.tile(tile);
  const int64_t tile_bytes = static_cast<int64_t>(size) * tile_columns;
  const int tile_blocks = size / padded_inputs;
  __m512i totals[rows][tiles];
  __m512 sums[rows][tiles];
  if constexpr (fine) {
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) MIRROR_UNROLL
    for (int i = 0; i < tiles; i++) sums[row][i] = _mm512_setzero_ps();
  }
  for (int first = 0, number = 0; first < size; first += block, number++) {
    MIRROR_UNROLL
    for (int i = 0; i < tiles; i++) {
      const __m512i offsets =
          fine ? _mm512_load_si512(matrix.block_offsets + ((tile + i) * tile_blocks + number) * tile_columns)
               : _mm512_loadu_si512(matrix.offsets + (tile + i) * tile_columns);
      MIRROR_UNROLL
      for (int row = 0; row < rows; row++) totals[row][i] = _mm512_sub_epi32(_mm512_setzero_si512(), offsets);
    }
    for (int k = first; k < first + block; k += 4) {
      __m512i part[tiles];
      MIRROR_UNROLL
      for (int i = 0; i < tiles; i++) part[i] = _mm512_load_si512(weights + i * tile_bytes + k * tile_columns);
      MIRROR_UNROLL
      for (int row = 0; row < rows; row++) {
        int32_t four;
        __builtin_memcpy(&four, inputs.rounded + row * inputs.stride + k, 4);
        const __m512i given = _mm512_set1_epi32(four);
        MIRROR_UNROLL
        for (int i = 0; i < tiles; i++) add_operators(totals[row][i], given, part[i]);
      }
    }
    if constexpr (fine) {
      MIRROR_UNROLL
      for (int row = 0; row < rows; row++) {
        const __m512 scale = _mm512_set1_ps(inputs.scales[row * inputs.scale_stride + number]);
        MIRROR_UNROLL
        for (int i = 0; i < tiles; i++)
          sums[row][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(totals[row][i]), scale, sums[row][i]);
      }
    }
  }
  MIRROR_UNROLL
  for (int i = 0; i < tiles; i++) {
    const int column = (tile + i) * tile_columns;
    const __m512 scales = _mm512_loadu_ps(matrix.scales + column);
    const __m512 bias = matrix.bias ? _mm512_loadu_ps(matrix.bias + column) : _mm512_setzero_ps();
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) {
      float* target = results.out + row * results.stride + i * tile_columns;
      __m512 sum;
      if constexpr (fine)
        sum = sums[row][i];
      else
        sum =
            _mm512_mul_ps(_mm512_cvtepi32_ps(totals[row][i]), _mm512_set1_ps(inputs.scales[row * inputs.scale_stride]));
      __m512 result = _mm512_fmadd_ps(sum, scales, bias);
      if (results.add) result = _mm512_add_ps(result, _mm512_loadu_ps(target));
      _mm512_storeu_ps(target, result);
    }
  }
}

template <int rows, int tiles, bool fine>
void multiply_rows(int count, const Inputs& inputs, const Matrix& matrix, int tile, const Results& results) {
  if (count == rows) return multiply_block<rows, tiles, fine>(inputs, matrix, tile, results);
  if constexpr (rows > 1) multiply_rows<rows - 1, tiles, fine>(count, inputs, matrix, tile, results);
}

// Some rows times as many tiles as one block takes, in even parts: of 8 rows, two of 4 rather than 6 and 2.
template <int most, int tiles, bool fine>
void multiply_tiles(const Inputs& inputs, int rows, const Matrix& matrix, int tile, const Results& results) {
  const int parts = (rows + most - 1) / most;
  for (int part = 0, done = 0; part < parts; part++) {
    const int count = (rows - done + parts - part - 1) / (parts - part);
    multiply_rows<most, tiles, fine>(count, inputs.from(done), matrix, tile,
                                     {results.out + done * results.stride, results.stride, results.add});
    done += count;
  }
}

// Rounded rows times some tiles of a matrix, into (or added to) out [rows, out_stride], whose first column is the
// first tile's.
void multiply(const mirror_kernels::Work& work, int row, int rows, const Matrix& matrix, int tile, int tiles,
              float* out, int64_t out_stride, bool add) {
  const Inputs inputs = Inputs{work.rounded, work.row_scales, work.rounded_stride, work.scale_stride}.from(row);
  const bool fine = matrix.block_offsets != nullptr;
  for (int done = 0; done < tiles;) {
    const int left = tiles - done, some = left >= 4 && !fine ? 4 : left >= 2 ? 2 : 1;
    const Results results{out + done * tile_columns, out_stride, add};
    if (some == 4)
      multiply_tiles<6, 4, false>(inputs, rows, matrix, tile + done, results);
    else if (some == 2)
      fine ? multiply_tiles<6, 2, true>(inputs, rows, matrix, tile + done, results)
           : multiply_tiles<12, 2, false>(inputs, rows, matrix, tile + done, results);
    else
      fine ? multiply_tiles<6, 1, true>(inputs, rows, matrix, tile + done, results)
           : multiply_tiles<12, 1, false>(inputs, rows, matrix, tile + done, results);
    done += some;
  }
}

constexpr int attention_rows = 6, attention_blocks = 2, mixed_tiles = 4;

void begin_thread() {}
void end_thread() {}

}  // namespace

#include "float_attention.inl"

// Behind it, what uses it.
#include "steps.inl"

namespace mirror_kernels {

RunPass avx512_pass() { return run_pass; }

}  // namespace mirror_kernels
