/* Refuses every program that could read or write outside its buffers, weights or states, or that reads a buffer before
 * it was written. Nothing that comes from Python is believed; only what pointers point at has to be trusted. */
#include "common.h"

#include <stdlib.h>

enum {
  MAX_OPS = 1 << 14,
  MAX_TABLE = 1 << 16,
  MAX_ROWS = 1 << 16,
  MAX_COLS = 1 << 24,
  MAX_MATRIX_ROWS = 1 << 28
};

/* Where a check writes and what it is about. */
typedef struct {
  const shoal_program *p;
  char *written; /* by buffer */
  char *error;
  int32_t error_bytes, op;
} checker;

#define REFUSE(c, ...) return shoal_fail((c)->error, (c)->error_bytes, SHOAL_E_PROGRAM, __VA_ARGS__)
/* Reports the op's number, its kind and the reason unless `holds`. */
#define NEED(c, holds, reason)                                                     \
  do {                                                                             \
    if (!(holds)) REFUSE(c, "op %d (%s): %s", (c)->op, kind_name(c), reason);      \
  } while (0)
#define TRY(call)                          \
  do {                                     \
    const int32_t status = (call);         \
    if (status != SHOAL_OK) return status; \
  } while (0)

static const char *kind_name(const checker *c) {
  const shoal_op_info *info = shoal_op_info_of(c->p->ops[c->op].kind);
  return info ? info->name : "unknown";
}

static const shoal_buffer *buffer(const checker *c, int32_t id) {
  return id >= 0 && id < c->p->n_buffers ? &c->p->buffers[id] : NULL;
}

static int32_t check_tables(const checker *c) {
  const shoal_program *p = c->p;
  const struct {
    const void *rows;
    int32_t n, most;
    const char *name;
  } tables[] = {{p->ops, p->n_ops, MAX_OPS, "ops"},
                {p->buffers, p->n_buffers, MAX_TABLE, "buffers"},
                {p->weights, p->n_weights, MAX_TABLE, "weights"},
                {p->states, p->n_states, MAX_TABLE, "states"},
                {p->inputs, p->n_inputs, MAX_TABLE, "inputs"},
                {p->outputs, p->n_outputs, MAX_TABLE, "outputs"}};
  for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
    if (tables[i].n < 0 || tables[i].n > tables[i].most)
      REFUSE(c, "%d %s: not in [0, %d]", tables[i].n, tables[i].name, tables[i].most);
    if (tables[i].n && !tables[i].rows) REFUSE(c, "the table of %s is NULL", tables[i].name);
  }
  if (p->max_rows < 1 || p->max_rows > MAX_ROWS) REFUSE(c, "max_rows %d: not in [1, %d]", p->max_rows, MAX_ROWS);
  if (p->max_wanted < 0 || p->max_wanted > p->max_rows) REFUSE(c, "max_wanted %d: not in [0, max_rows]", p->max_wanted);
  return SHOAL_OK;
}

static int32_t check_buffers(const checker *c) {
  for (int32_t i = 0; i < c->p->n_buffers; i++) {
    const shoal_buffer *b = &c->p->buffers[i];
    if (b->type != SHOAL_F32 && b->type != SHOAL_Q8) REFUSE(c, "buffer %d: type %d is neither f32 nor q8", i, b->type);
    if (b->cols < 1 || b->cols > MAX_COLS) REFUSE(c, "buffer %d: %d columns, not in [1, %d]", i, b->cols, MAX_COLS);
    if (b->domain != SHOAL_ALL_ROWS && b->domain != SHOAL_WANTED_ROWS)
      REFUSE(c, "buffer %d: no domain %d", i, b->domain);
  }
  return SHOAL_OK;
}

