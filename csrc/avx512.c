/* AVX-512 with VNNI: 16 lanes are one register, and a line of weights is one register of 16 outputs. */
#include "common.h"

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#include <immintrin.h>

typedef __m512 v16;

SHOAL_INLINE __mmask16 first_lanes(int32_t n) { return (__mmask16)((1u << SHOAL_MIN(n, 16)) - 1); }

SHOAL_INLINE v16 v_set1(float x) { return _mm512_set1_ps(x); }
SHOAL_INLINE v16 v_load(const float *p) { return _mm512_loadu_ps(p); }
SHOAL_INLINE v16 v_load_n(const float *p, int32_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
SHOAL_INLINE void v_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
SHOAL_INLINE void v_store_n(float *p, v16 a, int32_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
SHOAL_INLINE v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
SHOAL_INLINE v16 v_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
SHOAL_INLINE v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
SHOAL_INLINE v16 v_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
SHOAL_INLINE v16 v_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
SHOAL_INLINE v16 v_abs(v16 a) { return _mm512_abs_ps(a); }
SHOAL_INLINE v16 v_max(v16 a, v16 b) { return _mm512_max_ps(a, b); } /* a > b ? a : b */
SHOAL_INLINE v16 v_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }

SHOAL_INLINE v16 v_neg(v16 a) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}

SHOAL_INLINE v16 v_greater(v16 a, v16 b, v16 yes, v16 no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}

SHOAL_INLINE v16 v_first(v16 a, v16 b, int32_t n) { return _mm512_mask_blend_ps(first_lanes(n), b, a); }

