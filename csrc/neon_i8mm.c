/* NEON with SMMLA, the product of two 2 x 8 matrices: phones and servers since about 2021. Few rows use SDOT, since packing
 * would not pay for itself. */
#include "common.h"

#if defined(SHOAL_ARM_EXTENSIONS)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
#include "lanes_neon.h"

#include "dots_neon.h"

#define Q8_BIAS 1
#define Q8_ROWS 4
#define Q8_BLOCK 4
#define Q8_EVEN 0
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_MANY 4
#define ATTEND_WIDTH 1
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

#define PACKED_FROM(type) ((type) == SHOAL_Q8 ? 11 : 9)
#define PACKED_ROWS 4
enum { PACKED_GROUPS = 8, EIGHTS = SHOAL_GROUP / 8, ROW_PAIRS = PACKED_ROWS / 2, OUTPUT_PAIRS = HALF / 2 };

/* One SMMLA multiplies a pair of rows with a pair of outputs, 8 inputs each, and yields [row 0 output 0, row 0 output 1, row
 * 1 output 0, row 1 output 1]. Sums keep this order to the end, so scales are packed to match it. */
typedef struct {
  int8_t q[EIGHTS][ROW_PAIRS][16];
  float scale[ROW_PAIRS][4], sum[ROW_PAIRS][4];
} input_group;

typedef struct {
  int8_t q[EIGHTS][OUTPUT_PAIRS][16];
  float scale[OUTPUT_PAIRS][4], min[OUTPUT_PAIRS][4];
} output_group;

typedef struct {
  input_group group[PACKED_GROUPS] __attribute__((aligned(64)));
} packed_rows;

typedef struct {
  output_group group[2][PACKED_GROUPS] __attribute__((aligned(64))); /* indexed by half of the panel */
} packed_panel;

SHOAL_INLINE float32x4_t twice(float a, float b) { return vcombine_f32(vdup_n_f32(a), vdup_n_f32(b)); }

SHOAL_INLINE void pack_rows(packed_rows *to, const shoal_q8_row *x, int32_t first, int32_t groups) {
  for (int32_t i = 0; i < groups; i++) {
    const int32_t g = first + i;
    input_group *out = &to->group[i];
    UNROLL(2)
    for (int32_t p = 0; p < ROW_PAIRS; p++, x += 2) {
      UNROLL(2)
      for (int32_t k = 0; k < EIGHTS; k += 2) {
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x[0].q + g * SHOAL_GROUP + 8 * k));
        const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(x[1].q + g * SHOAL_GROUP + 8 * k));
        vst1q_s8(out->q[k][p], vreinterpretq_s8_s64(vzip1q_s64(a, b)));
        vst1q_s8(out->q[k + 1][p], vreinterpretq_s8_s64(vzip2q_s64(a, b)));
      }
      vst1q_f32(out->scale[p], twice(x[0].scale[g], x[1].scale[g]));
      vst1q_f32(out->sum[p], twice((float)-(x[0].bias[g] >> 7), (float)-(x[1].bias[g] >> 7)));
    }
    x -= PACKED_ROWS;
  }
}

/* Rearranges 8 inputs of 4 outputs from two lines. */
SHOAL_INLINE void pack_lines(int8_t (*to)[16], int8x16_t even, int8x16_t odd) {
  const int32x4_t a = vreinterpretq_s32_s8(even), b = vreinterpretq_s32_s8(odd);
  vst1q_s8(to[0], vreinterpretq_s8_s32(vzip1q_s32(a, b)));
  vst1q_s8(to[1], vreinterpretq_s8_s32(vzip2q_s32(a, b)));
}

SHOAL_INLINE void pack_numbers(float (*to)[4], const uint16_t *from) {
  const float32x4_t four = four_f16(from);
  vst1q_f32(to[0], vcombine_f32(vget_low_f32(four), vget_low_f32(four)));
  vst1q_f32(to[1], vcombine_f32(vget_high_f32(four), vget_high_f32(four)));
}

