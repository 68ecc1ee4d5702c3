/* What the C files share: kernels.h behind a guard, the table of functions that every kernel set fills, the pool's
 * verbs, and a few scalar helpers. */
#ifndef SHOAL_COMMON_H
#define SHOAL_COMMON_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#pragma GCC visibility push(default)
#include "kernels.h"
#pragma GCC visibility pop

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif
_Static_assert(FLT_EVAL_METHOD == 0, "floats must be rounded at every step: docs/numerics.md");
_Static_assert(sizeof(void *) == 8, "a 64-bit machine is needed");

#define SHOAL_INLINE static inline __attribute__((always_inline, unused))
#define SHOAL_APART __attribute__((noinline))
/* Before a loop whose turns each have registers of their own. */
#define SHOAL_UNROLL(n) SHOAL_PRAGMA(GCC unroll n)
#define SHOAL_PRAGMA(text) _Pragma(#text)
#define SHOAL_MIN(a, b) ((a) < (b) ? (a) : (b))
#define SHOAL_MAX(a, b) ((a) > (b) ? (a) : (b))
#define SHOAL_UP(n, m) (((n) + (m)-1) / (m) * (m))

/* A q8 row: int8 [padded cols], then one f32 scale a group, then, a group, int32 -128 times the sum of its int8. */
typedef struct {
  int8_t *q;
  float *scale;
  int32_t *bias;
  int32_t groups;
} shoal_q8_row;

SHOAL_INLINE int32_t shoal_groups(int32_t cols) { return (cols + SHOAL_GROUP - 1) / SHOAL_GROUP; }

SHOAL_INLINE shoal_q8_row shoal_q8(char *row, int32_t cols) {
  const int32_t groups = shoal_groups(cols);
  float *scale = (float *)(row + (size_t)groups * SHOAL_GROUP);
  return (shoal_q8_row){(int8_t *)row, scale, (int32_t *)(scale + groups), groups};
}

/* Number k of a group of packed weights, of the output in `lane`; groups are counted over all panels before. */
SHOAL_INLINE int32_t shoal_q8_at(const void *data, size_t group, size_t lane, int32_t k) {
  const int8_t *q = (const int8_t *)data + group * SHOAL_GROUP * SHOAL_PANEL;
  return q[((size_t)(k / SHOAL_QUAD) * SHOAL_PANEL + lane) * SHOAL_QUAD + k % SHOAL_QUAD];
}

SHOAL_INLINE int32_t shoal_q4_at(const void *data, size_t group, size_t lane, int32_t k) {
  const int32_t half = SHOAL_GROUP / 2;
  const uint8_t *q = (const uint8_t *)data + group * half * SHOAL_PANEL;
  const uint8_t both = q[((size_t)(k % half / SHOAL_QUAD) * SHOAL_PANEL + lane) * SHOAL_QUAD + k % SHOAL_QUAD];
  return k < half ? both & 15 : both >> 4;
}

/* Rows [row0, row1) of in and out times panels [panel0, panel1) of w; out is at w's first column. */
typedef struct {
  const char *in;
  char *out;
  size_t in_stride, out_stride; /* bytes between rows */
  const shoal_weight *w;
  const float *bias; /* by output of w, or NULL */
  int32_t row0, row1, panel0, panel1;
  int32_t add; /* 1: added to what out holds */
} shoal_matmul;

/* What a product with a block of rows prefetches. The only block (alone = 1, a constant) does so as its set likes best. If a
 * panel has several, each block fetches its share of the next panel to L2: at each group, lines [first, end) of the group
 * `bytes` further on. */
typedef struct {
  int32_t alone;
  int32_t first, end;
  size_t bytes;
} shoal_ahead;

SHOAL_INLINE void shoal_fetch_share(const void *group, shoal_ahead ahead) {
  if (ahead.alone) return;
  for (int32_t line = ahead.first; line < ahead.end; line++)
    __builtin_prefetch((const char *)group + ahead.bytes + line * SHOAL_PANEL * SHOAL_QUAD, 0, 2);
}

