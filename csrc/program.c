/* Opens a program (checks it, copies its tables, plans its workspace) and runs batches through it. */
#include "executor.h"

#include <stdlib.h>

enum { ALIGN = 64, HUGE_PAGE = 2 << 20, ADVISE_HUGE_PAGES = 14 };
int madvise(void *address, size_t length, int advice); /* sys/mman.h's, the same on glibc, musl and bionic */

static void *copy(const void *rows, int32_t n, size_t size) {
  char *to = malloc((size_t)n * size + 1);
  if (to && n) memcpy(to, rows, (size_t)n * size);
  return to;
}

/* Fields that an op's kind does not use may hold anything: they are cleared, so that none can be used as an index. */
static void clear_unused(shoal_op *op) {
  if (!shoal_op_info_of(op->kind)->most_weights) op->n_weights = 0;
  for (int32_t i = op->n_weights; i < SHOAL_MAX_PARTS; i++) op->weights[i] = 0;
  if (!(shoal_op_info_of(op->kind)->flags & SHOAL_HAS_BIASES)) op->n_biases = 0;
  for (int32_t i = op->n_biases; i < SHOAL_MAX_PARTS; i++) op->biases[i] = -1;
}

static int32_t copy_tables(shoal_executor *e, const shoal_program *p) {
  shoal_op *ops = copy(p->ops, p->n_ops, sizeof *ops);
  e->program = *p;
  e->program.ops = ops;
  e->program.buffers = copy(p->buffers, p->n_buffers, sizeof *p->buffers);
  e->program.weights = copy(p->weights, p->n_weights, sizeof *p->weights);
  e->program.states = copy(p->states, p->n_states, sizeof *p->states);
  e->program.inputs = copy(p->inputs, p->n_inputs, sizeof *p->inputs);
  e->program.outputs = copy(p->outputs, p->n_outputs, sizeof *p->outputs);
  for (int32_t i = 0; ops && i < p->n_ops; i++) clear_unused(&ops[i]);
  return ops && e->program.buffers && e->program.weights && e->program.states && e->program.inputs &&
         e->program.outputs;
}

/* The tables are the executor's own copies: const only to those who read them. */
static void drop(const void *table) { free((void *)(uintptr_t)table); }

void shoal_close(shoal_executor *e) {
  if (!e) return;
  drop(e->program.ops);
  drop(e->program.buffers);
  drop(e->program.weights);
  drop(e->program.states);
  drop(e->program.inputs);
  drop(e->program.outputs);
  free(e->at);
  free(e->only_for);
  free(e->input_at);
  free(e->output_at);
  free(e->workspace_memory);
  free(e->scratch);
  free(e->parts);
  free(e->spans);
  free(e->wanted);
  free(e);
}

static uint64_t workspace_bytes(const shoal_executor *e, int32_t rows, int32_t wanted) {
  return e->row_bytes[SHOAL_ALL_ROWS] * (uint64_t)rows + e->row_bytes[SHOAL_WANTED_ROWS] * (uint64_t)wanted;
}

/* The output that an op writes and no later op touches: a run that does not ask for it can leave the op out. -1: none. */
static int32_t only_for(const shoal_program *p, int32_t index) {
  const shoal_op *op = &p->ops[index];
  if (!(shoal_op_info_of(op->kind)->flags & SHOAL_WRITES_OUT) || shoal_keeps_out(op)) return -1;
  for (int32_t i = index + 1; i < p->n_ops; i++) {
    const shoal_op *later = &p->ops[i];
    const int32_t flags = shoal_op_info_of(later->kind)->flags;
    if ((flags & SHOAL_READS_IN && later->in == op->out) || (flags & SHOAL_READS_ANGLES && later->angles == op->out) ||
        (flags & SHOAL_WRITES_OUT && later->out == op->out))
      return -1;
  }
  for (int32_t i = 0; i < p->n_outputs; i++)
    if (p->outputs[i] == op->out) return i;
  return -1;
}

