/* Expands a few groups of a panel, nibbles to int8 and scales to f32, once for all tiles of many rows. Included after
 * lanes_neon.h. */

enum { PACKED_GROUPS = 8 };

typedef struct {
  const int8_t *lines; /* int8: points into the weight itself */
  int8_t room[PACKED_GROUPS * SHOAL_GROUP * SHOAL_PANEL] __attribute__((aligned(64)));
  float scales[PACKED_GROUPS * SHOAL_PANEL], mins[PACKED_GROUPS * SHOAL_PANEL];
} packed_panel;

/* Expands both halves of a group's inputs, minus `less`: 8 where the weight has no minima. */
SHOAL_INLINE void expand_group(int8_t *to, const uint8_t *from, int8x16_t less) {
  const int32_t half = SHOAL_GROUP / 2 * SHOAL_PANEL;
  for (int32_t i = 0; i < half; i += 16) {
    const uint8x16_t both = vld1q_u8(from + i);
    vst1q_s8(to + i, vsubq_s8(vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15))), less));
    vst1q_s8(to + half + i, vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(both, 4)), less));
  }
}

SHOAL_INLINE void pack_panel(packed_panel *to, const int32_t type, const void *data, const uint16_t *scales,
                             const uint16_t *mins, int32_t groups) {
  to->lines = type == SHOAL_Q8 ? data : to->room;
  for (int32_t g = 0; g < groups; g++) {
    if (type == SHOAL_Q4)
      expand_group(to->room + g * SHOAL_GROUP * SHOAL_PANEL, (const uint8_t *)data + g * SHOAL_GROUP / 2 * SHOAL_PANEL,
                   vdupq_n_s8(mins ? 0 : 8));
    v_store(to->scales + g * SHOAL_PANEL, v_load_f16(scales + g * SHOAL_PANEL));
    if (mins) v_store(to->mins + g * SHOAL_PANEL, v_load_f16(mins + g * SHOAL_PANEL));
  }
}
