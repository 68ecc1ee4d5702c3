/* Plain ARMv8.0 NEON: every 64-bit Arm, among them the Raspberry Pi 3 and 4, which have no dot product instruction. */
#include "common.h"

#if defined(__aarch64__)
#include "lanes_neon.h"

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

enum { LINE = 64, TURN = 16 };

/* Sums of products for the 4 outputs of a register: outputs 0 and 1 in `low`, 2 and 3 in `high`. int8 uses 32-bit sums of
 * pairs, two lanes per output. int4 uses 16-bit sums, four lanes per output: eight products of at most 15 * 127 stay below
 * 2^14, and twice that below 2^15. */
typedef struct {
  int32x4_t low, high;
} wide;
typedef struct {
  int16x8_t low, high;
} narrow;

SHOAL_INLINE int8x16_t four_times(const int8_t *quad) {
  int32_t four;
  memcpy(&four, quad, sizeof four);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

SHOAL_INLINE narrow products(int8x16_t w, int8x16_t x) {
  return (narrow){vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x)};
}

SHOAL_INLINE narrow add_products(narrow sum, int8x16_t w, int8x16_t x) {
  return (narrow){vmlal_s8(sum.low, vget_low_s8(w), vget_low_s8(x)), vmlal_high_s8(sum.high, w, x)};
}

/* (float)(dot + more) for |dot + more| < 2^22: the bits of 1.5 * 2^23 plus an integer, read as a float, are 1.5 * 2^23 plus
 * that integer. A conversion would occupy the only unit that also multiplies. `start` holds those bits plus `more`. */
enum { START = 0x4b400000 };
SHOAL_INLINE float32x4_t exact(int32x4_t dot, int32x4_t start, float32x4_t zero) {
  return vsubq_f32(vreinterpretq_f32_s32(vaddq_s32(dot, start)), zero);
}

/* The dot products of a group of int8 weights with x, two lines at once: two products of at most 16129 fit in 16 bits. */
SHOAL_INLINE v16 q8_group(const int8_t *w, const int8_t *x) {
  wide sum[4];
  v16 dots;
  UNROLL(4)
  for (int32_t q = 0; q < 4; q++) sum[q] = (wide){vdupq_n_s32(0), vdupq_n_s32(0)};
  UNROLL(4)
  for (int32_t k = 0; k < SHOAL_GROUP; k += 2 * SHOAL_QUAD, w += 2 * LINE) {
    const int8x16_t x0 = four_times(x + k), x1 = four_times(x + k + SHOAL_QUAD);
    UNROLL(4)
    for (int32_t q = 0; q < 4; q++) {
      const narrow two = add_products(products(vld1q_s8(w + 16 * q), x0), vld1q_s8(w + LINE + 16 * q), x1);
      sum[q] = (wide){vpadalq_s16(sum[q].low, two.low), vpadalq_s16(sum[q].high, two.high)};
    }
  }
  int32x4_t start = vdupq_n_s32(START);
  __asm__("" : "+w"(start)); /* else clang keeps it twice, as integers and as floats, and spills a sum */
  UNROLL(4)
  for (int32_t q = 0; q < 4; q++)
    dots.val[q] = exact(vpaddq_s32(sum[q].low, sum[q].high), start, vreinterpretq_f32_s32(start));
  return dots;
}

/* The dot products of a group of int4 weights, multiplied as 0 to 15, with x. */
SHOAL_INLINE v16 q4_group(const uint8_t *w, const int8_t *x, int32_t more) {
  narrow sum[4];
  v16 dots;
  UNROLL(4)
  for (int32_t line = 0; line < 4; line++, w += LINE) {
    const int8x16_t x0 = four_times(x + SHOAL_QUAD * line), x1 = four_times(x + SHOAL_GROUP / 2 + SHOAL_QUAD * line);
    UNROLL(4)
    for (int32_t q = 0; q < 4; q++) {
      const uint8x16_t both = vld1q_u8(w + 16 * q);
      const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
      sum[q] = add_products(line ? add_products(sum[q], low, x0) : products(low, x0), high, x1);
    }
  }
  UNROLL(4)
  for (int32_t q = 0; q < 4; q++)
    dots.val[q] = exact(vpaddlq_s16(vpaddq_s16(sum[q].low, sum[q].high)), vdupq_n_s32(START + more),
                        vdupq_n_f32(0x1.8p23f));
  return dots;
}

/* sum + the products of groups [first, end) of a panel with one row. */
SHOAL_INLINE v16 add_groups(v16 sum, const void *w, const int32_t type, const uint16_t *scales, const uint16_t *mins,
                            shoal_q8_row x, int32_t first, int32_t end) {
  for (int32_t g = first; g < end; g++) {
    const int8_t *in = x.q + g * SHOAL_GROUP;
    const size_t at = (size_t)g * SHOAL_PANEL;
    const v16 scale = v_load_f16(scales + at),
              dots = type == SHOAL_Q8
                         ? q8_group((const int8_t *)w + at * SHOAL_GROUP, in)
                         : q4_group((const uint8_t *)w + at * SHOAL_GROUP / 2, in, mins ? 0 : x.bias[g] >> 4);
    const v16 of_inputs = v_set1(x.scale[g]);
    sum = v_fma(dots, v_mul(scale, of_inputs), sum);
    /* The sum of the inputs is bias / -128; without minima the offset of 8 was subtracted in the dot product. */
    if (mins) sum = v_fma(v_set1((float)-(x.bias[g] >> 7)), v_mul(v_load_f16(mins + at), of_inputs), sum);
  }
  return sum;
}

/* Products of `rows` rows with a panel. Rows alternate every TURN groups, so that all but the first find their lines in L1.
 * The multiplier is the bottleneck here, not the loads. */
SHOAL_INLINE void dots(const void *w, const int32_t type, const uint16_t *scales, const uint16_t *mins,
                       const shoal_q8_row *x, const int32_t rows, v16 *sums) {
  const int32_t groups = x[0].groups, turn = rows > 1 ? TURN : groups;
  for (int32_t r = 0; r < rows; r++) sums[r] = v_set1(0.0f);
  for (int32_t g = 0; g < groups; g += turn) {
    const int32_t end = SHOAL_MIN(g + turn, groups);
    for (int32_t r = 0; r < rows; r++) sums[r] = add_groups(sums[r], w, type, scales, mins, x[r], g, end);
  }
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels, (void)ahead;
  dots(w, SHOAL_Q8, scales, NULL, x, rows, sums);
}

#define Q4_DOTS
SHOAL_INLINE void q4_dots(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                          const int32_t rows, const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels, (void)ahead;
  if (mins)
    dots(w, SHOAL_Q4, scales, mins, x, rows, sums);
  else
    dots(w, SHOAL_Q4, scales, NULL, x, rows, sums);
}

#define SHOAL_SET shoal_kernels_neon
#include "ops.inc"
#endif
