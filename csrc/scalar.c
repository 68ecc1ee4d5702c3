/* The definition: 16 lanes are an array of floats, every fma is fmaf, every dot product is a loop. Every other set must
 * equal this one bit for bit. The ops themselves stand in ops.inc, attend.inc and matmul.inc, which all sets share. */
#include "common.h"

#include <math.h>

typedef struct {
  float lane[16];
} v16;

/* Calls, not inlined: the compiler would unroll every loop over lanes at every use, for ten times the code. */
#define LANES static __attribute__((noinline, unused))

#define EACH(expression)                                     \
  v16 r;                                                     \
  for (int32_t i = 0; i < 16; i++) r.lane[i] = (expression); \
  return r

LANES v16 v_set1(float x) { EACH(x); }
LANES v16 v_load(const float *p) { EACH(p[i]); }
LANES v16 v_load_n(const float *p, int32_t n) { EACH(i < n ? p[i] : 0.0f); }
LANES v16 v_add(v16 a, v16 b) { EACH(a.lane[i] + b.lane[i]); }
LANES v16 v_sub(v16 a, v16 b) { EACH(a.lane[i] - b.lane[i]); }
LANES v16 v_mul(v16 a, v16 b) { EACH(a.lane[i] * b.lane[i]); }
LANES v16 v_div(v16 a, v16 b) { EACH(a.lane[i] / b.lane[i]); }
LANES v16 v_fma(v16 a, v16 b, v16 c) { EACH(fmaf(a.lane[i], b.lane[i], c.lane[i])); }
LANES v16 v_neg(v16 a) { EACH(-a.lane[i]); }
LANES v16 v_abs(v16 a) { EACH(shoal_float(shoal_bits(a.lane[i]) & 0x7fffffffu)); }
LANES v16 v_max(v16 a, v16 b) { EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
LANES v16 v_min(v16 a, v16 b) { EACH(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
/* a > b ? yes : no */
LANES v16 v_greater(v16 a, v16 b, v16 yes, v16 no) { EACH(a.lane[i] > b.lane[i] ? yes.lane[i] : no.lane[i]); }
/* The first n lanes of a, the others of b. */
LANES v16 v_first(v16 a, v16 b, int32_t n) { EACH(i < n ? a.lane[i] : b.lane[i]); }
/* 2^n for whole n in [-126, 127] */
LANES v16 v_power(v16 n) { EACH(shoal_float((uint32_t)((int32_t)n.lane[i] + 127) << 23)); }
LANES v16 v_load_i8(const int8_t *p) { EACH((float)p[i]); }
LANES v16 v_load_f16(const uint16_t *p) { EACH(shoal_f16_to_f32(p[i])); }

LANES void v_store(float *p, v16 a) { memcpy(p, a.lane, sizeof a.lane); }

LANES void v_store_n(float *p, v16 a, int32_t n) { memcpy(p, a.lane, (size_t)n * sizeof(float)); }

LANES void v_store_f16(uint16_t *p, v16 a) {
  for (int32_t i = 0; i < 16; i++) p[i] = shoal_f32_to_f16(a.lane[i]);
}

/* Lanes are whole numbers in [-127, 127]. */
LANES void v_store_i8(int8_t *p, v16 a) {
  for (int32_t i = 0; i < 16; i++) p[i] = (int8_t)a.lane[i];
}

/* The tree of every sum: lane i joins lane i + 8, then i + 4, i + 2, i + 1. */
LANES float v_sum(v16 a) {
  for (int32_t step = 8; step; step /= 2)
    for (int32_t i = 0; i < step; i++) a.lane[i] += a.lane[i + step];
  return a.lane[0];
}

LANES float v_largest(v16 a) {
  for (int32_t step = 8; step; step /= 2)
    for (int32_t i = 0; i < step; i++) a.lane[i] = a.lane[i] > a.lane[i + step] ? a.lane[i] : a.lane[i + step];
  return a.lane[0];
}

/* What the shared files need to know of a set; none of it changes a result. */
#define Q8_BIAS 0        /* whether q8_dots reads the bias of q8 rows */
#define Q8_ROWS 1        /* rows of a product up to which one block of rows has them all: 1, 3, 4, 8 or 11 */
#define Q8_BLOCK 1       /* rows of a block when there are several, at most */
#define Q8_EVEN 0        /* 1: blocks of nearly equal size; 0: the last block has the rest */
#define Q8_PANELS 1      /* panels of a tile, of long prompts and in attention; if more than 1, Q8_TILE is its rows */
#define ATTEND_QUERIES 1 /* queries that share the loads of keys and values: 1, 4 or more */
#define ATTEND_MANY 1    /* the same while more than a few wait */
#define ATTEND_WIDTH 1   /* lines of values that a query sums at once */
#define ATTEND_CHAINS 4  /* sums of all queries at once, as far as registers hold */
#define F32_TILE 1       /* rows of a tile of the f32 product */
#define UNROLL(n)        /* how a loop of n turns over registers is unrolled */

/* sums[r * panels + p] = the panel's 16 outputs for row r, over all groups in ascending order. */
SHOAL_INLINE void q8_dots(const int8_t *w, const uint16_t *scales, const shoal_q8_row *x, int32_t rows, int32_t panels,
                          shoal_ahead ahead, v16 *sums) {
  (void)ahead;
  const int32_t groups = x[0].groups;
  for (int32_t r = 0; r < rows; r++) {
    for (int32_t p = 0; p < panels; p++) {
      v16 sum = v_set1(0.0f);
      for (int32_t g = 0; g < groups; g++) {
        const size_t group = (size_t)p * groups + g;
        const uint16_t *scale = scales + group * SHOAL_PANEL;
        for (int32_t i = 0; i < SHOAL_PANEL; i++) {
          int32_t dot = 0;
          for (int32_t k = 0; k < SHOAL_GROUP; k++)
            dot += shoal_q8_at(w, group, i, k) * x[r].q[g * SHOAL_GROUP + k];
          sum.lane[i] = fmaf((float)dot, shoal_f16_to_f32(scale[i]) * x[r].scale[g], sum.lane[i]);
        }
      }
      sums[r * panels + p] = sum;
    }
  }
}

#define SHOAL_SET shoal_kernels_scalar
#include "ops.inc"