SHOAL_INLINE void pack_panel(packed_panel *to, const int32_t type, const void *data, const uint16_t *scales,
                             const uint16_t *mins, int32_t groups) {
  const uint8x16_t *line = data; /* [line][4 outputs] */
  const int8x16_t less = vdupq_n_s8(mins ? 0 : 8);
  const int32_t pairs = type == SHOAL_Q8 ? EIGHTS : EIGHTS / 2; /* pairs of lines */
  for (int32_t g = 0; g < groups; g++, scales += SHOAL_PANEL) {
    UNROLL(4)
    for (int32_t quad = 0; quad < 4; quad++) {
      output_group *out = &to->group[quad / 2][g];
      const int32_t at = quad % 2 * 2;
      UNROLL(4)
      for (int32_t k = 0; k < pairs; k++) {
        const uint8x16_t even = line[8 * k + quad], odd = line[8 * k + 4 + quad];
        if (type == SHOAL_Q8) {
          pack_lines(&out->q[k][at], vreinterpretq_s8_u8(even), vreinterpretq_s8_u8(odd));
          continue;
        }
        pack_lines(&out->q[k][at], vsubq_s8(low_nibbles(even), less), vsubq_s8(low_nibbles(odd), less));
        pack_lines(&out->q[EIGHTS / 2 + k][at], vsubq_s8(high_nibbles(even), less), vsubq_s8(high_nibbles(odd), less));
      }
      pack_numbers(&out->scale[at], scales + 4 * quad);
      if (mins) pack_numbers(&out->min[at], mins + g * SHOAL_PANEL + 4 * quad);
    }
    line += type == SHOAL_Q8 ? SHOAL_GROUP : SHOAL_GROUP / 2;
  }
}

/* Products of 1 or 2 pairs of rows with 8 outputs. */
SHOAL_INLINE void smmla_groups(const output_group *w, const input_group *x, int32_t groups, const int32_t mins,
                               const int32_t pairs, float *sums) {
  const int32_t count = pairs * OUTPUT_PAIRS;
  float32x4_t sum[ROW_PAIRS * OUTPUT_PAIRS];
  UNROLL(8)
  for (int32_t i = 0; i < count; i++) sum[i] = vld1q_f32(sums + 4 * i);
  for (int32_t g = 0; g < groups; g++, w++, x++) {
    const int32_t *start = starts();
    int32x4_t dots[ROW_PAIRS * OUTPUT_PAIRS];
    UNROLL(8)
    for (int32_t i = 0; i < count; i++) dots[i] = vld1q_s32(start + 4 * i);
    UNROLL(4)
    for (int32_t k = 0; k < EIGHTS; k++) {
      UNROLL(8)
      for (int32_t i = 0; i < count; i++)
        dots[i] = vmmlaq_s32(dots[i], vld1q_s8(x->q[k][i / OUTPUT_PAIRS]), vld1q_s8(w->q[k][i % OUTPUT_PAIRS]));
    }
    UNROLL(8)
    for (int32_t i = 0; i < count; i++) {
      const int32_t p = i / OUTPUT_PAIRS, o = i % OUTPUT_PAIRS;
      const float32x4_t scale = vld1q_f32(x->scale[p]);
      sum[i] = vfmaq_f32(sum[i], since(vdupq_n_f32(0x1.8p23f), dots[i]), vmulq_f32(vld1q_f32(w->scale[o]), scale));
      if (mins) sum[i] = vfmaq_f32(sum[i], vld1q_f32(x->sum[p]), vmulq_f32(vld1q_f32(w->min[o]), scale));
    }
  }
  UNROLL(8)
  for (int32_t i = 0; i < count; i++) vst1q_f32(sums + 4 * i, sum[i]);
}

SHOAL_INLINE void smmla_panel(const packed_panel *w, const input_group *x, int32_t groups, const int32_t mins,
                              const int32_t pairs, v16 *sums) {
  for (int32_t half = 0; half < 2; half++)
    smmla_groups(w->group[half], x, groups, mins, pairs, (float *)(sums + 2 * half));
}

/* Sums are [half of the panel][pair of rows][pair of outputs][4]. */
SHOAL_INLINE void packed_dots(const packed_panel *w, const packed_rows *x, int32_t rows, int32_t groups, int32_t mins,
                              v16 *sums) {
  if (mins && rows > 2)
    smmla_panel(w, x->group, groups, 1, 2, sums);
  else if (mins)
    smmla_panel(w, x->group, groups, 1, 1, sums);
  else if (rows > 2)
    smmla_panel(w, x->group, groups, 0, 2, sums);
  else
    smmla_panel(w, x->group, groups, 0, 1, sums);
}

SHOAL_INLINE v16 packed_sum(const v16 *sums, int32_t row) {
  v16 result;
  UNROLL(4)
  for (int32_t q = 0; q < 4; q++) {
    const float32x4_t *two = &sums[2 * (q / 2) + row / 2].val[q % 2 * 2];
    result.val[q] = row % 2 ? vcombine_f32(vget_high_f32(two[0]), vget_high_f32(two[1]))
                            : vcombine_f32(vget_low_f32(two[0]), vget_low_f32(two[1]));
  }
  return result;
}

#define SHOAL_SET shoal_kernels_neon_i8mm
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
