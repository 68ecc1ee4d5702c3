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
/* Reports op and reason unless `holds`. */
#define NEED(c, holds, reason)                                                                  \
  do {                                                                                          \
    if (!(holds)) REFUSE(c, "op %d (kind %d): %s", (c)->op, (c)->p->ops[(c)->op].kind, reason); \
  } while (0)
#define TRY(call)                          \
  do {                                     \
    const int32_t status = (call);         \
    if (status != SHOAL_OK) return status; \
  } while (0)

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
  if ((uintptr_t)w->data % align || (uintptr_t)w->scales % 2 || (uintptr_t)w->mins % 2) REFUSE(c, "weight %d is not aligned", i);
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

/* Weights of an op: all of one type, as many columns each. */
static int32_t check_op_weights(const checker *c, int32_t least, int32_t most, int32_t type, int32_t cols) {
  const shoal_op *op = &c->p->ops[c->op];
  NEED(c, op->n_weights >= least && op->n_weights <= most, "number of weights");
  for (int32_t i = 0; i < op->n_weights; i++) {
    NEED(c, op->weights[i] >= 0 && op->weights[i] < c->p->n_weights, "no such weight");
    const shoal_weight *w = &c->p->weights[op->weights[i]];
    NEED(c, type < 0 || w->type == type || (type == SHOAL_Q8 && w->type == SHOAL_Q4),
         "the weight's type does not fit the input's");
    NEED(c, cols < 0 || w->cols == cols, "the weight's columns do not fit");
  }
  return SHOAL_OK;
}

static int32_t check_matmul(const checker *c, const shoal_op *op, const shoal_buffer *in, const shoal_buffer *out) {
  int64_t rows = 0;
  TRY(check_op_weights(c, 1, SHOAL_MAX_PARTS, in->type, in->cols));
  for (int32_t i = 0; i < op->n_weights; i++) rows += c->p->weights[op->weights[i]].rows;
  NEED(c, out->type == SHOAL_F32 && rows == out->cols, "the weights' rows are not the columns of an f32 output");
  NEED(c, op->i[0] == 0 || op->i[0] == 1, "i0 is neither 0 nor 1");
  NEED(c, op->i[0] == 0 || c->written[op->out], "adds to a buffer that was not written");
  return SHOAL_OK;
}

static int32_t check_rope(const checker *c, const shoal_op *op, const shoal_buffer *out) {
  const shoal_buffer *angles = buffer(c, op->angles);
  NEED(c, angles && c->written[op->angles] && op->angles != op->out, "no angles, or not written");
  NEED(c, angles->type == SHOAL_F32 && angles->cols % 2 == 0 && angles->domain == out->domain,
       "the angles' type, columns or rows");
  NEED(c, out->type == SHOAL_F32 && c->written[op->out], "rotates a buffer that is not f32 or was not written");
  NEED(c, op->i[0] >= 1 && op->i[1] >= angles->cols && (int64_t)op->i[0] * op->i[1] <= out->cols,
       "heads do not fit the columns");
  return SHOAL_OK;
}

static int32_t check_store(const checker *c, const shoal_op *op, const shoal_buffer *in, const shoal_state *s) {
  const int32_t width = s->kv_heads * s->head_dim;
  NEED(c, in->type == SHOAL_F32 && in->domain == SHOAL_ALL_ROWS, "reads a buffer that is not f32 of all rows");
  for (int32_t k = 0; k < 2; k++)
    NEED(c, op->i[k] >= 0 && (int64_t)op->i[k] + width <= in->cols, "keys or values beyond the columns");
  return SHOAL_OK;
}

static int32_t check_attend(const checker *c, const shoal_op *op, const shoal_buffer *in, const shoal_buffer *out,
                            const shoal_state *s) {
  const int64_t width = (int64_t)op->i[1] * s->head_dim;
  NEED(c, in->type == SHOAL_F32 && in->domain == SHOAL_ALL_ROWS, "reads a buffer that is not f32 of all rows");
  NEED(c, out->type == SHOAL_F32 && out->domain == SHOAL_ALL_ROWS, "writes a buffer that is not f32 of all rows");
  NEED(c, op->i[1] >= 1 && op->i[1] % s->kv_heads == 0, "query heads are no multiple of kv heads");
  NEED(c, op->i[0] >= 0 && op->i[0] + width <= in->cols && width == out->cols, "query heads do not fit the columns");
  NEED(c, shoal_is_finite(op->f[0]), "the scale is not finite");
  return SHOAL_OK;
}

