// 16 floats as AVX-512 has them. Included by files compiled for it.
#include <immintrin.h>
#include <stdint.h>

namespace {

struct F16 {
  __m512 v;
};

inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 set(float a) { return {_mm512_set1_ps(a)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 plus(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 minus(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 times(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 over(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 most(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 least(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 magnitude(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(F16 a) { return _mm512_reduce_max_ps(a.v); }
inline float first_of(F16 a) { return _mm512_cvtss_f32(a.v); }

// a where `of` is above a bar, else nothing.
inline F16 kept_if_above(F16 a, F16 of, float bar) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of.v, _mm512_set1_ps(bar), _CMP_GT_OQ), a.v)};
}

inline uint32_t above_bar(F16 a, float bar) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(bar), _CMP_GT_OQ); }

// 2 to the power of a: a polynomial for the part after the point, to 2e-7.
inline F16 exp2_of(F16 a) {
  const __m512 whole = _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(a.v, whole);
  __m512 result = _mm512_set1_ps(1.5403530e-4f);
  result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(1.3333558e-3f));
  result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(9.6181291e-3f));
  result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(5.5504109e-2f));
  result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(2.4022651e-1f));
  result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(6.9314718e-1f));
  result = _mm512_fmadd_ps(result, part, _mm512_set1_ps(1.0f));
  return {_mm512_scalef_ps(result, whole)};
}

inline void store_rounded(uint8_t* p, F16 a) {
  const __m512i numbers = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(128));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(numbers));
}

}  // namespace
