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
#define Q8_BLOCK 4
#define Q8_EVEN 0
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_MANY 4
#define ATTEND_WIDTH 1
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

#define PACKED_FROM(type) ((type) == SHOAL_Q8 ? 32 : 17)
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

/* The quads of outputs [from, from + quads) of a panel. Registers hold the sums of 2 rows, or of 4 rows and half a panel. */
SHOAL_INLINE void packed_quads(panel_at w, const int32_t mins, const packed_rows *x, int32_t groups, v16 *sums,
                               const int32_t rows, const int32_t from, const int32_t quads) {
  float32x4_t sum[2 * PACKED_ROWS];
  UNROLL(8)
  for (int32_t i = 0; i < rows * quads; i++) sum[i] = sums[i / quads].val[from + i % quads];
  sdot_groups(panel_from(w, EXPANDED, 0, from * SHOAL_QUAD), EXPANDED, mins, x->row, x->first, x->first + groups, rows,
              quads, sum);
  UNROLL(8)
  for (int32_t i = 0; i < rows * quads; i++) sums[i / quads].val[from + i % quads] = sum[i];
}

SHOAL_INLINE void packed_some(panel_at w, const int32_t mins, const packed_rows *x, int32_t groups, v16 *sums,
                              const int32_t rows) {
  if (rows <= 2) {
    packed_quads(w, mins, x, groups, sums, rows, 0, 4);
    return;
  }
  for (int32_t half = 0; half < 2; half++) packed_quads(w, mins, x, groups, sums, rows, 2 * half, 2);
}

SHOAL_INLINE void packed_count(panel_at w, const int32_t mins, const packed_rows *x, int32_t groups, v16 *sums,
                               const int32_t rows) {
  switch (rows) {
    case 1: packed_some(w, mins, x, groups, sums, 1); break;
    case 2: packed_some(w, mins, x, groups, sums, 2); break;
    case 3: packed_some(w, mins, x, groups, sums, 3); break;
    default: packed_some(w, mins, x, groups, sums, 4);
  }
}

SHOAL_INLINE void packed_dots(const packed_panel *w, const packed_rows *x, int32_t rows, int32_t groups, int32_t mins,
                              v16 *sums) {
  const panel_at at = {w->lines, w->scales, mins ? w->mins : NULL};
  if (mins)
    packed_count(at, 1, x, groups, sums, rows);
  else
    packed_count(at, 0, x, groups, sums, rows);
}

SHOAL_INLINE v16 packed_sum(const v16 *sums, int32_t row) { return sums[row]; }

#define SHOAL_SET shoal_kernels_neon_dot
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
