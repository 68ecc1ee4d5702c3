/* Products with a panel by SDOT, for the kernel sets that have it. Included after a target pragma and lanes_neon.h.
 *
 * A line of weights is four registers of 4 outputs; one lane of 16 inputs is the quad that a line is multiplied with. The
 * vector units are the bottleneck of these loops, so work is moved elsewhere:
 * - Converting an integer to float takes two vector instructions. So sums start from the bits of 1.5 * 2^23: such a sum, read
 *   as a float, is that number plus the dot product, exactly.
 * - The starting values are loaded for each group, where the compiler would copy a vector register.
 * - int4 weights are multiplied as 0 to 15; the offset of 8 is subtracted together with the starting value. */

#define START_BITS 0x4b400000
#define FOUR_STARTS START_BITS, START_BITS, START_BITS, START_BITS
static const int32_t START[32] = {FOUR_STARTS, FOUR_STARTS, FOUR_STARTS, FOUR_STARTS,
                                  FOUR_STARTS, FOUR_STARTS, FOUR_STARTS, FOUR_STARTS};

/* The address of the starting values, hidden from the compiler. */
SHOAL_INLINE const int32_t *starts(void) {
  const int32_t *at = START;
  __asm__ volatile("" : "+r"(at));
  return at;
}

/* The sum accumulated since a starting value, as a float. */
SHOAL_INLINE float32x4_t since(float32x4_t start, int32x4_t sum) {
  return vsubq_f32(vreinterpretq_f32_s32(sum), start);
}

/* A float that multiplies a register by lane; without the empty assembly clang would broadcast it first. */
SHOAL_INLINE float factor(float x) {
  __asm__("" : "+w"(x));
  return x;
}

SHOAL_INLINE float32x4_t four_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

/* sum + the products of w's quads with quad `lane` of x. The lane is part of the instruction: a constant once the
 * caller's loop is unrolled. */
SHOAL_INLINE int32x4_t dot_lane(int32x4_t sum, int8x16_t w, int8x16_t x, const int32_t lane) {
  switch (lane) {
    case 0: return vdotq_laneq_s32(sum, w, x, 0);
    case 1: return vdotq_laneq_s32(sum, w, x, 1);
    case 2: return vdotq_laneq_s32(sum, w, x, 2);
    default: return vdotq_laneq_s32(sum, w, x, 3);
  }
}

enum { LINE = 64, HALF = 8, EXPANDED = -1 };

/* A panel from some group on. The type EXPANDED means int8 lines with scales and minima in f32, whatever the weight's type
 * is. */
typedef struct {
  const void *lines, *scales, *mins;
} panel_at;

/* The panel `groups` groups further, from output `first` on. */
SHOAL_INLINE panel_at panel_from(panel_at w, const int32_t type, int32_t groups, int32_t first) {
  const size_t line = type == SHOAL_Q4 ? SHOAL_GROUP / 2 : SHOAL_GROUP;
  const size_t number = type == EXPANDED ? sizeof(float) : sizeof(uint16_t);
  const size_t scale = ((size_t)groups * SHOAL_PANEL + first) * number;
  return (panel_at){(const char *)w.lines + groups * line * SHOAL_PANEL + first * SHOAL_QUAD,
                    (const char *)w.scales + scale, w.mins ? (const char *)w.mins + scale : NULL};
}

SHOAL_INLINE float32x4_t four_scales(const void *scales, const int32_t type, int32_t at) {
  return type == EXPANDED ? vld1q_f32((const float *)scales + at) : four_f16((const uint16_t *)scales + at);
}

SHOAL_INLINE int8x16_t low_nibbles(uint8x16_t both) { return vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))); }
SHOAL_INLINE int8x16_t high_nibbles(uint8x16_t both) { return vreinterpretq_s8_u8(vshrq_n_u8(both, 4)); }

/* Adds the products of groups [first, end) to the sums of `rows` rows and `quads` quads of outputs, sum[row * quads + quad].
 * `w` starts at group `first`; `mins` is 1 if its groups have minima. */
