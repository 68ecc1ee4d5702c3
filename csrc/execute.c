/* Runs a program op by op. The caller runs small ops alone; larger ones are split over the threads of the pool. Which thread
 * runs which part changes no bit of the result. */
#define _GNU_SOURCE
#include "executor.h"

#include <time.h>

enum {
  SMALL_WORK = 16384,      /* elements touched, below which a hand-over to another thread costs more */
  SMALL_ATTENTION = 65536, /* the same, in multiply-adds: queries, keys and values are in the caller's caches */
  ROW_BLOCK = 256,         /* rows of a product that one claim takes: as many as a batch usually has */
  FEW_ROWS = 31,           /* up to these, a panel passes so quickly that threads should not meet after each */
  CLAIM_BYTES = 65536      /* weights that the least claim of a product with few rows reads */
};

typedef shoal_run_state run;

int64_t shoal_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int32_t rows_of(const run *r, int32_t buffer) {
  return r->e->program.buffers[buffer].domain == SHOAL_ALL_ROWS ? r->rows : r->wanted;
}

/* How an op's work is split over the threads: the number of tasks, how many a thread claims at a time, and the number of
 * large first parts (arguments of shoal_pool_run). */
typedef struct {
  int64_t units, claim, shares;
} work_split;

static int32_t panels_of(const shoal_weight *w) { return (w->rows + SHOAL_PANEL - 1) / SHOAL_PANEL; }

static work_split split_matmul(const run *r, const shoal_op *op) {
  const shoal_program *p = &r->e->program;
  const int32_t rows = rows_of(r, op->out), blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t threads = shoal_pool_threads(r->e->pool);
  const int64_t input_bytes = p->buffers[op->in].type == SHOAL_Q8 ? SHOAL_PANEL : SHOAL_PANEL * sizeof(float);
  int64_t panels = 0;
  for (int32_t i = 0; i < op->n_weights; i++) panels += panels_of(&p->weights[op->weights[i]]);
  if (threads == 1) return (work_split){panels * blocks, SHOAL_MAX(panels * blocks, 1), 0};
  if (rows > FEW_ROWS) return (work_split){panels * blocks, 2, 0};
  /* Long stretches first, as each begins with a wait for memory; short ones last, so that all threads end together. */
  const int64_t fair = panels / (8 * threads);
  const int64_t claim = SHOAL_MIN(fair, CLAIM_BYTES / (p->buffers[op->in].cols * input_bytes));
  return (work_split){panels * blocks, SHOAL_MAX(claim, 1), threads};
}

static int32_t small_attention(const run *r, const shoal_op *op) {
  return shoal_pool_threads(r->e->pool) == 1 ||
         r->seen * op->heads * r->e->program.states[op->state].head_dim < SMALL_ATTENTION;
}

/* How many pairs of a block and a kv head one row's attention is shared out by; 0: by kv heads, or not at all. */
static int32_t pairs_of(const run *r, const shoal_op *op) {
  const shoal_state *s = &r->e->program.states[op->state];
  const int64_t blocks = (r->seen + SHOAL_PAGE - 1) / SHOAL_PAGE;
  const int64_t bytes = blocks * op->heads * (int64_t)(shoal_part_floats(s) * sizeof(float));
  if (r->rows > 1 || blocks < 2 || bytes > SHOAL_PART_BYTES || small_attention(r, op)) return 0;
  return (int32_t)blocks * s->kv_heads;
}

static work_split split_op(const run *r, const shoal_op *op) {
  const shoal_program *p = &r->e->program;
  switch (shoal_op_info_of(op->kind)->split) {
    case SHOAL_BY_PANELS: return split_matmul(r, op);
    case SHOAL_BY_KV_HEADS: {
      const shoal_state *s = &p->states[op->state];
      const int64_t pairs = pairs_of(r, op), stretches = 2 * shoal_pool_threads(r->e->pool);
      if (pairs) return (work_split){pairs, (pairs + stretches - 1) / stretches, 0}; /* each begins with a wait for memory */
      const int64_t units = (int64_t)r->n_spans * s->kv_heads;
      return (work_split){units, small_attention(r, op) ? units : 1, 0};
    }
    case SHOAL_BY_SPANS: {
      const shoal_state *s = &p->states[op->state];
      return (work_split){r->n_spans, SHOAL_MAX(SMALL_WORK / (2 * SPAN_ROWS * s->kv_heads * s->head_dim), 1), 0};
    }
    case SHOAL_BY_WANTED: return (work_split){r->wanted, 1, 0};
    case SHOAL_BY_ROWS: break;
  }
  return (work_split){rows_of(r, op->out), SHOAL_MAX(SMALL_WORK / p->buffers[op->out].cols, 1), 0};
}

