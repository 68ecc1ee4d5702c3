/* NEON with SDOT, which adds four products per lane: most phones since 2019, Raspberry Pi 5. */
#include "common.h"

#if defined(SHOAL_ARM_EXTENSIONS)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "lanes_neon.h"

#include "dots_neon.h"
#include "expand_neon.h"

#define Q8_BIAS 1
#define Q8_ROWS 4
#define Q8_TILE 4
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_MANY 4
#define ATTEND_WIDTH 1
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

#define PACKED_ROWS 4

/* Inputs are not packed: they are read in place. */
typedef struct {
  shoal_q8_row row[PACKED_ROWS];
  int32_t first;
} packed_rows;

SHOAL_INLINE void pack_rows(packed_rows *to, const shoal_q8_row *x, int32_t first, int32_t groups) {
  (void)groups;
  memcpy(to->row, x, sizeof to->row);
  to->first = first;
}

/* Registers hold the sums of 4 rows and half a panel. */
SHOAL_INLINE void packed_half(panel_at w, const int32_t mins, const packed_rows *x, int32_t groups, v16 *sums,
                              const int32_t half) {
  float32x4_t sum[2 * PACKED_ROWS];
  UNROLL(8)
  for (int32_t i = 0; i < 2 * PACKED_ROWS; i++) sum[i] = sums[i / 2].val[2 * half + i % 2];
  sdot_groups(panel_from(w, EXPANDED, 0, half * HALF), EXPANDED, mins, x->row, x->first, x->first + groups, PACKED_ROWS,
              2, sum);
  UNROLL(8)
  for (int32_t i = 0; i < 2 * PACKED_ROWS; i++) sums[i / 2].val[2 * half + i % 2] = sum[i];
}

SHOAL_INLINE void packed_dots(const packed_panel *w, const packed_rows *x, int32_t groups, int32_t mins, v16 *sums) {
  const panel_at at = {w->lines, w->scales, mins ? w->mins : NULL};
  for (int32_t half = 0; half < 2; half++) {
    if (mins)
      packed_half(at, 1, x, groups, sums, half);
    else
      packed_half(at, 0, x, groups, sums, half);
  }
}

SHOAL_INLINE v16 packed_sum(const v16 *sums, int32_t row) { return sums[row]; }

#define SHOAL_SET shoal_kernels_neon_dot
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
