/* AVX2 with FMA and F16C: every x86-64 machine since about 2014. A line of weights is two registers of 8 outputs. */
#include "common.h"

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "lanes_avx2.h"

#define Q8_BIAS 1
#define Q8_ROWS 3
#define Q8_BLOCK 3
#define Q8_EVEN 1
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_MANY 6
#define ATTEND_WIDTH 2
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

enum { LINE = 64, AHEAD = 4096 };

/* Products of up to 3 rows with a panel, or of 4 with one of its halves: more sums do not fit in 16 registers. abs(x) is the
 * unsigned operand of maddubs and w takes the sign of x: with both in [-127, 127] a pair sums to at most 32258, which fits in
 * 16 bits. */
SHOAL_INLINE void half_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                            const int32_t halves, shoal_ahead ahead, __m256 *sum) {
  const int32_t groups = x[0].groups;
  const __m256i ones = _mm256_set1_epi16(1);
  UNROLL(6)
  for (int32_t i = 0; i < rows * halves; i++) sum[i] = _mm256_setzero_ps();
  for (int32_t g = 0; g < groups; g++) {
    __m256i dots[6];
    shoal_fetch_share(w, ahead);
    UNROLL(6)
    for (int32_t i = 0; i < rows * halves; i++) dots[i] = _mm256_setzero_si256();
    UNROLL(8)
    for (int32_t k = 0; k < SHOAL_GROUP; k += SHOAL_QUAD, w += LINE) {
      if (halves == 2 && ahead.alone) _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        int32_t quad;
        memcpy(&quad, x[r].q + g * SHOAL_GROUP + k, sizeof quad);
        const __m256i four = _mm256_set1_epi32(quad), magnitude = _mm256_abs_epi8(four);
        UNROLL(2)
        for (int32_t h = 0; h < halves; h++) {
          const __m256i line = _mm256_loadu_si256((const __m256i *)(w + h * LINE / 2));
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(line, four));
          dots[r * halves + h] = _mm256_add_epi32(dots[r * halves + h], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    UNROLL(2)
    for (int32_t h = 0; h < halves; h++) {
      const __m256 scale =
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + (size_t)g * SHOAL_PANEL + 8 * h)));
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x[r].scale[g]));
        sum[r * halves + h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r * halves + h]), both, sum[r * halves + h]);
      }
    }
  }
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels;
  if (rows <= 3) { /* whole lines */
    __m256 sum[6];
    half_dots(w, scales, x, rows, 2, ahead, sum);
    UNROLL(3)
    for (int32_t r = 0; r < rows; r++) sums[r] = (v16){sum[2 * r], sum[2 * r + 1]};
    return;
  }
  __m256 low[4], high[4];
  half_dots(w, scales, x, rows, 1, ahead, low);
  half_dots(w + LINE / 2, scales + SHOAL_PANEL / 2, x, rows, 1, ahead, high);
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sums[r] = (v16){low[r], high[r]};
}

SHOAL_INLINE __m256i quad(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

/* half_dots for int4. Nibbles are unsigned: eight pairs sum to at most 30480, which fits in 16 bits, so sums are widened to
 * 32 bits once per group. A sixteenth of the bias subtracts the offset of 8, unless the group has a minimum. */
SHOAL_INLINE void half_dots_q4(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                               const int32_t rows, const int32_t halves, shoal_ahead ahead, __m256 *sum) {
  const int32_t groups = x[0].groups, lines = SHOAL_GROUP / SHOAL_QUAD / 2;
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  UNROLL(6)
  for (int32_t i = 0; i < rows * halves; i++) sum[i] = _mm256_setzero_ps();
  for (int32_t g = 0; g < groups; g++) {
    __m256i pairs[6];
    shoal_fetch_share(w, ahead);
    UNROLL(6)
    for (int32_t i = 0; i < rows * halves; i++) pairs[i] = _mm256_setzero_si256();
    UNROLL(4)
    for (int32_t k = 0; k < lines; k++, w += LINE) {
      if (halves == 2 && ahead.alone) _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
      __m256i first[2], second[2];
      UNROLL(2)
      for (int32_t h = 0; h < halves; h++) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(w + h * LINE / 2));
        first[h] = _mm256_and_si256(both, low);
        second[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      }
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        const int8_t *in = x[r].q + g * SHOAL_GROUP + k * SHOAL_QUAD;
        const __m256i with_first = quad(in), with_second = quad(in + SHOAL_GROUP / 2);
        UNROLL(2)
        for (int32_t h = 0; h < halves; h++) {
          const int32_t i = r * halves + h;
          pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(first[h], with_first));
          pairs[i] = _mm256_add_epi16(pairs[i], _mm256_maddubs_epi16(second[h], with_second));
        }
      }
    }
    UNROLL(2)
    for (int32_t h = 0; h < halves; h++) {
      const size_t at = (size_t)g * SHOAL_PANEL + 8 * h;
      const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + at)));
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        const int32_t i = r * halves + h, bias = x[r].bias[g];
        const __m256 of_inputs = _mm256_set1_ps(x[r].scale[g]);
        __m256i dot = _mm256_madd_epi16(pairs[i], ones);
        if (!mins) dot = _mm256_add_epi32(dot, _mm256_set1_epi32(bias / 16));
        sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, of_inputs), sum[i]);
        if (!mins) continue;
        const __m256 min = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(mins + at)));
        sum[i] = _mm256_fmadd_ps(_mm256_set1_ps((float)(bias / -128)), _mm256_mul_ps(min, of_inputs), sum[i]);
      }
    }
  }
}

SHOAL_INLINE void rows_q4(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                          const int32_t rows, shoal_ahead ahead, v16 *sums) {
  if (rows <= 3) { /* whole lines */
    __m256 sum[6];
    half_dots_q4(w, scales, mins, x, rows, 2, ahead, sum);
    UNROLL(3)
    for (int32_t r = 0; r < rows; r++) sums[r] = (v16){sum[2 * r], sum[2 * r + 1]};
    return;
  }
  __m256 left[4], right[4];
  half_dots_q4(w, scales, mins, x, rows, 1, ahead, left);
  half_dots_q4(w + LINE / 2, scales + SHOAL_PANEL / 2, mins ? mins + SHOAL_PANEL / 2 : NULL, x, rows, 1, ahead, right);
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sums[r] = (v16){left[r], right[r]};
}

#define Q4_DOTS
SHOAL_INLINE void q4_dots(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                          const int32_t rows, const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels;
  if (mins)
    rows_q4(w, scales, mins, x, rows, ahead, sums);
  else
    rows_q4(w, scales, NULL, x, rows, ahead, sums);
}

#define SHOAL_SET shoal_kernels_avx2
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
