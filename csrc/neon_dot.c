/* NEON with SDOT, four products a lane: most phones since 2019, Raspberry Pi 5. */
#include "common.h"

#if defined(SHOAL_ARM_EXTENSIONS)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "lanes_neon.h"

#include "dots_neon.h"

#define Q8_BIAS 0
#define Q8_ROWS 4
#define Q8_TILE 4
#define Q8_PANELS 1
#define ATTEND_QUERIES 4
#define ATTEND_WIDTH 1
#define ATTEND_CHAINS 4
#define F32_TILE 1
#define UNROLL SHOAL_UNROLL

SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, const int32_t rows,
                          const int32_t panels, v16 *sums) {
  (void)panels;
  sdot_dots(w, scales, x, rows, sums);
}

#define SHOAL_SET shoal_kernels_neon_dot
#include "ops.inc"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
