/* 16 lanes in two registers of AVX2, with FMA and F16C. Included below the target pragma of a set. */
#include <immintrin.h>

typedef struct {
  __m256 a, b; /* lanes 0-7 and 8-15 */
} v16;

#define BOTH(first, second) \
  return (v16) { (first), (second) }

/* All bits of the first n of eight lanes, n of any size. */
SHOAL_INLINE __m256i first_lanes(int32_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SHOAL_INLINE v16 v_set1(float x) { BOTH(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
SHOAL_INLINE v16 v_load(const float *p) { BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
SHOAL_INLINE v16 v_load_n(const float *p, int32_t n) {
  BOTH(_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8)));
}
SHOAL_INLINE v16 v_add(v16 x, v16 y) { BOTH(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
SHOAL_INLINE v16 v_sub(v16 x, v16 y) { BOTH(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
SHOAL_INLINE v16 v_mul(v16 x, v16 y) { BOTH(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
SHOAL_INLINE v16 v_div(v16 x, v16 y) { BOTH(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
SHOAL_INLINE v16 v_fma(v16 x, v16 y, v16 z) { BOTH(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
SHOAL_INLINE v16 v_max(v16 x, v16 y) { BOTH(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); } /* x > y ? x : y */
SHOAL_INLINE v16 v_min(v16 x, v16 y) { BOTH(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }

SHOAL_INLINE v16 v_neg(v16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  BOTH(_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign));
}

SHOAL_INLINE v16 v_abs(v16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  BOTH(_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}

SHOAL_INLINE v16 v_greater(v16 x, v16 y, v16 yes, v16 no) {
  BOTH(_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
       _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)));
}

SHOAL_INLINE v16 v_first(v16 x, v16 y, int32_t n) {
  BOTH(_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(first_lanes(n))),
       _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(first_lanes(n - 8))));
}

SHOAL_INLINE __m256 power8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

SHOAL_INLINE v16 v_power(v16 n) { BOTH(power8(n.a), power8(n.b)); }

SHOAL_INLINE __m256 load_eight(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
SHOAL_INLINE v16 v_load_i8(const int8_t *p) { BOTH(load_eight(p), load_eight(p + 8)); }
SHOAL_INLINE v16 v_load_f16(const uint16_t *p) {
  BOTH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
       _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}

SHOAL_INLINE void v_store(float *p, v16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}

SHOAL_INLINE void v_store_n(float *p, v16 x, int32_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), x.a);
  _mm256_maskstore_ps(p + 8, first_lanes(n - 8), x.b);
}

SHOAL_INLINE void v_store_f16(uint16_t *p, v16 x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

SHOAL_INLINE void v_store_i8(int8_t *p, v16 x) {
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

SHOAL_INLINE float v_sum(v16 x) {
  const __m256 y = _mm256_add_ps(x.a, x.b);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}

SHOAL_INLINE float v_largest(v16 x) {
  const __m256 y = _mm256_max_ps(x.a, x.b);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
