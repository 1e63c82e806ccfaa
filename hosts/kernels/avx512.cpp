// A pass on CPUs with AVX-512 and its 8-bit dot products (VNNI).
#include "avx512_floats.inl"
#include "draft.hpp"
#include "kernels.hpp"

namespace {

using mirror_kernels::Matrix;
using mirror_kernels::tile_columns;

// totals += four products of 8 bits for each column, in place: through the intrinsic GCC 12 moves each total to another
// register and back, which takes twice the time.
inline void add_products(__m512i& totals, __m512i inputs, __m512i weights) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(totals) : "v"(inputs), "v"(weights));
#else
  totals = _mm512_dpbusd_epi32(totals, inputs, weights);
#endif
}

template <int rows, int tiles>
void multiply_block(const uint8_t* a, int stride, const Matrix& matrix, int tile, const float* row_scales, float* out,
                    int64_t out_stride, bool add) {
  __m512i totals[rows][tiles];
  MIRROR_UNROLL
  for (int row = 0; row < rows; row++) MIRROR_UNROLL
  for (int i = 0; i < tiles; i++) totals[row][i] = _mm512_setzero_si512();
  const int size = matrix.row_bytes();
  const int8_t* weights = matrix.tile(tile);
  const int64_t tile_bytes = static_cast<int64_t>(size) * tile_columns;
  for (int k = 0; k < size; k += 4) {
    __m512i part[tiles];
    MIRROR_UNROLL
    for (int i = 0; i < tiles; i++) part[i] = _mm512_load_si512(weights + i * tile_bytes + k * tile_columns);
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) {
      int32_t four;
      __builtin_memcpy(&four, a + row * stride + k, 4);
      const __m512i inputs = _mm512_set1_epi32(four);
      MIRROR_UNROLL
      for (int i = 0; i < tiles; i++) add_products(totals[row][i], inputs, part[i]);
    }
  }
  MIRROR_UNROLL
  for (int i = 0; i < tiles; i++) {
    const int column = (tile + i) * tile_columns;
    const __m512i offsets = _mm512_loadu_si512(matrix.offsets + column);
    const __m512 scales = _mm512_loadu_ps(matrix.scales + column);
    const __m512 bias = matrix.bias ? _mm512_loadu_ps(matrix.bias + column) : _mm512_setzero_ps();
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) {
      float* target = out + row * out_stride + i * tile_columns;
      const __m512 number = _mm512_cvtepi32_ps(_mm512_sub_epi32(totals[row][i], offsets));
      __m512 result = _mm512_fmadd_ps(_mm512_mul_ps(number, scales), _mm512_set1_ps(row_scales[row]), bias);
      if (add) result = _mm512_add_ps(result, _mm512_loadu_ps(target));
      _mm512_storeu_ps(target, result);
    }
  }
}

template <int rows, int tiles>
void multiply_rows(int count, const uint8_t* a, int stride, const Matrix& matrix, int tile, const float* row_scales,
                   float* out, int64_t out_stride, bool add) {
  if (count == rows) return multiply_block<rows, tiles>(a, stride, matrix, tile, row_scales, out, out_stride, add);
  if constexpr (rows > 1)
    multiply_rows<rows - 1, tiles>(count, a, stride, matrix, tile, row_scales, out, out_stride, add);
}

// Rounded rows times some tiles of a matrix, into (or added to) out [rows, out_stride], whose first column is the
// first tile's.
void multiply(const uint8_t* a, int stride, int rows, const Matrix& matrix, int tile, int tiles,
              const float* row_scales, float* out, int64_t out_stride, bool add) {
  for (int done_tiles = 0; done_tiles < tiles;) {
    const int left = tiles - done_tiles, some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    float* columns = out + done_tiles * tile_columns;
    // The rows in even parts: of 8, two of 4 rather than 6 and 2.
    const int most = some == 4 ? 6 : 12, parts = (rows + most - 1) / most;
    for (int part = 0, done = 0; part < parts; part++) {
      const int count = (rows - done + parts - part - 1) / (parts - part);
      const uint8_t* some_rows = a + static_cast<int64_t>(done) * stride;
      float* target = columns + done * out_stride;
      if (some == 4)
        multiply_rows<6, 4>(count, some_rows, stride, matrix, tile + done_tiles, row_scales + done, target, out_stride,
                            add);
      else if (some == 2)
        multiply_rows<12, 2>(count, some_rows, stride, matrix, tile + done_tiles, row_scales + done, target, out_stride,
                             add);
      else
        multiply_rows<12, 1>(count, some_rows, stride, matrix, tile + done_tiles, row_scales + done, target, out_stride,
                             add);
      done += count;
    }
    done_tiles += some;
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
