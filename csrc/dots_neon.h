/* int8 products of a panel by SDOT, for the sets that have it. Included below a target pragma and lanes_neon.h.
 *
 * A line of weights is four registers of 4 outputs; one lane of 16 inputs is the quad that a line is multiplied with. */

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

/* The 16 outputs of a panel for up to 4 rows. One row has too few sums to keep two multipliers busy, so that the lines
 * of its group go to two sums in turn. */
SHOAL_INLINE void sdot_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                            v16 *sums) {
  const int32_t groups = x[0].groups, chains = rows == 1 ? 2 : 1;
  v16 sum[4];
  SHOAL_UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sum[r] = v_set1(0.0f);
  for (int32_t g = 0; g < groups; g++, w += SHOAL_GROUP * SHOAL_PANEL, scales += SHOAL_PANEL) {
    int32x4_t dots[4 * 2][4];
    SHOAL_UNROLL(4)
    for (int32_t i = 0; i < rows * chains; i++) {
      SHOAL_UNROLL(4)
      for (int32_t q = 0; q < 4; q++) dots[i][q] = vdupq_n_s32(0);
    }
    SHOAL_UNROLL(2)
    for (int32_t k = 0; k < SHOAL_GROUP; k += 16) {
      int8x16_t in[4];
      SHOAL_UNROLL(4)
      for (int32_t r = 0; r < rows; r++) in[r] = vld1q_s8(x[r].q + g * SHOAL_GROUP + k);
      SHOAL_UNROLL(4)
      for (int32_t lane = 0; lane < 4; lane++) {
        SHOAL_UNROLL(4)
        for (int32_t q = 0; q < 4; q++) {
          const int8x16_t four = vld1q_s8(w + (k + SHOAL_QUAD * lane) * SHOAL_PANEL + 16 * q);
          SHOAL_UNROLL(4)
          for (int32_t r = 0; r < rows; r++) {
            const int32_t i = r + lane % chains;
            dots[i][q] = dot_lane(dots[i][q], four, in[r], lane);
          }
        }
      }
    }
    const v16 of_weights = v_load_f16(scales);
    SHOAL_UNROLL(4)
    for (int32_t r = 0; r < rows; r++) {
      SHOAL_UNROLL(4)
      for (int32_t q = 0; q < 4; q++) {
        const int32x4_t dot = chains == 2 ? vaddq_s32(dots[0][q], dots[1][q]) : dots[r][q];
        sum[r].val[q] = vfmaq_f32(sum[r].val[q], vcvtq_f32_s32(dot), vmulq_n_f32(of_weights.val[q], x[r].scale[g]));
      }
    }
  }
  SHOAL_UNROLL(4)
  for (int32_t r = 0; r < rows; r++) sums[r] = sum[r];
}