/* Buffers that each kind has; whether out may differ in rows from in. */
enum { HAS_IN = 1, HAS_OUT = 2, HAS_STATE = 4, IN_PLACE = 8 };
static const uint8_t SHAPE[] = {
    [SHOAL_OP_EMBED] = HAS_OUT,
    [SHOAL_OP_ANGLES] = HAS_OUT,
    [SHOAL_OP_NORM] = HAS_IN | HAS_OUT,
    [SHOAL_OP_QUANTISE] = HAS_IN | HAS_OUT,
    [SHOAL_OP_MATMUL] = HAS_IN | HAS_OUT,
    [SHOAL_OP_ROPE] = HAS_OUT | IN_PLACE,
    [SHOAL_OP_STORE] = HAS_IN | HAS_STATE,
    [SHOAL_OP_ATTEND] = HAS_IN | HAS_OUT | HAS_STATE,
    [SHOAL_OP_GATE] = HAS_IN | HAS_OUT,
    [SHOAL_OP_SAMPLE] = HAS_IN,
};

static int32_t check_op(const checker *c) {
  const shoal_op *op = &c->p->ops[c->op];
  NEED(c, op->kind >= 0 && op->kind < (int32_t)sizeof SHAPE, "no such kind");
  const int32_t has = SHAPE[op->kind];
  const shoal_buffer *in = buffer(c, op->in), *out = buffer(c, op->out);
  NEED(c, !(has & HAS_IN) || (in && c->written[op->in]), "reads no buffer, or one that was not written");
  NEED(c, !(has & HAS_OUT) || out, "writes no buffer");
  NEED(c, (has & (HAS_IN | HAS_OUT)) != (HAS_IN | HAS_OUT) || op->in != op->out, "reads what it writes");
  NEED(c, !(has & HAS_STATE) || (op->state >= 0 && op->state < c->p->n_states), "no such state");
  NEED(c,
       (has & (HAS_IN | HAS_OUT)) != (HAS_IN | HAS_OUT) || in->domain == out->domain ||
           (op->kind == SHOAL_OP_NORM && out->domain == SHOAL_WANTED_ROWS),
       "rows of input and output differ");
  switch (op->kind) {
    case SHOAL_OP_EMBED: {
      TRY(check_op_weights(c, 1, 1, -1, out->cols));
      NEED(c, c->p->weights[op->weights[0]].type != SHOAL_F64, "a table of f64");
      NEED(c, out->type == SHOAL_F32 && out->domain == SHOAL_ALL_ROWS, "writes a buffer that is not f32 of all rows");
      break;
    }
    case SHOAL_OP_ANGLES:
      TRY(check_op_weights(c, 1, 1, SHOAL_F64, -1));
      NEED(c, out->type == SHOAL_F32 && out->domain == SHOAL_ALL_ROWS, "writes a buffer that is not f32 of all rows");
      NEED(c, c->p->weights[op->weights[0]].rows == 1 && c->p->weights[op->weights[0]].cols * 2 == out->cols,
           "twice the frequencies are not the columns");
      break;
    case SHOAL_OP_NORM:
      TRY(check_op_weights(c, 1, 1, SHOAL_F32, in->cols));
      NEED(c, c->p->weights[op->weights[0]].rows == 1 && in->type == SHOAL_F32 && in->cols == out->cols,
           "types or columns do not fit");
      NEED(c, shoal_is_finite(op->f[0]) && op->f[0] >= 0, "epsilon is negative or not finite");
      break;
    case SHOAL_OP_QUANTISE:
      NEED(c, in->type == SHOAL_F32 && out->type == SHOAL_Q8 && in->cols == out->cols, "types or columns do not fit");
      break;
    case SHOAL_OP_MATMUL: TRY(check_matmul(c, op, in, out)); break;
    case SHOAL_OP_ROPE: TRY(check_rope(c, op, out)); break;
    case SHOAL_OP_STORE: TRY(check_store(c, op, in, &c->p->states[op->state])); break;
    case SHOAL_OP_ATTEND: TRY(check_attend(c, op, in, out, &c->p->states[op->state])); break;
    case SHOAL_OP_GATE:
      NEED(c, in->type == SHOAL_F32 && in->cols == 2 * out->cols, "the input has not twice the output's columns");
      NEED(c, op->i[0] == SHOAL_SILU || op->i[0] == SHOAL_GELU_TANH, "no such activation");
      break;
    default:
      NEED(c, in->type == SHOAL_F32 && in->domain == SHOAL_WANTED_ROWS,
           "draws from a buffer that is not f32 of wanted rows");
  }
  if (has & HAS_OUT) c->written[op->out] = 1;
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