static int32_t position_of(const run *r, int32_t row) {
  for (const shoal_sequence *s = r->batch->sequences;; s++) {
    if (row < s->rows) return s->first + row;
    row -= s->rows;
  }
}

static void run_matmul(const run *r, const shoal_op *op, const shoal_places *at, int64_t unit, int64_t end) {
  const shoal_program *p = &r->e->program;
  const int32_t rows = rows_of(r, op->out);
  int64_t panels = 0;
  for (int32_t i = 0; i < op->n_weights; i++) panels += panels_of(&p->weights[op->weights[i]]);
  while (unit < end) { /* panels of one block of rows and of one weight at a time */
    const int32_t block = (int32_t)(unit / panels);
    int32_t panel = (int32_t)(unit % panels), part = 0, column = 0;
    for (; panel >= panels_of(&p->weights[op->weights[part]]); part++) {
      panel -= panels_of(&p->weights[op->weights[part]]);
      column += p->weights[op->weights[part]].rows;
    }
    const shoal_weight *w = &p->weights[op->weights[part]];
    const int32_t n = (int32_t)SHOAL_MIN(end - unit, panels_of(w) - panel);
    const shoal_matmul task = {
        .in = shoal_row(r, at->in, op->in, 0),
        .out = shoal_row(r, at->out, op->out, 0) + column * sizeof(float),
        .in_stride = shoal_row_bytes(&p->buffers[op->in]),
        .out_stride = shoal_row_bytes(&p->buffers[op->out]),
        .w = w,
        .bias = op->biases[part] < 0 ? NULL : (const float *)p->weights[op->biases[part]].data,
        .row0 = block * ROW_BLOCK,
        .row1 = SHOAL_MIN(rows, (block + 1) * ROW_BLOCK),
        .panel0 = panel,
        .panel1 = panel + n,
        .add = op->accumulate,
    };
    if (w->type == SHOAL_Q8)
      r->e->kernels->matmul_q8(&task);
    else if (w->type == SHOAL_Q4)
      r->e->kernels->matmul_q4(&task);
    else
      r->e->kernels->matmul_f32(&task);
    unit += n;
  }
}

/* What STORE and ATTEND have in common; `column` is where their input begins. */
static shoal_attention attention_of(const run *r, const shoal_op *op, const shoal_places *at, const shoal_span *span,
                                    int32_t column) {
  const shoal_program *p = &r->e->program;
  const shoal_sequence *sequence = &r->batch->sequences[span->sequence];
  return (shoal_attention){
      .in = shoal_row(r, at->in, op->in, span->base + span->row) + column * sizeof(float),
      .in_stride = shoal_row_bytes(&p->buffers[op->in]),
      .pages = sequence->pages + op->state * sequence->pages_stride,
      .state = &p->states[op->state],
      .first = sequence->first + span->row,
      .rows = span->rows,
  };
}

static void run_store(const run *r, const shoal_op *op, const shoal_places *at, int64_t unit, int64_t end) {
  for (; unit < end; unit++) {
    shoal_attention task = attention_of(r, op, at, &r->e->spans[unit], op->key);
    task.values = task.in + (op->value - op->key) * (int64_t)sizeof(float);
    r->e->kernels->store(&task);
  }
}

/* Attention of kv heads [head, head + n). */
static shoal_attention attend_of(const run *r, const shoal_op *op, const shoal_places *at, const shoal_span *span,
                                 int32_t head, int32_t n) {
  shoal_attention task = attention_of(r, op, at, span, op->column);
  task.kv_head = head;
  task.heads = n;
  task.group = op->heads / task.state->kv_heads;
  const size_t column = (size_t)head * task.group * task.state->head_dim * sizeof(float);
  task.in += column;
  task.out = shoal_row(r, at->out, op->out, span->base + span->row) + column;
  task.out_stride = shoal_row_bytes(&r->e->program.buffers[op->out]);
  task.scale = op->scale;
  return task;
}