static int32_t check_weight(const checker *c, int32_t i) {
  const shoal_weight *w = &c->p->weights[i];
  uint64_t bytes, scales = 0, mins = 0, align = 1;
  if (w->rows < 1 || w->rows > MAX_MATRIX_ROWS || w->cols < 1 || w->cols > MAX_COLS)
    REFUSE(c, "weight %d: shape [%d, %d] is out of range", i, w->rows, w->cols);
  const uint64_t rows = (uint64_t)w->rows, cols = (uint64_t)w->cols; /* below 2^28 and 2^24: products fit */
  switch (w->type) {
    case SHOAL_F32: bytes = rows * cols * 4, align = 4; break;
    case SHOAL_F64: bytes = rows * cols * 8, align = 8; break;
    case SHOAL_Q8:
      bytes = SHOAL_UP(rows, SHOAL_PANEL) * SHOAL_UP(cols, SHOAL_GROUP);
      scales = bytes / SHOAL_GROUP * 2;
      align = 4;
      break;
    case SHOAL_Q4:
      bytes = SHOAL_UP(rows, SHOAL_PANEL) * SHOAL_UP(cols, SHOAL_GROUP) / 2;
      scales = bytes / SHOAL_GROUP * 4;
      mins = w->mins ? scales : 0;
      break;
    default: REFUSE(c, "weight %d: no type %d", i, w->type);
  }
  if (!w->data || w->data_bytes != bytes)
    REFUSE(c, "weight %d: %u bytes of data, its shape needs %u", i, w->data ? w->data_bytes : 0, bytes);
  if (w->scales_bytes != scales || !w->scales != !scales)
    REFUSE(c, "weight %d: %u bytes of scales, its shape needs %u", i, w->scales_bytes, scales);
  if (w->mins_bytes != mins || (w->mins && !mins))
    REFUSE(c, "weight %d: %u bytes of mins, its shape and type need %u", i, w->mins_bytes, mins);
  if ((uintptr_t)w->data % align || (uintptr_t)w->scales % 2 || (uintptr_t)w->mins % 2)
    REFUSE(c, "weight %d is not aligned", i);
  if (w->type == SHOAL_F64)
    for (uint64_t k = 0; k < rows * cols; k++) {
      const double f = ((const double *)w->data)[k];
      if (!(f >= -1 && f <= 1)) REFUSE(c, "weight %d: an inverse frequency is not in [-1, 1]", i);
    }
  return SHOAL_OK;
}

static int32_t check_states(const checker *c) {
  for (int32_t i = 0; i < c->p->n_states; i++) {
    const shoal_state *s = &c->p->states[i];
    if (s->type != SHOAL_F32 && s->type != SHOAL_F16 && s->type != SHOAL_Q8)
      REFUSE(c, "state %d: type %d is not f32, f16 or q8", i, s->type);
    if (s->head_dim < 1 || s->head_dim > SHOAL_MAX_HEAD_DIM || s->head_dim % SHOAL_LANES)
      REFUSE(c, "state %d: head_dim %d is no multiple of 16 in [16, %d]", i, s->head_dim, SHOAL_MAX_HEAD_DIM);
    if (s->kv_heads < 1 || s->kv_heads > MAX_COLS / s->head_dim) REFUSE(c, "state %d: %d kv heads", i, s->kv_heads);
  }
  return SHOAL_OK;
}

static int32_t has(int32_t set, int32_t member) { return set >> member & 1; }