SHOAL_INLINE v16 v_power(v16 n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

SHOAL_INLINE v16 v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

SHOAL_INLINE v16 v_load_i8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

SHOAL_INLINE void v_store_f16(uint16_t *p, v16 a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

SHOAL_INLINE void v_store_i8(int8_t *p, v16 a) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

/* The upper half of a on its lower half. */
SHOAL_INLINE __m256 upper(v16 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

SHOAL_INLINE float v_sum(v16 a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

SHOAL_INLINE float v_largest(v16 a) {
  const __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), upper(a));
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

#define Q8_BIAS 1
#define Q8_ROWS 11
#define Q8_BLOCK 7
#define Q8_EVEN 1
#define Q8_TILE 6
#define Q8_PANELS 2
#define ATTEND_QUERIES 8
#define ATTEND_MANY 6
#define ATTEND_WIDTH 4
#define ATTEND_CHAINS 24
#define F32_TILE 4
#define UNROLL SHOAL_UNROLL

/* Software prefetch distances in bytes. One or two rows are limited by memory. int8 then relies on the hardware prefetcher:
 * software prefetch to L1 costs a fifth on Zen 4, and on Zen 5 gains 3 % for small matrices and nothing for large ones. int4,
 * whose loop reads half as many bytes ahead, needs its lines in L1 in time, and further ahead in short panels (fewer groups
 * than LONG): on Zen 5, SmolLM2 with panels of 4.6 KiB is a tenth faster with 6 KiB than with 4, and 3 % more with 8; panels
 * of 16 KiB are fastest with 4. More rows are half arithmetic: their lines go to L2 early and to L1 shortly before use. */
enum {
  LINE = 64,
  LONG = 64,
  SHORT_AHEAD = 8192,
  LONG_AHEAD = 4096,
  L2_AHEAD = 16384,
  L1_AHEAD = 2048,
  SCALES_AHEAD = 512
};

/* One instruction: around the intrinsic, gcc 12 spills the accumulators. */
SHOAL_INLINE __m512i dot(__m512i sum, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}

/* A dot product with x broadcast from memory within the instruction: for a quad that a single panel uses. */
SHOAL_INLINE __m512i dot_quad(__m512i sum, __m512i w, const int8_t *x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*(const int32_t(*)[1])(const void *)x));
  return sum;
}

SHOAL_INLINE __m512i quad(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

/* Sums of all rows and panels, in two dependency chains each where there are few rows. */
typedef struct {
  __m512i even[Q8_ROWS * Q8_PANELS], odd[Q8_ROWS * Q8_PANELS];
} chains;

/* Adds the products of quad `k` of the group at x + at with line w[p] of each panel; the weights are unsigned here. */
SHOAL_INLINE void dot_lines(chains *c, const __m512i *w, const shoal_q8_row *x, size_t at, const int32_t k,
                            const int32_t rows, const int32_t panels) {
  UNROLL(11)
  for (int32_t r = 0; r < rows; r++) {
    const int8_t *four = x[r].q + at + k * SHOAL_QUAD;
    if (panels == 1) {
      if (rows < 4 && k % 2)
        c->odd[r] = dot_quad(c->odd[r], w[0], four);
      else
        c->even[r] = dot_quad(c->even[r], w[0], four);
      continue;
    }
    const __m512i broadcast = quad(four);
    UNROLL(2)
    for (int32_t p = 0; p < panels; p++) {
      const int32_t i = r * panels + p;
      if (rows == 1 && k % 2)
        c->odd[i] = dot(c->odd[i], w[p], broadcast);
      else
        c->even[i] = dot(c->even[i], w[p], broadcast);
    }
  }
}

/* At a line of weights, for the only block of rows. */
SHOAL_INLINE void prefetch(const int32_t type, const uint8_t *line, const int32_t rows, const int32_t groups) {
  if (type == SHOAL_Q4 && rows <= 2)
    _mm_prefetch((const char *)line + (groups < LONG ? SHORT_AHEAD : LONG_AHEAD), _MM_HINT_NTA);
  if (rows <= (type == SHOAL_Q8 ? 4 : 2)) return;
  _mm_prefetch((const char *)line + L2_AHEAD, _MM_HINT_T1);
  _mm_prefetch((const char *)line + L1_AHEAD, _MM_HINT_T0);
}

/* Products of `rows` rows with `panels` panels. int8: the unsigned operand is w + 128, and the bias, -128 times the sum of x,
 * subtracts the excess. int4: the unsigned operand is the nibble; a sixteenth of the bias subtracts the offset of 8, unless
 * the group has a minimum. */
SHOAL_INLINE void panel_dots(const int32_t type, const uint8_t *w, const uint16_t *scales, const uint16_t *mins,
                             const shoal_q8_row *x, const int32_t rows, const int32_t panels, shoal_ahead ahead, v16 *sums) {
  const int32_t groups = x[0].groups, lines = type == SHOAL_Q8 ? 8 : 4;
  const int32_t two = rows * panels < 4;
  const __m512i flip = _mm512_set1_epi8((char)0x80), low = _mm512_set1_epi8(15);
  const size_t next_panel = (size_t)groups * lines * LINE;
  size_t scale_at = (size_t)groups * SHOAL_GROUP;
  const size_t bias_from_scale = (size_t)groups * sizeof(float);
  v16 sum[Q8_ROWS * Q8_PANELS];
  UNROLL(22)
  for (int32_t i = 0; i < rows * panels; i++) sum[i] = _mm512_setzero_ps();
  for (int32_t g = 0; g < groups; g++, scale_at += sizeof(float), w += lines * LINE) {
    chains c;
    size_t group_at = (size_t)g * SHOAL_GROUP;
    /* Hidden from the compiler, which else advances a pointer for each row and keeps some of them in memory. */
    __asm__("" : "+r"(group_at), "+r"(scale_at));
    shoal_fetch_share(w, ahead);
    UNROLL(22)
    for (int32_t i = 0; i < rows * panels; i++) {
      const __m512i bias = quad(x[i / panels].q + scale_at + bias_from_scale);
      c.even[i] = type == SHOAL_Q8 ? bias : mins ? _mm512_setzero_si512() : _mm512_srai_epi32(bias, 4);
      c.odd[i] = _mm512_setzero_si512();
    }
    UNROLL(8)
    for (int32_t k = 0; k < lines; k++) {
      __m512i line[Q8_PANELS], next[Q8_PANELS];
      UNROLL(2)
      for (int32_t p = 0; p < panels; p++) {
        const uint8_t *from = w + p * next_panel + k * LINE;
        if (panels == 1 && ahead.alone) prefetch(type, from, rows, groups);
        line[p] = _mm512_loadu_si512(from);
        if (type == SHOAL_Q8) {
          line[p] = _mm512_xor_si512(line[p], flip);
        } else {
          next[p] = _mm512_and_si512(_mm512_srli_epi16(line[p], 4), low);
          line[p] = _mm512_and_si512(line[p], low);
        }
      }
      dot_lines(&c, line, x, group_at, k, rows, panels);
      if (type != SHOAL_Q8) dot_lines(&c, next, x, group_at, k + lines, rows, panels);
    }
    UNROLL(2)
    for (int32_t p = 0; p < panels; p++) {
      const size_t at = ((size_t)p * groups + g) * SHOAL_PANEL;
      const v16 scale = v_load_f16(scales + at);
      if (panels == 1) _mm_prefetch((const char *)(scales + at) + SCALES_AHEAD, _MM_HINT_NTA);
      UNROLL(11)
      for (int32_t r = 0; r < rows; r++) {
        const int32_t i = r * panels + p;
        const v16 of_inputs = _mm512_castsi512_ps(quad(x[r].q + scale_at));
        if (two) c.even[i] = _mm512_add_epi32(c.even[i], c.odd[i]);
        sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c.even[i]), _mm512_mul_ps(scale, of_inputs), sum[i]);
        if (type == SHOAL_Q8 || !mins) continue;
        const v16 total = _mm512_cvtepi32_ps(_mm512_srai_epi32(quad(x[r].q + scale_at + bias_from_scale), 7));
        sum[i] = _mm512_fnmadd_ps(total, _mm512_mul_ps(v_load_f16(mins + at), of_inputs), sum[i]); /* bias is -128 * total */
      }
    }
  }
  UNROLL(22)
  for (int32_t i = 0; i < rows * panels; i++) sums[i] = sum[i];
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, shoal_ahead ahead, v16 *sums) {
  panel_dots(SHOAL_Q8, (const uint8_t *)w, scales, NULL, x, rows, panels, ahead, sums);
}

#define Q4_DOTS
SHOAL_INLINE void q4_dots(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                          const int32_t rows, const int32_t panels, shoal_ahead ahead, v16 *sums) {
  if (mins)
    panel_dots(SHOAL_Q4, w, scales, mins, x, rows, panels, ahead, sums);
  else
    panel_dots(SHOAL_Q4, w, scales, NULL, x, rows, panels, ahead, sums);
}

#define SHOAL_SET shoal_kernels_avx512
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