SHOAL_INLINE void sdot_groups(panel_at w, const int32_t type, const int32_t mins, const shoal_q8_row *x, int32_t first,
                              int32_t end, const int32_t rows, const int32_t quads, float32x4_t *sum) {
  const int32_t lines = type == SHOAL_Q4 ? 4 : 8;
  for (int32_t g = first; g < end; g++, w = panel_from(w, type, 1, 0)) {
    const int32_t *start = starts();
    int32x4_t dots[4 * 4];
    SHOAL_UNROLL(16)
    for (int32_t i = 0; i < rows * quads; i++) dots[i] = vld1q_s32(start + i % 8 * 4);
    int8x16_t in[4][2];
    SHOAL_UNROLL(4)
    for (int32_t r = 0; r < rows; r++) {
      in[r][0] = vld1q_s8(x[r].q + g * SHOAL_GROUP);
      in[r][1] = vld1q_s8(x[r].q + g * SHOAL_GROUP + 16);
    }
    SHOAL_UNROLL(8)
    for (int32_t line = 0; line < lines; line++) {
      SHOAL_UNROLL(4)
      for (int32_t q = 0; q < quads; q++) {
        const uint8x16_t four = vld1q_u8((const uint8_t *)w.lines + line * LINE + 16 * q);
        SHOAL_UNROLL(4)
        for (int32_t r = 0; r < rows; r++) {
          int32x4_t *dot = &dots[r * quads + q];
          if (type != SHOAL_Q4) {
            *dot = dot_lane(*dot, vreinterpretq_s8_u8(four), in[r][line / 4], line % 4);
            continue;
          }
          *dot = dot_lane(*dot, low_nibbles(four), in[r][0], line);
          *dot = dot_lane(*dot, high_nibbles(four), in[r][1], line);
        }
      }
    }
    SHOAL_UNROLL(4)
    for (int32_t r = 0; r < rows; r++) {
      float32x4_t start_was = vdupq_n_f32(0x1.8p23f); /* plus 8 times the sum of the inputs, which is bias / -128 */
      if (type == SHOAL_Q4 && !mins) start_was = vreinterpretq_f32_s32(vdupq_n_s32(START_BITS - (x[r].bias[g] >> 4)));
      const float scale = factor(x[r].scale[g]);
      SHOAL_UNROLL(4)
      for (int32_t q = 0; q < quads; q++) {
        float32x4_t *to = &sum[r * quads + q];
        *to = vfmaq_f32(*to, since(start_was, dots[r * quads + q]),
                        vmulq_n_f32(four_scales(w.scales, type, 4 * q), scale));
        if (!mins) continue;
        *to =
            vfmaq_n_f32(*to, vmulq_n_f32(four_scales(w.mins, type, 4 * q), scale), factor((float)-(x[r].bias[g] >> 7)));
      }
    }
  }
}

/* The 16 outputs of a panel for up to 4 rows. Registers hold the sums of 2 rows. For more rows the halves of a panel
 * alternate every TURN groups, so that the second half finds its lines in L1. */
SHOAL_INLINE void sdot_rows(panel_at w, const int32_t type, const int32_t mins, const shoal_q8_row *x,
                            const int32_t rows, v16 *sums) {
  enum { TURN = 16 };
  const int32_t groups = x[0].groups;
  float32x4_t sum[2][8];
  SHOAL_UNROLL(16)
  for (int32_t i = 0; i < 16; i++) sum[i / 8][i % 8] = vdupq_n_f32(0.0f);
  if (rows <= 2) {
    sdot_groups(w, type, mins, x, 0, groups, rows, 4, sum[0]);
    SHOAL_UNROLL(2)
    for (int32_t r = 0; r < rows; r++)
      sums[r] = (v16){{sum[0][4 * r], sum[0][4 * r + 1], sum[0][4 * r + 2], sum[0][4 * r + 3]}};
    return;
  }
  for (int32_t g = 0; g < groups; g += TURN, w = panel_from(w, type, TURN, 0)) {
    const int32_t end = SHOAL_MIN(g + TURN, groups);
    sdot_groups(w, type, mins, x, g, end, rows, 2, sum[0]);
    sdot_groups(panel_from(w, type, 0, HALF), type, mins, x, g, end, rows, 2, sum[1]);
  }
  SHOAL_UNROLL(4)
  for (int32_t r = 0; r < rows; r++)
    sums[r] = (v16){{sum[0][2 * r], sum[0][2 * r + 1], sum[1][2 * r], sum[1][2 * r + 1]}};
}

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels, (void)ahead;
  sdot_rows((panel_at){w, scales, NULL}, SHOAL_Q8, 0, x, rows, sums);
}

#define Q4_DOTS
SHOAL_INLINE void q4_dots(const uint8_t *w, const uint16_t *scales, const uint16_t *mins, const shoal_q8_row *x,
                          const int32_t rows, const int32_t panels, shoal_ahead ahead, v16 *sums) {
  (void)panels, (void)ahead;
  if (mins)
    sdot_rows((panel_at){w, scales, mins}, SHOAL_Q4, 1, x, rows, sums);
  else
    sdot_rows((panel_at){w, scales, NULL}, SHOAL_Q4, 0, x, rows, sums);
}
