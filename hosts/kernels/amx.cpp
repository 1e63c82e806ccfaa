// A pass on CPUs with 8-bit matrix units (AMX); what is no product goes by AVX-512.
#include "avx512_floats.inl"
#include "draft.hpp"
#include "kernels.hpp"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using mirror_kernels::Matrix;
using mirror_kernels::tile_columns;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold totals, 4 and 5 rows of inputs, 6 and 7 weights: 16 rows of 64 bytes each.
void begin_thread() {
  TileShapes shapes;
  for (int i = 0; i < 8; i++) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  _tile_loadconfig(&shapes);
}

void end_thread() { _tile_release(); }

void put(const int32_t* totals, int rows, const Matrix& matrix, int tile, const float* row_scales, float* out,
         int64_t out_stride, bool add) {
  const int column = tile * tile_columns;
  const __m512i offsets = _mm512_loadu_si512(matrix.offsets + column);
  const __m512 scales = _mm512_loadu_ps(matrix.scales + column);
  const __m512 bias = matrix.bias ? _mm512_loadu_ps(matrix.bias + column) : _mm512_setzero_ps();
  for (int row = 0; row < rows; row++) {
    float* target = out + row * out_stride;
    const __m512 number = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(totals + row * 16), offsets));
    __m512 result = _mm512_fmadd_ps(_mm512_mul_ps(number, scales), _mm512_set1_ps(row_scales[row]), bias);
    if (add) result = _mm512_add_ps(result, _mm512_loadu_ps(target));
    _mm512_storeu_ps(target, result);
  }
}

// Up to 32 rows times two tiles, or one.
template <bool two_rows, bool two_tiles>
void multiply_block(const uint8_t* a, int stride, int rows, const Matrix& matrix, int tile, const float* row_scales,
                    float* out, int64_t out_stride, bool add) {
  const int size = matrix.row_bytes();
  const int8_t *first = matrix.tile(tile), *second = matrix.tile(two_tiles ? tile + 1 : tile);
  _tile_zero(0);
  if constexpr (two_tiles) _tile_zero(1);
  if constexpr (two_rows) _tile_zero(2);
  if constexpr (two_rows && two_tiles) _tile_zero(3);
  for (int k = 0; k < size; k += 64) {
    _tile_loadd(4, a + k, stride);
    _tile_loadd(6, first + k * tile_columns, 64);
    _tile_dpbusd(0, 4, 6);
    if constexpr (two_tiles) {
      _tile_loadd(7, second + k * tile_columns, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (two_rows) {
      _tile_loadd(5, a + 16 * static_cast<int64_t>(stride) + k, stride);
      _tile_dpbusd(2, 5, 6);
      if constexpr (two_tiles) _tile_dpbusd(3, 5, 7);
    }
  }
  alignas(64) int32_t totals[256];
  const int upper = rows < 16 ? rows : 16;
  _tile_stored(0, totals, 64);
  put(totals, upper, matrix, tile, row_scales, out, out_stride, add);
  if constexpr (two_tiles) {
    _tile_stored(1, totals, 64);
    put(totals, upper, matrix, tile + 1, row_scales, out + tile_columns, out_stride, add);
  }
  if constexpr (two_rows) {
    _tile_stored(2, totals, 64);
    put(totals, rows - 16, matrix, tile, row_scales + 16, out + 16 * out_stride, out_stride, add);
    if constexpr (two_tiles) {
      _tile_stored(3, totals, 64);
      put(totals, rows - 16, matrix, tile + 1, row_scales + 16, out + 16 * out_stride + tile_columns, out_stride, add);
    }
  }
}

// Rounded rows times some tiles of a matrix, into (or added to) out [rows, out_stride], whose first column is the
// first tile's. Reads whole tiles of 16 rows; what lies past the last row counts for nothing.
void multiply(const uint8_t* a, int stride, int rows, const Matrix& matrix, int tile, int tiles,
              const float* row_scales, float* out, int64_t out_stride, bool add) {
  for (int i = 0; i < tiles; i += 2) {
    const bool two_tiles = i + 1 < tiles;
    for (int done = 0; done < rows; done += 32) {
      const int count = rows - done < 32 ? rows - done : 32;
      const uint8_t* some = a + static_cast<int64_t>(done) * stride;
      float* target = out + done * out_stride + i * tile_columns;
      if (count > 16 && two_tiles)
        multiply_block<true, true>(some, stride, count, matrix, tile + i, row_scales + done, target, out_stride, add);
      else if (count > 16)
        multiply_block<true, false>(some, stride, count, matrix, tile + i, row_scales + done, target, out_stride, add);
      else if (two_tiles)
        multiply_block<false, true>(some, stride, count, matrix, tile + i, row_scales + done, target, out_stride, add);
      else
        multiply_block<false, false>(some, stride, count, matrix, tile + i, row_scales + done, target, out_stride, add);
    }
  }
}

}  // namespace

#include "steps.inl"

namespace mirror_kernels {

RunPass amx_pass() { return run_pass; }

bool use_matrix_units() {
#if defined(__linux__)
  constexpr int ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace mirror_kernels
