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
#define Q8_TILE 4
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_WIDTH 2
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

enum { LINE = 64, AHEAD = 4096 };

/* sum + the products of w's unsigned with x's signed quads. Named outright: the same name without {vex} may become
 * AVX-512's instruction, and compilers know the intrinsic since gcc 11 and clang 12 only. The tests put another
 * definition in its place, to run this file on CPUs that have not the instruction. */
#ifndef DPBUSD
#define DPBUSD(sum, w, x) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x))
#endif

/* The unsigned operand is w + 128; the bias, -128 times the sum of x, takes that out again. The lines of one row's
 * group go to two sums in turn, as one row has too few to keep two multipliers busy. */
SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, v16 *sums) {
  const int32_t groups = x[0].groups, chains = rows == 1 ? 2 : 1;
  const __m256i flip = _mm256_set1_epi8((char)0x80);
  v16 sum[4];
  (void)panels;
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sum[r] = v_set1(0.0f);
  for (int32_t g = 0; g < groups; g++) {
    __m256i low[4], high[4];
    UNROLL(4)
    for (int32_t i = 0; i < rows * chains; i++)
      low[i] = high[i] = i < rows ? _mm256_set1_epi32(x[i].bias[g]) : _mm256_setzero_si256();
    UNROLL(8)
    for (int32_t k = 0; k < SHOAL_GROUP; k += SHOAL_QUAD, w += LINE) {
      if (rows <= 2) _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
      const __m256i first = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)w), flip);
      const __m256i second = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + LINE / 2)), flip);
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        const int32_t i = r + k / SHOAL_QUAD % chains;
        int32_t quad;
        memcpy(&quad, x[r].q + g * SHOAL_GROUP + k, sizeof quad);
        const __m256i four = _mm256_set1_epi32(quad);
        DPBUSD(low[i], first, four);
        DPBUSD(high[i], second, four);
      }
    }
    const v16 of_weights = v_load_f16(scales + (size_t)g * SHOAL_PANEL);
    UNROLL(4)
    for (int32_t r = 0; r < rows; r++) {
      if (chains == 2) {
        low[0] = _mm256_add_epi32(low[0], low[1]);
        high[0] = _mm256_add_epi32(high[0], high[1]);
      }
      const v16 dot = {_mm256_cvtepi32_ps(low[r]), _mm256_cvtepi32_ps(high[r])};
      sum[r] = v_fma(dot, v_mul(of_weights, v_set1(x[r].scale[g])), sum[r]);
    }
  }
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sums[r] = sum[r];
}

#define SHOAL_SET shoal_kernels_avxvnni
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
