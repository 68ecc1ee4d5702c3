/* NEON with SMMLA, the product of two 2 x 8 matrices: phones and servers since about 2021. */
#include "common.h"

#if defined(SHOAL_ARM_EXTENSIONS)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
#include "lanes_neon.h"

#include "dots_neon.h"

#define Q8_BIAS 0
#define Q8_ROWS 8
#define Q8_TILE 8
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_WIDTH 1
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

enum { LINE = 64, EIGHT = 8 };

/* 8 inputs of one row, then 8 of another. */
SHOAL_INLINE int8x16_t two_rows(const int8_t *first, const int8_t *second) {
  return vcombine_s8(vld1_s8(first), vld1_s8(second));
}

/* 4 `quads` of outputs, from the first column of `w` on, in sum[row * 4 + quad], for 2 to 8 rows; of an odd number the
 * last stands for its missing neighbour too. Two lines zipped by quads are pairs of outputs with 8 inputs each. */
SHOAL_INLINE void smmla_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                             const int32_t quads, float32x4_t *sum) {
  const int32_t groups = x[0].groups, pairs = (rows + 1) / 2;
  UNROLL(16)
  for (int32_t i = 0; i < rows * quads; i++) sum[i] = vdupq_n_f32(0.0f);
  for (int32_t g = 0; g < groups; g++, w += SHOAL_GROUP * SHOAL_PANEL, scales += SHOAL_PANEL) {
    int32x4_t low[8], high[8]; /* outputs 0 and 1, 2 and 3 of a quad, for one row, then for the other */
    UNROLL(8)
    for (int32_t i = 0; i < pairs * quads; i++) low[i] = high[i] = vdupq_n_s32(0);
    UNROLL(4)
    for (int32_t k = 0; k < SHOAL_GROUP; k += EIGHT) {
      int8x16_t in[4];
      UNROLL(4)
      for (int32_t p = 0; p < pairs; p++) {
        const int32_t second = 2 * p + 1 < rows ? 2 * p + 1 : 2 * p;
        in[p] = two_rows(x[2 * p].q + g * SHOAL_GROUP + k, x[second].q + g * SHOAL_GROUP + k);
      }
      UNROLL(4)
      for (int32_t q = 0; q < quads; q++) {
        const int8_t *line = w + k / SHOAL_QUAD * LINE + 16 * q;
        const int32x4_t even = vreinterpretq_s32_s8(vld1q_s8(line)), odd = vreinterpretq_s32_s8(vld1q_s8(line + LINE));
        const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(even, odd));
        const int8x16_t last = vreinterpretq_s8_s32(vzip2q_s32(even, odd));
        UNROLL(4)
        for (int32_t p = 0; p < pairs; p++) {
          low[p * quads + q] = vmmlaq_s32(low[p * quads + q], in[p], first);
          high[p * quads + q] = vmmlaq_s32(high[p * quads + q], in[p], last);
        }
      }
    }
    UNROLL(4)
    for (int32_t q = 0; q < quads; q++) {
      const float32x4_t of_weights = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales + 4 * q)));
      UNROLL(8)
      for (int32_t r = 0; r < rows; r++) {
        const int64x2_t a = vreinterpretq_s64_s32(low[r / 2 * quads + q]);
        const int64x2_t b = vreinterpretq_s64_s32(high[r / 2 * quads + q]);
        const float32x4_t dot = vcvtq_f32_s32(vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b)));
        sum[r * quads + q] = vfmaq_f32(sum[r * quads + q], dot, vmulq_n_f32(of_weights, x[r].scale[g]));
      }
    }
  }
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, v16 *sums) {
  (void)panels;
  if (rows == 1) { /* nothing to pair a row with, and as fast as memory without */
    sdot_dots(w, scales, x, 1, sums);
    return;
  }
  if (rows == 2) { /* whole lines, as they come from memory */
    float32x4_t sum[8];
    smmla_dots(w, scales, x, 2, 4, sum);
    UNROLL(2)
    for (int32_t r = 0; r < 2; r++) sums[r] = (v16){{sum[4 * r], sum[4 * r + 1], sum[4 * r + 2], sum[4 * r + 3]}};
    return;
  }
  float32x4_t left[16], right[16]; /* 32 registers hold the products of 8 rows with 8 outputs */
  smmla_dots(w, scales, x, rows, 2, left);
  smmla_dots(w + LINE / 2, scales + SHOAL_PANEL / 2, x, rows, 2, right);
  UNROLL(8)
  for (int32_t r = 0; r < rows; r++) sums[r] = (v16){{left[2 * r], left[2 * r + 1], right[2 * r], right[2 * r + 1]}};
}

#define SHOAL_SET shoal_kernels_neon_i8mm
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