/* Rows [0, rows) of one sequence, from position first on, for the query heads of some kv heads. */
typedef struct {
  const char *in;     /* at the column of the first kv head's first query head; for STORE at the kv heads' keys */
  char *out;          /* for STORE unused */
  const char *values; /* STORE: at the kv heads' values */
  size_t in_stride, out_stride;
  void *const *pages;
  const shoal_state *state;
  int32_t kv_head, heads; /* kv heads [kv_head, kv_head + heads) */
  int32_t group;          /* query heads a kv head */
  int32_t first, rows;
  /* NULL, or of one row: what each block gives, shoal_part_floats a query, by block and query head, instead of out. The
   * work is pairs of a block and a kv head then, in an order that the kernels know, and these are [begin, end) of them. */
  float *parts;
  int32_t begin, end;
  float scale;
} shoal_attention;

/* What attention over one block leaves of a query: its largest score, its sum of weights, and from the 16th number on the
 * sum of weighted values. */
SHOAL_INLINE size_t shoal_part_floats(const shoal_state *s) { return SHOAL_LANES + (size_t)s->head_dim; }

/* One instruction set. Every entry gives the same bits as scalar.c's; what they mean stands in ops.inc. */
typedef struct {
  void (*embed)(const shoal_weight *table, int32_t token, float *out);
  void (*norm)(const float *x, const float *w, int32_t cols, float epsilon, float *out);
  void (*norm_q8)(const float *x, const float *w, int32_t cols, float epsilon, char *out);
  void (*quantise)(const float *x, int32_t cols, char *out);
  void (*gate)(const float *x, int32_t cols, int32_t activation, float *out);
  void (*gate_q8)(const float *x, int32_t cols, int32_t activation, char *out);
  void (*rope)(float *x, const float *angles, int32_t heads, int32_t head_dim, int32_t half);
  void (*store)(const shoal_attention *task);
  void (*attend)(const shoal_attention *task);
  void (*join)(const shoal_attention *task); /* all parts to out */
  void (*matmul_q8)(const shoal_matmul *task);
  void (*matmul_q4)(const shoal_matmul *task);
  void (*matmul_f32)(const shoal_matmul *task);
  int32_t (*finite)(const float *x, int64_t n);
  float (*largest)(const float *x, int32_t n); /* n >= 1 */
  void (*exponentials)(const float *x, int32_t n, float largest, float divisor,
                       float *out); /* exp((x - largest) / divisor) */
} shoal_kernels;

extern const shoal_kernels shoal_kernels_scalar, shoal_kernels_avx2, shoal_kernels_avxvnni, shoal_kernels_avx512;
extern const shoal_kernels shoal_kernels_neon, shoal_kernels_neon_dot, shoal_kernels_neon_i8mm;

/* The compiler makes code for extensions of NEON in functions that ask for them. (clang before 16 hides the intrinsics
 * unless the whole build may use them.) */
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define SHOAL_ARM_EXTENSIONS 1
#endif

/* dispatch.c: NULL when this build or CPU has not the set. */
const shoal_kernels *shoal_kernels_of(int32_t isa);

/* angles.c */
void shoal_angles(int32_t position, const double *inv_freq, int32_t half, float *out);

/* sample.c: draws the token at `position`, after history[0 .. position); scratch is shoal_sample_scratch(vocab) bytes.
 * -1: a logit is not finite. */
enum { SHOAL_MOST_LIKELY = 64 };
size_t shoal_sample_scratch(int32_t vocab);
static inline int32_t shoal_penalises(const shoal_sampling *s) {
  return s->repetition_penalty != 1.0f || s->presence_penalty != 0.0f || s->frequency_penalty != 0.0f;
}
static inline int32_t shoal_is_allowed(const uint8_t *allowed, int32_t token) {
  return !allowed || (allowed[token / 8] >> token % 8 & 1);
}
/* The log-probabilities of reports[0], the drawn or given token, and of the n - 1 likeliest tokens, by the logits as the model gives
 * them. */
void shoal_report(const shoal_kernels *kernels, const float *logits, int32_t vocab, int32_t n, int32_t *reports,
                  float *logprobs, void *scratch);
int32_t shoal_sample(const shoal_kernels *kernels, const float *logits, int32_t vocab, const shoal_sampling *sampling,
                     const int32_t *history, int32_t position, void *scratch);

/* ops.c: one row a kind of op. The checks, the workspace plan and the executor read what is common to kinds from it; only
 * what one kind alone has (a formula, a limit on its parameters) is in their code. */