static int32_t make_room(shoal_executor *e) {
  const shoal_program *p = &e->program;
  e->at = calloc((size_t)p->n_ops + 1, sizeof *e->at);
  e->only_for = calloc((size_t)p->n_ops + 1, sizeof *e->only_for);
  e->input_at = calloc((size_t)p->n_inputs + 1, sizeof *e->input_at);
  e->output_at = calloc((size_t)p->n_outputs + 1, sizeof *e->output_at);
  e->spans = calloc((size_t)p->max_rows, sizeof *e->spans);
  e->wanted = calloc((size_t)p->max_rows, sizeof *e->wanted);
  if (!e->at || !e->only_for || !e->input_at || !e->output_at || !e->spans || !e->wanted) return SHOAL_E_MEMORY;
  if (shoal_plan(p, e->at, e->input_at, e->output_at, e->row_bytes)) return SHOAL_E_MEMORY;
  for (int32_t i = 0; i < p->n_ops; i++) e->only_for[i] = only_for(p, i);
  for (int32_t i = 0; i < p->n_ops; i++)
    if (p->ops[i].kind == SHOAL_OP_SAMPLE)
      e->scratch_bytes =
          SHOAL_MAX(e->scratch_bytes, SHOAL_UP(shoal_sample_scratch(p->buffers[p->ops[i].in].cols), (size_t)ALIGN));
  /* Not cleared: the pages of a large workspace are not even touched before rows need them. */
  e->workspace_memory = malloc(workspace_bytes(e, p->max_rows, p->max_wanted) + HUGE_PAGE);
  e->scratch = malloc(e->scratch_bytes * (size_t)shoal_pool_threads(e->pool) + 1);
  const int32_t several = shoal_pool_threads(e->pool) > 1;
  if (several) e->parts = malloc(SHOAL_PART_BYTES);
  if (!e->workspace_memory || !e->scratch || (several && !e->parts)) return SHOAL_E_MEMORY;
  e->workspace = (char *)SHOAL_UP((uintptr_t)e->workspace_memory, HUGE_PAGE);
  return SHOAL_OK;
}

int32_t shoal_open(const shoal_program *program, shoal_pool *pool, int32_t isa, shoal_executor **executor, char *error,
                   int32_t error_bytes) {
  if (!executor) return shoal_fail(error, error_bytes, SHOAL_E_PROGRAM, "executor is NULL");
  *executor = NULL;
  const int32_t status = shoal_check_program(program, error, error_bytes);
  if (status) return status;
  if (!pool) return shoal_fail(error, error_bytes, SHOAL_E_PROGRAM, "the pool is NULL");
  const shoal_kernels *kernels = shoal_kernels_of(isa);
  if (!kernels)
    return shoal_fail(error, error_bytes, SHOAL_E_ISA, "this CPU or build has no kernels for %s", shoal_isa_name(isa));
  shoal_executor *e = calloc(1, sizeof *e);
  if (e) {
    e->kernels = kernels;
    e->pool = pool;
  }
  if (!e || !copy_tables(e, program) || make_room(e)) {
    shoal_close(e);
    return shoal_fail(error, error_bytes, SHOAL_E_MEMORY, "out of memory");
  }
  *executor = e;
  return SHOAL_OK;
}

uint64_t shoal_workspace_bytes(const shoal_executor *e) {
  const shoal_program *p = &e->program;
  return workspace_bytes(e, p->max_rows, p->max_wanted) + e->scratch_bytes * (uint64_t)shoal_pool_threads(e->pool) +
         (e->parts ? SHOAL_PART_BYTES : 0);
}

/* Many rows are written in strides of pages: huge pages make a prompt 3 % quicker. Few would not fill one; what they have
 * touched by then stays in small ones. */
static void advise_huge_pages(shoal_run_state *r) {
  shoal_executor *e = r->e;
  const shoal_program *p = &e->program;
  if (e->huge || workspace_bytes(e, r->rows, r->wanted) < HUGE_PAGE) return;
  e->huge = 1;
  const uint64_t whole = workspace_bytes(e, p->max_rows, p->max_wanted) / HUGE_PAGE * HUGE_PAGE;
  madvise(e->workspace, whole, ADVISE_HUGE_PAGES); /* may fail: not needed */
}

