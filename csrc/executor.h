/* An opened program and one run of it: what program.c sets up and execute.c works through. */
#ifndef SHOAL_EXECUTOR_H
#define SHOAL_EXECUTOR_H

#include "common.h"

#include <stdatomic.h>

enum { SPAN_ROWS = 16 };

/* Up to SPAN_ROWS rows of one sequence, which ATTEND and STORE take at a time. */
typedef struct {
  int32_t sequence;
  int32_t base;      /* row of the batch that is the sequence's first */
  int32_t row, rows; /* within the sequence */
} shoal_span;

struct shoal_executor {
  shoal_program program; /* its tables are copies */
  const shoal_kernels *kernels;
  shoal_pool *pool;
  shoal_places *at; /* by op */
  int32_t *only_for; /* by op: the output for which alone it is run, or -1 */
  uint64_t *input_at, *output_at;
  char *workspace; /* aligned within workspace_memory: the buffers of all rows, after them those of wanted rows */
  void *workspace_memory;
  uint64_t row_bytes[2]; /* of the workspace, by domain */
  int32_t huge;          /* it was asked for in huge pages */
  char *scratch; /* the sampler's, per thread */
  size_t scratch_bytes;
  float *parts; /* of attention whose blocks are shared out; NULL with one thread */
  shoal_span *spans;
  int32_t *wanted; /* by wanted row: its row in the batch */
};

typedef struct {
  shoal_executor *e;
  const shoal_batch *batch;
  int32_t rows, wanted, n_spans;
  int64_t seen; /* sum over rows of the positions that each sees */
  _Atomic int32_t status;
  _Atomic int32_t where; /* the sequence that the status is about */
  int32_t op;            /* at hand */
  int64_t mark;          /* nanoseconds when the last op ended */
} shoal_run_state;

int64_t shoal_now_ns(void);

/* Runs all ops of the program once. */
void shoal_execute(shoal_run_state *run);

SHOAL_INLINE char *shoal_row(const shoal_run_state *r, uint64_t at, int32_t buffer, int32_t row) {
  const shoal_buffer *b = &r->e->program.buffers[buffer];
  const uint64_t all = (uint64_t)r->rows, wanted = (uint64_t)r->wanted;
  const uint64_t first = b->domain == SHOAL_ALL_ROWS ? at * all : r->e->row_bytes[SHOAL_ALL_ROWS] * all + at * wanted;
  return r->e->workspace + first + (size_t)row * shoal_row_bytes(b);
}

#endif
