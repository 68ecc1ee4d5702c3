/* 16 lanes in four registers of plain ARMv8.0 NEON. */
#include <arm_neon.h>

typedef float32x4x4_t v16;

#define FOUR(i, expression)                                     \
  v16 result;                                                   \
  SHOAL_UNROLL(4)                                               \
  for (int32_t i = 0; i < 4; i++) result.val[i] = (expression); \
  return result

SHOAL_INLINE v16 v_set1(float x) { FOUR(i, vdupq_n_f32(x)); }
SHOAL_INLINE v16 v_load(const float *p) { FOUR(i, vld1q_f32(p + 4 * i)); }
SHOAL_INLINE v16 v_add(v16 a, v16 b) { FOUR(i, vaddq_f32(a.val[i], b.val[i])); }
SHOAL_INLINE v16 v_sub(v16 a, v16 b) { FOUR(i, vsubq_f32(a.val[i], b.val[i])); }
SHOAL_INLINE v16 v_mul(v16 a, v16 b) { FOUR(i, vmulq_f32(a.val[i], b.val[i])); }
SHOAL_INLINE v16 v_div(v16 a, v16 b) { FOUR(i, vdivq_f32(a.val[i], b.val[i])); }
SHOAL_INLINE v16 v_fma(v16 a, v16 b, v16 c) { FOUR(i, vfmaq_f32(c.val[i], a.val[i], b.val[i])); }
SHOAL_INLINE v16 v_neg(v16 a) { FOUR(i, vnegq_f32(a.val[i])); }
SHOAL_INLINE v16 v_abs(v16 a) { FOUR(i, vabsq_f32(a.val[i])); }
SHOAL_INLINE v16 v_greater(v16 a, v16 b, v16 yes, v16 no) {
  FOUR(i, vbslq_f32(vcgtq_f32(a.val[i], b.val[i]), yes.val[i], no.val[i]));
}
/* Not fmax and fmin: those treat NaN and the two zeros their own way. */
SHOAL_INLINE v16 v_max(v16 a, v16 b) { return v_greater(a, b, a, b); }
SHOAL_INLINE v16 v_min(v16 a, v16 b) { return v_greater(b, a, a, b); }

SHOAL_INLINE uint32x4_t first_lanes(int32_t n) {
  static const int32_t LANE[4] = {0, 1, 2, 3};
  return vcgtq_s32(vdupq_n_s32(n), vld1q_s32(LANE));
}

SHOAL_INLINE v16 v_first(v16 a, v16 b, int32_t n) { FOUR(i, vbslq_f32(first_lanes(n - 4 * i), a.val[i], b.val[i])); }
SHOAL_INLINE v16 v_power(v16 n) {
  FOUR(i, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.val[i]), vdupq_n_s32(127)), 23)));
}
SHOAL_INLINE v16 v_load_f16(const uint16_t *p) { FOUR(i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }

SHOAL_INLINE v16 v_load_i8(const int8_t *p) {
  const int16x8_t a = vmovl_s8(vld1_s8(p)), b = vmovl_s8(vld1_s8(p + 8));
  return (v16){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(a))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(a))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(b))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(b)))}};
}

SHOAL_INLINE v16 v_load_n(const float *p, int32_t n) {
  float lanes[16] = {0};
  memcpy(lanes, p, (size_t)n * sizeof(float));
  return v_load(lanes);
}

SHOAL_INLINE void v_store(float *p, v16 a) {
  SHOAL_UNROLL(4)
  for (int32_t i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.val[i]);
}

SHOAL_INLINE void v_store_n(float *p, v16 a, int32_t n) {
  float lanes[16];
  v_store(lanes, a);
  memcpy(p, lanes, (size_t)n * sizeof(float));
}

SHOAL_INLINE void v_store_f16(uint16_t *p, v16 a) {
  SHOAL_UNROLL(4)
  for (int32_t i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.val[i])));
}

SHOAL_INLINE void v_store_i8(int8_t *p, v16 a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.val[0])), vmovn_s32(vcvtq_s32_f32(a.val[1])));
  const int16x8_t high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.val[2])), vmovn_s32(vcvtq_s32_f32(a.val[3])));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

SHOAL_INLINE float v_sum(v16 a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.val[0], a.val[2]), vaddq_f32(a.val[1], a.val[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

SHOAL_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }

SHOAL_INLINE float v_largest(v16 a) {
  const float32x4_t four = larger(larger(a.val[0], a.val[2]), larger(a.val[1], a.val[3]));
  const float32x4_t two = larger(four, vextq_f32(four, four, 2));
  const float x = vgetq_lane_f32(two, 0), y = vgetq_lane_f32(two, 1);
  return x > y ? x : y;
}
