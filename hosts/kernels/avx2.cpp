// A pass on CPUs with AVX2 and 8-bit dot products (AVX-VNNI): those of most PCs.
#include <immintrin.h>

#include "draft.hpp"
#include "kernels.hpp"

namespace {

using mirror_kernels::Matrix;
using mirror_kernels::padded_inputs;
using mirror_kernels::tile_columns;

struct F16 {
  __m256 low, high;
};

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
inline F16 set(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F16 plus(F16 a, F16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F16 minus(F16 a, F16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F16 times(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F16 over(F16 a, F16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F16 most(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F16 least(F16 a, F16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F16 magnitude(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline float sum(F16 a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(F16 a) {
  const __m256 eight = _mm256_max_ps(a.low, a.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float first_of(F16 a) { return _mm256_cvtss_f32(a.low); }

// a where `of` is above a bar, else nothing.
inline F16 kept_if_above(F16 a, F16 of, float bar) {
  const __m256 limit = _mm256_set1_ps(bar);
  return {_mm256_and_ps(a.low, _mm256_cmp_ps(of.low, limit, _CMP_GT_OQ)),
          _mm256_and_ps(a.high, _mm256_cmp_ps(of.high, limit, _CMP_GT_OQ))};
}

inline uint32_t above_bar(F16 a, float bar) {
  const __m256 limit = _mm256_set1_ps(bar);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, limit, _CMP_GT_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, limit, _CMP_GT_OQ));
  return static_cast<uint32_t>(low | high << 8);
}

// 2 to the power of a: a polynomial for the part after the point, to 2e-7.
inline __m256 exp2_of(__m256 a) {
  const __m256 whole = _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 part = _mm256_sub_ps(a, whole);
  __m256 result = _mm256_set1_ps(1.5403530e-4f);
  result = _mm256_fmadd_ps(result, part, _mm256_set1_ps(1.3333558e-3f));
  result = _mm256_fmadd_ps(result, part, _mm256_set1_ps(9.6181291e-3f));
  result = _mm256_fmadd_ps(result, part, _mm256_set1_ps(5.5504109e-2f));
  result = _mm256_fmadd_ps(result, part, _mm256_set1_ps(2.4022651e-1f));
  result = _mm256_fmadd_ps(result, part, _mm256_set1_ps(6.9314718e-1f));
  result = _mm256_fmadd_ps(result, part, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(result, _mm256_castsi256_ps(exponent));
}

inline F16 exp2_of(F16 a) { return {exp2_of(a.low), exp2_of(a.high)}; }

inline void store_rounded(uint8_t* p, F16 a) {
  const __m256i shift = _mm256_set1_epi32(128);
  const __m256i low = _mm256_add_epi32(_mm256_cvtps_epi32(a.low), shift);
  const __m256i high = _mm256_add_epi32(_mm256_cvtps_epi32(a.high), shift);
  // Packing goes by halves of 128 bits; the middle two are turned back.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

constexpr int attention_rows = 3, attention_blocks = 2, mixed_tiles = 2;

// totals += four products of 8 bits for each column, in place; see avx512.cpp.
inline void add_operators(__m256i& totals, __m256i inputs, __m256i weights) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(totals) : "x"(inputs), "x"(weights));
#else
  totals = _mm256_dpbusd_avx_epi32(totals, inputs, weights);
#endif
}

// A tile's sums of products of some rows' inputs from `first` to `end`, less the offsets.
template <int rows>
MIRROR_INLINE void add_up(__m256i (&totals)[rows][2], const uint8_t* a, int stride, const int8_t* weights,
                          const int32_t* offsets, int first, int end) {
  const __m256i* less = reinterpret_cast<const __m256i*>(offsets);
  MIRROR_UNROLL
  for (int row = 0; row < rows; row++) {
    totals[row][0] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_loadu_si256(less));
    totals[row][1] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_loadu_si256(less + 1));
  }
  for (int k = first; k < end; k += 4) {
    const __m256i* part = reinterpret_cast<const __m256i*>(weights + k * tile_columns);
    const __m256i low = _mm256_load_si256(part), high = _mm256_load_si256(part + 1);
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) {
      int32_t four;
      __builtin_memcpy(&four, a + row * stride + k, 4);
      const __m256i inputs = _mm256_set1_epi32(four);
      add_operators(totals[row][0], inputs, low);
      add_operators(totals[row][1], inputs, high);
    }
  }
}

// With `fine`, the sums of 64 products each are scaled before they are added up.
template <int rows, bool fine>
void multiply_block(const uint8_t* a, int stride, const float* row_scales, int scale_stride, const Matrix& matrix,
                    int tile, float* out, int64_t out_stride, bool add) {
  const int size = matrix.row_bytes(), blocks = fine ? size / padded_inputs : 1, block = size / blocks;
  __m256 sums[rows][2];
  MIRROR_UNROLL
  for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm256_setzero_ps();
  for (int number = 0; number < blocks; number++) {
    __m256i totals[rows][2];
    const int32_t* offsets =
        fine ? matrix.block_offsets + (tile * blocks + number) * tile_columns : matrix.offsets + tile * tile_columns;
    add_up(totals, a, stride, matrix.tile(tile), offsets, number * block, (number + 1) * block);
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) {
      const __m256 scale = _mm256_set1_ps(row_scales[row * scale_stride + number]);
      sums[row][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(totals[row][0]), scale, sums[row][0]);
      sums[row][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(totals[row][1]), scale, sums[row][1]);
    }
  }
  MIRROR_UNROLL
  for (int half = 0; half < 2; half++) {
    const int column = tile * tile_columns + half * 8;
    const __m256 scales = _mm256_loadu_ps(matrix.scales + column);
    const __m256 bias = matrix.bias ? _mm256_loadu_ps(matrix.bias + column) : _mm256_setzero_ps();
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) {
      float* target = out + row * out_stride + half * 8;
      __m256 result = _mm256_fmadd_ps(sums[row][half], scales, bias);
      if (add) result = _mm256_add_ps(result, _mm256_loadu_ps(target));
      _mm256_storeu_ps(target, result);
    }
  }
}

template <int rows, bool fine>
void multiply_rows(int count, const uint8_t* a, int stride, const float* row_scales, int scale_stride,
                   const Matrix& matrix, int tile, float* out, int64_t out_stride, bool add) {
  if (count == rows)
    return multiply_block<rows, fine>(a, stride, row_scales, scale_stride, matrix, tile, out, out_stride, add);
  if constexpr (rows > 1)
    multiply_rows<rows - 1, fine>(count, a, stride, row_scales, scale_stride, matrix, tile, out, out_stride, add);
}

// Rounded rows times some tiles of a matrix, into (or added to) out [rows, out_stride], whose first column is the
// first tile's.
void multiply(const mirror_kernels::Work& work, int row, int rows, const Matrix& matrix, int tile, int tiles,
              float* out, int64_t out_stride, bool add) {
  const bool fine = matrix.block_offsets != nullptr;
  const int most = fine ? 3 : 6, parts = (rows + most - 1) / most;
  for (int i = 0; i < tiles; i++) {
    for (int part = 0, done = 0; part < parts; part++) {
      const int count = (rows - done + parts - part - 1) / (parts - part);
      const uint8_t* a = work.rounded + static_cast<int64_t>(row + done) * work.rounded_stride;
      const float* scales = work.row_scales + static_cast<int64_t>(row + done) * work.scale_stride;
      float* target = out + done * out_stride + i * tile_columns;
      if (fine)
        multiply_rows<3, true>(count, a, work.rounded_stride, scales, work.scale_stride, matrix, tile + i, target,
                               out_stride, add);
      else
        multiply_rows<6, false>(count, a, work.rounded_stride, scales, work.scale_stride, matrix, tile + i, target,
                                out_stride, add);
      done += count;
    }
  }
}

void begin_thread() {}
void end_thread() {}

}  // namespace

#include "float_attention.inl"

// Behind it, what uses it.
#include "steps.inl"

namespace mirror_kernels {

RunPass avx2_pass() { return run_pass; }

}  // namespace mirror_kernels