enum {
  SHOAL_READS_IN = 1,      /* the buffer `in` */
  SHOAL_READS_ANGLES = 2,  /* the buffer `angles`: f32, in rows like out */
  SHOAL_WRITES_OUT = 4,    /* the buffer `out`, anew unless shoal_keeps_out */
  SHOAL_IN_PLACE = 8,      /* `out` is read and changed */
  SHOAL_ACCUMULATES = 16,  /* with accumulate = 1 the result is added to `out` */
  SHOAL_GATHERS = 32,      /* `out` may hold the wanted rows of an `in` that holds all rows */
  SHOAL_HAS_STATE = 64,    /* uses the pages of `state` */
  SHOAL_HAS_BIASES = 128   /* may have biases */
};

/* How an op's work is shared out over threads. */
typedef enum { SHOAL_BY_ROWS, SHOAL_BY_PANELS, SHOAL_BY_SPANS, SHOAL_BY_KV_HEADS, SHOAL_BY_WANTED } shoal_split;

typedef struct {
  const char *name;
  int32_t flags;
  int32_t in_types, out_types;       /* sets of enum shoal_type: bits 1 << type */
  int32_t domains;                   /* set of enum shoal_domain that `in` and `out` may have */
  int32_t least_weights, most_weights;
  int32_t weight_types;              /* set of enum shoal_type */
  shoal_split split;
} shoal_op_info;

/* NULL: no such kind. */
const shoal_op_info *shoal_op_info_of(int32_t kind);
/* 1: `out` was written before this op, which changes it. */
int32_t shoal_keeps_out(const shoal_op *op);

/* check.c and batch.c: SHOAL_OK, or a status whose reason stands in error. */
int32_t shoal_check_program(const shoal_program *program, char *error, int32_t error_bytes);
int32_t shoal_check_batch(const shoal_program *program, const shoal_batch *batch, char *error, int32_t error_bytes);

/* plan.c: places every buffer for the ops between its writing and its last reading; at[i] are offsets of op i's out, in and
 * angles, input_at and output_at those of the program's inputs and outputs; bytes is the whole of a domain. All in bytes
 * a row of the buffer's domain: times the rows of a batch, they are where its buffers begin. */
typedef struct {
  uint64_t out, in, angles;
} shoal_places;
size_t shoal_row_bytes(const shoal_buffer *buffer);
int32_t shoal_plan(const shoal_program *program, shoal_places *at, uint64_t *input_at, uint64_t *output_at,
                   uint64_t bytes[2]);

/* message.c: writes a message with %d (int32), %u (uint64), %s and %%; gives status back. */
int32_t shoal_fail(char *error, int32_t error_bytes, int32_t status, const char *format, ...);

/* pool.c */
int32_t shoal_pool_threads(const shoal_pool *pool);
int32_t shoal_pool_take(shoal_pool *pool); /* 0: another run has it */
void shoal_pool_give(shoal_pool *pool);
/* Calls body for parts of [0, units) on whichever threads are there; returns when all are done. A part is `claim` units;
 * with `shares` (else 0) the first parts are large ones, as many as that, and those after them no less than `claim`.
 * 0 < units < 2^32. */
void shoal_pool_run(shoal_pool *pool, void (*body)(void *argument, int64_t first, int64_t last, int32_t thread),
                    void *argument, int64_t units, int64_t claim, int64_t shares);

/* fenv.c: round to nearest, no flush to zero; gives what was set before. */
uint64_t shoal_fenv_set(void);
void shoal_fenv_restore(uint64_t before);

SHOAL_INLINE uint32_t shoal_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

SHOAL_INLINE float shoal_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

SHOAL_INLINE int32_t shoal_is_finite(float x) { return (shoal_bits(x) & 0x7f800000u) != 0x7f800000u; }

SHOAL_INLINE float shoal_f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) /* infinity, NaN made quiet */
    return shoal_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0));
  if (magnitude >= 0x400u) return shoal_float(sign | ((magnitude << 13) + 0x38000000u));
  const float x = (float)magnitude * 0x1p-24f; /* subnormal in f16, exact in f32 */
  return shoal_float(sign | shoal_bits(x));
}

/* To nearest, ties to even. */
SHOAL_INLINE uint16_t shoal_f32_to_f16(float x) {
  const uint32_t u = shoal_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above */
  if (magnitude >= 0x38800000u) {
    const uint32_t odd = magnitude >> 13 & 1;
    return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13);
  }
  /* Below 2^-14 the unit is 2^-24: adding 0.5, whose last bit is 2^-24, rounds there. */
  const float rounded = shoal_float(magnitude) + 0.5f;
  return (uint16_t)(sign | (shoal_bits(rounded) - 0x3f000000u));
}

#endif