/* Which rows there are, which are wanted, and how sequences fall into spans. */
static void lay_out(shoal_run_state *r) {
  shoal_executor *e = r->e;
  for (int32_t i = 0; i < r->batch->n_sequences; i++) {
    const shoal_sequence *s = &r->batch->sequences[i];
    for (int32_t row = 0; row < s->rows; row += SPAN_ROWS)
      e->spans[r->n_spans++] = (shoal_span){i, r->rows, row, SHOAL_MIN(s->rows - row, SPAN_ROWS)};
    for (int32_t row = s->rows - s->wanted; row < s->rows; row++) {
      r->batch->drawn[r->wanted] = -1;
      e->wanted[r->wanted++] = r->rows + row;
    }
    r->rows += s->rows;
    r->seen += (int64_t)s->rows * s->first + (int64_t)s->rows * (s->rows + 1) / 2;
  }
}

static int32_t take_inputs(const shoal_run_state *r) {
  const shoal_program *p = &r->e->program;
  for (int32_t i = 0; i < p->n_inputs; i++) {
    const int32_t cols = p->buffers[p->inputs[i]].cols;
    if (!r->e->kernels->finite(r->batch->inputs[i], (int64_t)r->rows * cols)) return i;
    for (int32_t row = 0; row < r->rows; row++)
      memcpy(shoal_row(r, r->e->input_at[i], p->inputs[i], row), r->batch->inputs[i] + (size_t)row * cols,
             (size_t)cols * sizeof(float));
  }
  return -1;
}

/* Copies what the caller wants; gives the first output that is not finite, or -1. */
static int32_t give_outputs(const shoal_run_state *r) {
  const shoal_program *p = &r->e->program;
  for (int32_t i = 0; i < p->n_outputs; i++) {
    const shoal_buffer *b = &p->buffers[p->outputs[i]];
    const int32_t rows = b->domain == SHOAL_ALL_ROWS ? r->rows : r->wanted;
    for (int32_t row = 0; r->batch->outputs[i] && row < rows; row++) {
      const float *from = (const float *)shoal_row(r, r->e->output_at[i], p->outputs[i], row);
      if (!r->e->kernels->finite(from, b->cols)) return i;
      memcpy(r->batch->outputs[i] + (size_t)row * b->cols, from, (size_t)b->cols * sizeof(float));
    }
  }
  return -1;
}

static int32_t run_batch(shoal_executor *e, const shoal_batch *batch, char *error, int32_t error_bytes) {
  shoal_run_state r = {.e = e, .batch = batch};
  lay_out(&r);
  advise_huge_pages(&r);
  int32_t index = take_inputs(&r);
  if (index >= 0) return shoal_fail(error, error_bytes, SHOAL_E_NONFINITE, "input %d holds NaN or infinity", index);
  r.mark = batch->op_ns ? shoal_now_ns() : 0;
  shoal_execute(&r);
  if (r.status == SHOAL_E_CANCELLED) return shoal_fail(error, error_bytes, SHOAL_E_CANCELLED, "cancelled");
  if (r.status == SHOAL_E_NONFINITE)
    return shoal_fail(error, error_bytes, SHOAL_E_NONFINITE, "the logits of sequence %d hold NaN or infinity",
                      (int32_t)r.where);
  index = give_outputs(&r);
  if (index >= 0) return shoal_fail(error, error_bytes, SHOAL_E_NONFINITE, "output %d holds NaN or infinity", index);
  return SHOAL_OK;
}

int32_t shoal_run(shoal_executor *e, const shoal_batch *batch, char *error, int32_t error_bytes) {
  if (!e) return shoal_fail(error, error_bytes, SHOAL_E_PROGRAM, "executor is NULL");
  if (!shoal_pool_take(e->pool)) return shoal_fail(error, error_bytes, SHOAL_E_PROGRAM, "the pool runs another batch");
  const uint64_t environment = shoal_fenv_set();
  int32_t status = shoal_check_batch(&e->program, batch, error, error_bytes);
  if (!status) status = run_batch(e, batch, error, error_bytes);
  shoal_fenv_restore(environment);
  shoal_pool_give(e->pool);
  return status;
}