/* The parts of an op that its row of the table describes. */
static int32_t check_buffers_of(const checker *c, const shoal_op *op, const shoal_op_info *info) {
  const shoal_buffer *in = buffer(c, op->in), *out = buffer(c, op->out), *angles = buffer(c, op->angles);
  const int32_t reads = info->flags & SHOAL_READS_IN, writes = info->flags & SHOAL_WRITES_OUT;
  NEED(c, !(info->flags & SHOAL_ACCUMULATES) || op->accumulate == 0 || op->accumulate == 1,
       "accumulate is neither 0 nor 1");
  NEED(c, !reads || (in && c->written[op->in]), "reads no buffer, or one that was not written");
  NEED(c, !reads || has(info->in_types, in->type), "the type of the input does not fit");
  NEED(c, !reads || has(info->domains, in->domain), "the rows that the input holds do not fit");
  NEED(c, !writes || out, "writes no buffer");
  NEED(c, !reads || !writes || op->in != op->out, "reads what it writes");
  NEED(c, !writes || has(info->out_types, out->type), "the type of the output does not fit");
  NEED(c, !writes || has(info->domains, out->domain), "the rows that the output holds do not fit");
  NEED(c, !writes || !shoal_keeps_out(op) || c->written[op->out], "changes a buffer that was not written");
  NEED(c,
       !reads || !writes || in->domain == out->domain ||
           ((info->flags & SHOAL_GATHERS) && out->domain == SHOAL_WANTED_ROWS),
       "rows of input and output differ");
  if (info->flags & SHOAL_READS_ANGLES)
    NEED(c,
         angles && c->written[op->angles] && op->angles != op->out && angles->type == SHOAL_F32 &&
             angles->domain == out->domain,
         "no angles, or not written, or their type or rows do not fit");
  NEED(c, !(info->flags & SHOAL_HAS_STATE) || (op->state >= 0 && op->state < c->p->n_states), "no such state");
  NEED(c, !info->most_weights || (op->n_weights >= info->least_weights && op->n_weights <= info->most_weights),
       "number of weights");
  for (int32_t i = 0; info->most_weights && i < op->n_weights; i++) {
    NEED(c, op->weights[i] >= 0 && op->weights[i] < c->p->n_weights, "no such weight");
    NEED(c, has(info->weight_types, c->p->weights[op->weights[i]].type), "the type of a weight does not fit");
  }
  return SHOAL_OK;
}

static int32_t check_matmul(const checker *c, const shoal_op *op, const shoal_buffer *in, const shoal_buffer *out) {
  int64_t rows = 0;
  NEED(c, op->n_biases == 0 || op->n_biases == op->n_weights, "number of biases");
  for (int32_t i = 0; i < op->n_weights; i++) {
    const shoal_weight *w = &c->p->weights[op->weights[i]];
    NEED(c, (w->type == SHOAL_F32) == (in->type == SHOAL_F32), "the type of a weight does not fit the input's");
    NEED(c, w->cols == in->cols, "a weight's columns are not those of the input");
    rows += w->rows;
    if (op->n_biases == 0 || op->biases[i] == -1) continue;
    NEED(c, op->biases[i] >= 0 && op->biases[i] < c->p->n_weights, "no such bias");
    const shoal_weight *bias = &c->p->weights[op->biases[i]];
    NEED(c, bias->type == SHOAL_F32 && bias->rows == 1 && bias->cols == w->rows,
         "a bias is no f32 vector of its weight's rows");
  }
  NEED(c, rows == out->cols, "the weights' rows are not the columns of the output");
  return SHOAL_OK;
}

static int32_t check_attend(const checker *c, const shoal_op *op, const shoal_buffer *in, const shoal_buffer *out,
                            const shoal_state *s) {
  const int64_t width = (int64_t)op->heads * s->head_dim;
  NEED(c, op->heads >= 1 && op->heads % s->kv_heads == 0, "query heads are no multiple of kv heads");
  NEED(c, op->column >= 0 && op->column + width <= in->cols && width == out->cols,
       "query heads do not fit the columns");
  NEED(c, shoal_is_finite(op->scale), "the scale is not finite");
  return SHOAL_OK;
}