/* Units are pairs, or kv heads of spans. Those of a span with one row go together as far as they were claimed together;
 * several rows pass the same keys, so their heads go one by one. */
static void run_attend(const run *r, const shoal_op *op, const shoal_places *at, int64_t unit, int64_t end) {
  const int32_t heads = r->e->program.states[op->state].kv_heads;
  if (pairs_of(r, op)) {
    shoal_attention task = attend_of(r, op, at, r->e->spans, 0, heads);
    task.parts = r->e->parts;
    task.begin = (int32_t)unit;
    task.end = (int32_t)end;
    r->e->kernels->attend(&task);
    return;
  }
  for (int32_t n; unit < end; unit += n) {
    const shoal_span *span = &r->e->spans[r->n_spans - 1 - unit / heads]; /* the longest first: they end together */
    const int32_t head = (int32_t)(unit % heads);
    n = span->rows > 1 ? 1 : (int32_t)SHOAL_MIN(end - unit, heads - head);
    const shoal_attention task = attend_of(r, op, at, span, head, n);
    r->e->kernels->attend(&task);
  }
}

static void join_parts(const run *r, const shoal_op *op, const shoal_places *at) {
  if (!pairs_of(r, op)) return;
  shoal_attention task = attend_of(r, op, at, r->e->spans, 0, r->e->program.states[op->state].kv_heads);
  task.parts = r->e->parts;
  r->e->kernels->join(&task);
}

/* Whether a token is drawn from the k-th wanted row of a sequence, or given for it. */
static int32_t has_token(const shoal_sequence *s, int32_t k) { return s->given || k >= s->wanted - s->sample; }

/* Once all have drawn: no thread has to write what another reads. */
static void check_drawn(run *r) {
  for (int32_t i = 0, row = 0; i < r->batch->n_sequences; i++) {
    const shoal_sequence *s = &r->batch->sequences[i];
    for (int32_t k = 0; k < s->wanted; k++, row++) {
      if (!has_token(s, k) || r->batch->drawn[row] >= 0 || r->status == SHOAL_E_NONFINITE) continue;
      r->where = i;
      r->status = SHOAL_E_NONFINITE;
    }
  }
}

/* The token of the k-th wanted row of a sequence, which is `row` among those of the batch, and what is reported of it. */
static void sample_row(const run *r, const float *logits, int32_t vocab, const shoal_sequence *s, int32_t k, int32_t row,
                       char *scratch) {
  const shoal_batch *b = r->batch;
  const shoal_kernels *kernels = r->e->kernels;
  const int32_t position = s->first + s->rows - s->wanted + k + 1;
  int32_t token = -1;
  if (!s->given)
    token = shoal_sample(kernels, logits, vocab, &s->sampling, s->history, position, scratch);
  else if (kernels->finite(logits, vocab))
    token = s->given[k];
  b->drawn[row] = token;
  if (token < 0 || !s->reported) return;
  const int64_t at = (int64_t)row * b->most_reported;
  b->reports[at] = token;
  shoal_report(kernels, logits, vocab, s->reported, b->reports + at, b->logprobs + at, scratch);
}

/* Units are wanted rows. */
static void run_sample(const run *r, const shoal_op *op, const shoal_places *at, int64_t unit, int64_t end, int32_t thread) {
  const shoal_sequence *s = r->batch->sequences;
  const int32_t vocab = r->e->program.buffers[op->in].cols;
  char *scratch = r->e->scratch + (size_t)thread * r->e->scratch_bytes;
  for (int32_t row = 0; row < end; row += s++->wanted) {
    for (int32_t k = 0; k < s->wanted && row + k < end; k++) {
      if (row + k < unit || !has_token(s, k)) continue;
      const float *logits = (const float *)shoal_row(r, at->in, op->in, row + k);
      sample_row(r, logits, vocab, s, k, row + k, scratch);
    }
  }
}

