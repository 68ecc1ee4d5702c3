/* AVX2 with AVX-VNNI, the dot products of AVX-512 in 256 bits: most x86 laptops since 2021. */
#include "common.h"

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "lanes_avx2.h"

#define Q8_BIAS 1
#define Q8_ROWS 4
#define Q8_BLOCK 4
#define Q8_EVEN 1
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_MANY 6
#define ATTEND_WIDTH 2
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

enum { LINE = 64, AHEAD = 4096, L2_AHEAD = 16384 };

/* sum + the products of w's unsigned with x's signed quads. Written as assembly, because the mnemonic without {vex} may
 * assemble to AVX-512's instruction and compilers have the intrinsic only since gcc 11 and clang 12. The tests replace this
 * definition to run the file on CPUs without the instruction. */
#ifndef DPBUSD
#define DPBUSD(sum, w, x) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x))
#endif

SHOAL_INLINE __m256i quad(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

/* 32 bytes of a line of int8 weights, made unsigned; or of int4 weights the low and the high nibbles. */
SHOAL_INLINE void numbers(const int32_t type, const uint8_t *w, __m256i *first, __m256i *second) {
  const __m256i both = _mm256_loadu_si256((const __m256i *)w), low = _mm256_set1_epi8(15);
  *first = type == SHOAL_Q8 ? _mm256_xor_si256(both, _mm256_set1_epi8((char)0x80)) : _mm256_and_si256(both, low);
  if (type != SHOAL_Q8) *second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
}

/* Products of up to 4 rows with a panel. int8: the unsigned operand is w + 128, and the bias, -128 times the sum of x,
 * subtracts the excess. int4: the unsigned operand is the nibble; a sixteenth of the bias subtracts the offset of 8, unless
 * the group has a minimum. With a single row, lines alternate between two sums, since one chain cannot keep two multipliers
 * busy. */
SHOAL_INLINE void panel_dots(const int32_t type, const uint8_t *w, const uint16_t *scales, const uint16_t *mins,
                             const shoal_q8_row *x, const int32_t rows, shoal_ahead ahead, v16 *sums) {
  const int32_t groups = x[0].groups, chains = rows == 1 ? 2 : 1;
  const int32_t halves = type == SHOAL_Q8 ? 1 : 2, lines = 8 / halves;
  v16 sum[4];
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sum[r] = v_set1(0.0f);
  for (int32_t g = 0; g < groups; g++) {
    __m256i low[4], high[4];
    shoal_fetch_share(w, ahead);
    UNROLL(4)
    for (int32_t i = 0; i < rows * chains; i++) {
      const int32_t offset = i >= rows || mins ? 0 : type == SHOAL_Q8 ? x[i].bias[g] : x[i].bias[g] / 16;
      low[i] = high[i] = _mm256_set1_epi32(offset);
    }
    UNROLL(8)
    for (int32_t k = 0; k < lines; k++, w += LINE) {
      __m256i left[2], right[2];
      if (ahead.alone && rows <= 2) _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
      if (ahead.alone && rows == 4) _mm_prefetch((const char *)w + L2_AHEAD, _MM_HINT_T1);
      numbers(type, w, &left[0], &left[1]);
      numbers(type, w + LINE / 2, &right[0], &right[1]);
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        UNROLL(2)
        for (int32_t half = 0; half < halves; half++) {
          const int32_t i = r + (k + half) % chains;
          const __m256i four = quad(x[r].q + g * SHOAL_GROUP + half * SHOAL_GROUP / 2 + k * SHOAL_QUAD);
          DPBUSD(low[i], left[half], four);
          DPBUSD(high[i], right[half], four);
        }
      }
    }
    const v16 of_weights = v_load_f16(scales + (size_t)g * SHOAL_PANEL);
    UNROLL(4)
    for (int32_t r = 0; r < rows; r++) {
      const v16 of_inputs = v_set1(x[r].scale[g]);
      if (chains == 2) {
        low[0] = _mm256_add_epi32(low[0], low[1]);
        high[0] = _mm256_add_epi32(high[0], high[1]);
      }
      const v16 dot = {_mm256_cvtepi32_ps(low[r]), _mm256_cvtepi32_ps(high[r])};
      sum[r] = v_fma(dot, v_mul(of_weights, of_inputs), sum[r]);
      if (!mins) continue;
      const v16 total = v_set1((float)(x[r].bias[g] / -128));
      sum[r] = v_fma(total, v_mul(v_load_f16(mins + (size_t)g * SHOAL_PANEL), of_inputs), sum[r]);
    }
  }
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sums[r] = sum[r];
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels;
  panel_dots(SHOAL_Q8, (const uint8_t *)w, scales, NULL, x, rows, ahead, sums);
}

#define Q4_DOTS
SHOAL_INLINE void q4_dots(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                          const int32_t rows, const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels;
  if (mins)
    panel_dots(SHOAL_Q4, w, scales, mins, x, rows, ahead, sums);
  else
    panel_dots(SHOAL_Q4, w, scales, NULL, x, rows, ahead, sums);
}

#define SHOAL_SET shoal_kernels_avxvnni
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
