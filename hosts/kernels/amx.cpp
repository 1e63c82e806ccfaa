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
using mirror_kernels::up_to;

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
// first tile's. Reads whole tiles of 16 rows; what lies past the last row counts for nothing. Rows have one scale here.
void multiply(const mirror_kernels::Work& work, int row, int rows, const Matrix& matrix, int tile, int tiles,
              float* out, int64_t out_stride, bool add) {
  const int stride = work.rounded_stride;
  const uint8_t* a = work.rounded + static_cast<int64_t>(row) * stride;
  const float* row_scales = work.row_scales + row;
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

// --- attention, in bfloat16 ------------------------------------------------------------------------------------------
//
// Keys lie in blocks of 16 slots, [wide / 2, 16, 2], with `wide` the head's size rounded up to 32: tiles of 32 numbers
// of 16 slots. Values lie in blocks of 32 slots, [size / 16, 16, 16, 2]: tiles of 32 slots by 16 numbers, slots in
// pairs. A block takes no more room than its numbers in 32 bits would.

constexpr int attention_rows = 16;

int wide_head(int size) { return up_to(size, 32); }

uint16_t* key_block(float* keys, int block, int size) {
  return reinterpret_cast<uint16_t*>(keys) + static_cast<int64_t>(block) * 16 * wide_head(size);
}

// The tile of 16 numbers, from `first` on, of the 32 slots that one belongs to.
uint16_t* value_tile(float* values, int slot, int size, int first) {
  return reinterpret_cast<uint16_t*>(values) + (static_cast<int64_t>(slot / 32) * (size / 16) + first / 16) * 512;
}

// 16 numbers in 16 bits each, rounded to nearest.
__m256i rounded_halves(__m512 numbers) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers)); }

void put_key(float* keys, int slot, int size, const float* key) {
  uint16_t* block = key_block(keys, slot / 16, size);
  alignas(32) uint16_t halves[16];
  for (int i = 0; i < size; i += 16) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(halves), rounded_halves(_mm512_loadu_ps(key + i)));
    for (int j = 0; j < 16; j += 2) __builtin_memcpy(block + ((i + j) / 2 * 16 + slot % 16) * 2, halves + j, 4);
  }
}

void put_value(float* values, int slot, int size, const float* value) {
  alignas(32) uint16_t halves[16];
  for (int i = 0; i < size; i += 16) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(halves), rounded_halves(_mm512_loadu_ps(value + i)));
    uint16_t* tile = value_tile(values, slot, size, i) + slot % 32 / 2 * 32 + slot % 2;
    for (int j = 0; j < 16; j++) tile[j * 2] = halves[j];
  }
}

float own_score(const float* query, int size, const float* keys, int slot) {
  const uint16_t* block = key_block(const_cast<float*>(keys), slot / 16, size) + slot % 16 * 2;
  const __m512i places =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  __m512 totals = _mm512_setzero_ps();
  for (int i = 0; i < size; i += 32) {
    const __m512i pairs = _mm512_i32gather_epi32(places, block + i * 16, 4);  // numbers i, i + 1, ..
    const bool both = i + 16 < size;
    const __m512 high = both ? _mm512_loadu_ps(query + i + 16) : _mm512_setzero_ps();
    const __m512bh mine = _mm512_cvtne2ps_pbh(high, _mm512_loadu_ps(query + i));
    totals = _mm512_dpbf16_ps(totals, mine, reinterpret_cast<__m512bh>(pairs));
  }
  return _mm512_reduce_add_ps(totals);
}

void add_own_value(float weight, const float* values, int slot, int size, float* mixed) {
  for (int i = 0; i < size; i += 16) {
    const uint16_t* tile = value_tile(const_cast<float*>(values), slot, size, i) + slot % 32 / 2 * 32;
    const __m512i pairs = _mm512_loadu_si512(tile);
    const __m512i bits = slot % 2 ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                  : _mm512_slli_epi32(pairs, 16);
    const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(weight), _mm512_castsi512_ps(bits), _mm512_loadu_ps(mixed + i));
    _mm512_storeu_ps(mixed + i, sum);
  }
}

// Up to 16 queries with all keys of some blocks, to scores [count, stride]; rows past the last count for nothing.
void score_all(int count, const float* queries, int size, const float* keys, int blocks, float* scores, int64_t stride,
               float* rest) {
  const int wide = wide_head(size);
  uint16_t* rounded = reinterpret_cast<uint16_t*>(rest);  // [16, wide]
  for (int row = 0; row < count; row++)
    for (int i = 0; i < wide; i += 16) {
      const __m512 part = i < size ? _mm512_loadu_ps(queries + row * size + i) : _mm512_setzero_ps();
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + row * wide + i), rounded_halves(part));
    }
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(float));
  for (int block = 0; block < blocks; block++) {
    const uint16_t* key = key_block(const_cast<float*>(keys), block, size);
    _tile_zero(0);
    for (int i = 0; i < wide; i += 32) {
      _tile_loadd(4, rounded + i, wide * 2);
      _tile_loadd(6, key + i * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, scores + block * 16, row_bytes);
  }
}

// Values weighed by each row's weights [count, stride], to mixed [count, size].
void mix_all(int count, const float* weights, int64_t stride, const float* values, int slots, int size, float* mixed,
             float* rest) {
  const int wide = up_to(slots, 32), step = wide + 32;    // rows a power of two apart share a few places of a cache
  uint16_t* rounded = reinterpret_cast<uint16_t*>(rest);  // [16, step]
  for (int row = 0; row < count; row++)
    for (int slot = 0; slot < wide; slot += 16) {
      // The last block of 16 may have been scored alone.
      const __m512 part = slot < slots ? _mm512_loadu_ps(weights + row * stride + slot) : _mm512_setzero_ps();
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + static_cast<int64_t>(row) * step + slot),
                          rounded_halves(part));
    }
  for (int from = 0; from < size; from += 64) {
    const int tiles = size - from < 64 ? (size - from) / 16 : 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int slot = 0; slot < slots; slot += 32) {
      const uint16_t* tile = value_tile(const_cast<float*>(values), slot, size, from);
      _tile_loadd(4, rounded + slot, step * 2);
      _tile_loadd(6, tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (tiles > 1) {
        _tile_loadd(7, tile + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (tiles > 2) {
        _tile_loadd(6, tile + 1024, 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (tiles > 3) {
        _tile_loadd(7, tile + 1536, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    const int row_bytes = size * static_cast<int>(sizeof(float));
    _tile_stored(0, mixed + from, row_bytes);
    if (tiles > 1) _tile_stored(1, mixed + from + 16, row_bytes);
    if (tiles > 2) _tile_stored(2, mixed + from + 32, row_bytes);
    if (tiles > 3) _tile_stored(3, mixed + from + 48, row_bytes);
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