static void run_row(const run *r, const shoal_op *op, const shoal_places *at, int32_t row) {
  const shoal_program *p = &r->e->program;
  const shoal_kernels *k = r->e->kernels;
  const shoal_weight *w = &p->weights[op->weights[0]];
  const shoal_buffer *to = &p->buffers[op->out];
  char *out = shoal_row(r, at->out, op->out, row);
  const float *in = NULL;
  if (shoal_op_info_of(op->kind)->flags & SHOAL_READS_IN) /* of an op that gathers, the row that is wanted */
    in = (const float *)shoal_row(r, at->in, op->in, p->buffers[op->in].domain == to->domain ? row : r->e->wanted[row]);
  switch (op->kind) {
    case SHOAL_OP_EMBED: k->embed(w, r->batch->tokens[row], (float *)out); break;
    case SHOAL_OP_ANGLES: shoal_angles(position_of(r, row), w->data, w->cols, (float *)out); break;
    case SHOAL_OP_NORM:
      if (to->type == SHOAL_Q8)
        k->norm_q8(in, w->data, to->cols, op->epsilon, out);
      else
        k->norm(in, w->data, to->cols, op->epsilon, (float *)out);
      break;
    case SHOAL_OP_QUANTISE: k->quantise(in, to->cols, out); break;
    case SHOAL_OP_ROPE:
      k->rope((float *)out, (const float *)shoal_row(r, at->angles, op->angles, row), op->heads, op->head_dim,
              p->buffers[op->angles].cols / 2);
      break;
    case SHOAL_OP_HEAD_NORM:
      for (int32_t head = 0; head < op->heads; head++) {
        float *x = (float *)out + op->column + (int64_t)head * op->head_dim;
        k->norm(x, w->data, op->head_dim, op->epsilon, x); /* which reads all of x before it writes */
      }
      break;
    case SHOAL_OP_GATE:
      if (to->type == SHOAL_Q8)
        k->gate_q8(in, to->cols, op->activation, out);
      else
        k->gate(in, to->cols, op->activation, (float *)out);
  }
}

static void run_units(run *r, int32_t index, int64_t unit, int64_t end, int32_t thread) {
  const shoal_op *op = &r->e->program.ops[index];
  const shoal_places *at = &r->e->at[index];
  switch (shoal_op_info_of(op->kind)->split) {
    case SHOAL_BY_PANELS: run_matmul(r, op, at, unit, end); break;
    case SHOAL_BY_SPANS: run_store(r, op, at, unit, end); break;
    case SHOAL_BY_KV_HEADS: run_attend(r, op, at, unit, end); break;
    case SHOAL_BY_WANTED: run_sample(r, op, at, unit, end, thread); break;
    case SHOAL_BY_ROWS:
      for (; unit < end; unit++) run_row(r, op, at, (int32_t)unit);
  }
}

static void op_ended(run *r, int32_t index) {
  if (r->batch->op_ns) {
    const int64_t now = shoal_now_ns();
    r->batch->op_ns[index] = (uint64_t)(now - r->mark);
    r->mark = now;
  }
  if (r->batch->cancel && *r->batch->cancel && r->status == SHOAL_OK) r->status = SHOAL_E_CANCELLED;
}

static int32_t is_asked_for(const run *r, int32_t index) {
  const int32_t output = r->e->only_for[index];
  return output < 0 || r->batch->outputs[output];
}

static void run_part(void *run_state, int64_t first, int64_t last, int32_t thread) {
  run *r = run_state;
  run_units(r, r->op, first, last, thread);
}

void shoal_execute(run *r) {
  for (r->op = 0; r->op < r->e->program.n_ops && r->status == SHOAL_OK; r->op++) {
    const work_split c = is_asked_for(r, r->op) ? split_op(r, &r->e->program.ops[r->op]) : (work_split){0, 1, 0};
    if (c.units <= c.claim)
      run_units(r, r->op, 0, c.units, 0);
    else
      shoal_pool_run(r->e->pool, run_part, r, c.units, c.claim, c.shares);
    if (r->e->program.ops[r->op].kind == SHOAL_OP_ATTEND) join_parts(r, &r->e->program.ops[r->op], &r->e->at[r->op]);
    if (r->e->program.ops[r->op].kind == SHOAL_OP_SAMPLE) check_drawn(r);
    op_ended(r, r->op);
  }
}
