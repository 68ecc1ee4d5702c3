/* Plain ARMv8.0 NEON: every 64-bit Arm, among them the Raspberry Pi 3 and 4, which have no dot product instruction. */
#include "common.h"

#if defined(__aarch64__)
#include "lanes_neon.h"

#define Q8_BIAS 0
#define Q8_ROWS 4
#define Q8_TILE 4
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_WIDTH 1
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

enum { LINE = 64 };

/* Sums of products of pairs, for 4 outputs of a line: outputs 0 and 1 in `low`, 2 and 3 in `high`, two lanes each. */
typedef struct {
  int32x4_t low, high;
} pairs;

SHOAL_INLINE int8x16_t quad(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* Two lines at once: two products of at most 16129 fit 16 bits. */
SHOAL_INLINE pairs add_lines(pairs sum, int8x16_t w0, int8x16_t w1, int8x16_t x0, int8x16_t x1) {
  const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(w0), vget_low_s8(x0)), vget_low_s8(w1), vget_low_s8(x1));
  const int16x8_t high = vmlal_high_s8(vmull_high_s8(w0, x0), w1, x1);
  return (pairs){vpadalq_s16(sum.low, low), vpadalq_s16(sum.high, high)};
}

/* 8 outputs, from the first column of `w` on. */
SHOAL_INLINE void half_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                            float32x4_t sum[4][2]) {
  const int32_t groups = x[0].groups;
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vdupq_n_f32(0.0f);
  for (int32_t g = 0; g < groups; g++) {
    pairs dots[4][2];
    UNROLL(4)
    for (int32_t r = 0; r < rows; r++) dots[r][0] = dots[r][1] = (pairs){vdupq_n_s32(0), vdupq_n_s32(0)};
    UNROLL(4)
    for (int32_t k = 0; k < SHOAL_GROUP; k += 2 * SHOAL_QUAD, w += 2 * LINE) {
      UNROLL(2)
      for (int32_t half = 0; half < 2; half++) {
        const int8x16_t w0 = vld1q_s8(w + 16 * half), w1 = vld1q_s8(w + LINE + 16 * half);
        UNROLL(4)
        for (int32_t r = 0; r < rows; r++) {
          const int8_t *at = x[r].q + g * SHOAL_GROUP + k;
          dots[r][half] = add_lines(dots[r][half], w0, w1, quad(at), quad(at + SHOAL_QUAD));
        }
      }
    }
    const uint16_t *scale = scales + (size_t)g * SHOAL_PANEL;
    UNROLL(2)
    for (int32_t half = 0; half < 2; half++) {
      const float32x4_t of_weights = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scale + 4 * half)));
      UNROLL(4)
      for (int32_t r = 0; r < rows; r++) {
        const float32x4_t dot = vcvtq_f32_s32(vpaddq_s32(dots[r][half].low, dots[r][half].high));
        sum[r][half] = vfmaq_f32(sum[r][half], dot, vmulq_n_f32(of_weights, x[r].scale[g]));
      }
    }
  }
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, v16 *sums) {
  float32x4_t low[4][2], high[4][2];
  (void)panels;
  half_dots(w, scales, x, rows, low);
  half_dots(w + LINE / 2, scales + SHOAL_PANEL / 2, x, rows, high);
  UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sums[r] = (v16){{low[r][0], low[r][1], high[r][0], high[r][1]}};
}

#define SHOAL_SET shoal_kernels_neon
#include "ops.inc"
#endif