static int32_t check_op(const checker *c) {
  const shoal_op *op = &c->p->ops[c->op];
  const shoal_op_info *info = shoal_op_info_of(op->kind);
  NEED(c, info, "no such kind");
  TRY(check_buffers_of(c, op, info));
  const shoal_buffer *in = buffer(c, op->in), *out = buffer(c, op->out), *angles = buffer(c, op->angles);
  const shoal_state *s = info->flags & SHOAL_HAS_STATE ? &c->p->states[op->state] : NULL;
  const shoal_weight *w = info->most_weights ? &c->p->weights[op->weights[0]] : NULL;
  switch (op->kind) {
    case SHOAL_OP_EMBED: NEED(c, w->cols == out->cols, "the table's columns are not those of the output"); break;
    case SHOAL_OP_ANGLES:
      NEED(c, w->rows == 1 && w->cols * 2 == out->cols, "twice the frequencies are not the columns of the output");
      break;
    case SHOAL_OP_NORM:
      NEED(c, in->cols == out->cols && w->rows == 1 && w->cols == out->cols,
           "the columns of input, weight and output differ");
      NEED(c, shoal_is_finite(op->epsilon) && op->epsilon >= 0, "epsilon is negative or not finite");
      break;
    case SHOAL_OP_HEAD_NORM:
      NEED(c, op->column >= 0 && op->heads >= 1 && op->head_dim >= 1 &&
               op->column + (int64_t)op->heads * op->head_dim <= out->cols,
           "heads do not fit the columns");
      NEED(c, w->rows == 1 && w->cols == op->head_dim, "the weight's columns are not those of a head");
      NEED(c, shoal_is_finite(op->epsilon) && op->epsilon >= 0, "epsilon is negative or not finite");
      break;
    case SHOAL_OP_QUANTISE: NEED(c, in->cols == out->cols, "the columns of input and output differ"); break;
    case SHOAL_OP_MATMUL: TRY(check_matmul(c, op, in, out)); break;
    case SHOAL_OP_ROPE:
      NEED(c, angles->cols % 2 == 0 && op->heads >= 1 && op->head_dim >= angles->cols &&
               (int64_t)op->heads * op->head_dim <= out->cols,
           "heads do not fit the columns");
      break;
    case SHOAL_OP_STORE: {
      const int64_t width = (int64_t)s->kv_heads * s->head_dim;
      NEED(c, op->key >= 0 && op->key + width <= in->cols && op->value >= 0 && op->value + width <= in->cols,
           "keys or values beyond the columns");
      break;
    }
    case SHOAL_OP_ATTEND: TRY(check_attend(c, op, in, out, s)); break;
    case SHOAL_OP_GATE:
      NEED(c, in->cols == 2 * out->cols, "the input has not twice the output's columns");
      NEED(c, op->activation == SHOAL_SILU || op->activation == SHOAL_GELU_TANH, "no such activation");
      break;
    default: break; /* SAMPLE: any logits */
  }
  if (info->flags & SHOAL_WRITES_OUT) c->written[op->out] = 1;
  return SHOAL_OK;
}

static int32_t check_ends(const checker *c, const int32_t *ids, int32_t n, const char *what) {
  for (int32_t i = 0; i < n; i++) {
    const shoal_buffer *b = buffer(c, ids[i]);
    if (!b || b->type != SHOAL_F32) REFUSE(c, "%s %d: buffer %d is not there or not f32", what, i, ids[i]);
    for (int32_t j = 0; j < i; j++)
      if (ids[j] == ids[i]) REFUSE(c, "%s %d: buffer %d comes twice", what, i, ids[i]);
  }
  return SHOAL_OK;
}

static int32_t check_all(checker *c) {
  const shoal_program *p = c->p;
  TRY(check_buffers(c));
  TRY(check_states(c));
  for (int32_t i = 0; i < p->n_weights; i++) TRY(check_weight(c, i));
  TRY(check_ends(c, p->inputs, p->n_inputs, "input"));
  TRY(check_ends(c, p->outputs, p->n_outputs, "output"));
  for (int32_t i = 0; i < p->n_inputs; i++) {
    if (p->buffers[p->inputs[i]].domain != SHOAL_ALL_ROWS)
      REFUSE(c, "input %d: buffer %d does not hold all rows", i, p->inputs[i]);
    c->written[p->inputs[i]] = 1;
  }
  for (c->op = 0; c->op < p->n_ops; c->op++) TRY(check_op(c));
  for (int32_t i = 0; i < p->n_outputs; i++)
    if (!c->written[p->outputs[i]]) REFUSE(c, "output %d: buffer %d is never written", i, p->outputs[i]);
  return SHOAL_OK;
}

int32_t shoal_check_program(const shoal_program *program, char *error, int32_t error_bytes) {
  checker c = {program, NULL, error, error_bytes, 0};
  if (!program) REFUSE(&c, "the program is NULL");
  TRY(check_tables(&c));
  c.written = calloc((size_t)program->n_buffers + 1, 1);
  if (!c.written) return shoal_fail(error, error_bytes, SHOAL_E_MEMORY, "out of memory");
  const int32_t status = check_all(&c);
  free(c.written);
  return status;
}
