/* Refuses every batch that does not fit its program: rows, positions, pages, token ids, sampling parameters. */
#include "common.h"

#define REFUSE(...) return shoal_fail(error, error_bytes, SHOAL_E_PROGRAM, __VA_ARGS__)

/* The fewest logits that tokens are drawn from; 0: none are drawn. */
static int32_t sampled_cols(const shoal_program *p) {
  int32_t cols = 0;
  for (int32_t i = 0; i < p->n_ops; i++) {
    if (p->ops[i].kind != SHOAL_OP_SAMPLE) continue;
    const int32_t here = p->buffers[p->ops[i].in].cols;
    cols = cols ? SHOAL_MIN(cols, here) : here;
  }
  return cols;
}

/* The fewest rows of the tables that tokens are looked up in; 0: none are. */
static int32_t table_rows(const shoal_program *p) {
  int32_t rows = 0;
  for (int32_t i = 0; i < p->n_ops; i++) {
    if (p->ops[i].kind != SHOAL_OP_EMBED) continue;
    const int32_t here = p->weights[p->ops[i].weights[0]].rows;
    rows = rows ? SHOAL_MIN(rows, here) : here;
  }
  return rows;
}

static int32_t check_pages(const shoal_program *p, const shoal_sequence *s, int32_t index, char *error,
                           int32_t error_bytes) {
  const int64_t pages = ((int64_t)s->first + s->rows + SHOAL_PAGE - 1) / SHOAL_PAGE;
  if (p->n_states == 0) return SHOAL_OK;
  if (!s->pages || s->pages_stride < pages)
    REFUSE("sequence %d: its table of pages does not reach position %d", index, s->first + s->rows - 1);
  if (s->pages_stride > INT64_MAX / 8 / p->n_states) REFUSE("sequence %d: pages_stride is too large", index);
  for (int32_t state = 0; state < p->n_states; state++) {
    if (pages > INT32_MAX / p->states[state].kv_heads)
      REFUSE("sequence %d: more pages of state %d than kv heads can be counted in", index, state);
    for (int64_t i = 0; i < pages; i++) {
      const uintptr_t page = (uintptr_t)s->pages[state * s->pages_stride + i];
      if (!page || page % 4)
        REFUSE("sequence %d: page %d of state %d is NULL or not aligned", index, (int32_t)i, state);
    }
  }
  return SHOAL_OK;
}

static int32_t allows_any(const uint8_t *allowed, int32_t vocabulary) {
  for (int32_t t = 0; t < vocabulary; t++)
    if (shoal_is_allowed(allowed, t)) return 1;
  return 0;
}

static int32_t check_reported(const shoal_program *p, const shoal_batch *b, const shoal_sequence *s, int32_t index,
                              char *error, int32_t error_bytes) {
  const int32_t vocabulary = sampled_cols(p);
  if ((!s->sample && !s->given) || !vocabulary) return SHOAL_OK;
  if (s->given && (s->sample || !s->reported)) REFUSE("sequence %d: given tokens, and none to report, or drawn ones", index);
  for (int32_t i = 0; s->given && i < s->wanted; i++)
    if (s->given[i] < 0 || s->given[i] >= vocabulary)
      REFUSE("sequence %d: the given token %d is not in the vocabulary", index, s->given[i]);
  if (!s->reported) return SHOAL_OK;
  if (s->reported < 0 || s->reported > SHOAL_MIN(vocabulary, SHOAL_MOST_LIKELY) + 1 || s->reported > b->most_reported)
    REFUSE("sequence %d: log-probabilities of %d tokens", index, s->reported);
  if (!b->reports || !b->logprobs) REFUSE("log-probabilities are wanted, and their tables are NULL");
  return SHOAL_OK;
}

static int32_t check_sampling(const shoal_program *p, const shoal_sequence *s, int32_t index, char *error,
                              int32_t error_bytes) {
  const shoal_sampling *a = &s->sampling;
  const int32_t vocabulary = sampled_cols(p);
  if (!s->sample || !vocabulary) return SHOAL_OK;
  const float values[] = {a->temperature, a->top_p, a->min_p, a->repetition_penalty, a->presence_penalty,
                          a->frequency_penalty};
  for (int32_t i = 0; i < 6; i++)
    if (!shoal_is_finite(values[i])) REFUSE("sequence %d: a sampling parameter is not finite", index);
  if (a->temperature < 0) REFUSE("sequence %d: the temperature is negative", index);
  if (a->top_k < 0) REFUSE("sequence %d: top_k %d is negative", index, a->top_k);
  if (a->top_p <= 0 || a->top_p > 1) REFUSE("sequence %d: top_p is not in (0, 1]", index);
  if (a->min_p < 0 || a->min_p > 1) REFUSE("sequence %d: min_p is not in [0, 1]", index);
  if (a->repetition_penalty <= 0) REFUSE("sequence %d: the repetition penalty is not positive", index);
  if (a->n_biases < 0 || a->n_biases > vocabulary || (a->n_biases && (!a->biased || !a->biases)))
    REFUSE("sequence %d: %d biases, or tables that are NULL", index, a->n_biases);
  for (int32_t i = 0; i < a->n_biases; i++)
    if (a->biased[i] < 0 || a->biased[i] >= vocabulary || !shoal_is_finite(a->biases[i]))
      REFUSE("sequence %d: the bias of token %d is not finite, or there is no such token", index, a->biased[i]);
  if (a->allowed && !allows_any(a->allowed, vocabulary)) REFUSE("sequence %d: no token is allowed", index);
  if (!shoal_penalises(a)) return SHOAL_OK;
  if (!s->history) REFUSE("sequence %d: a penalty, but no history", index);
  for (int32_t i = 0; i < s->first + s->rows; i++)
    if (s->history[i] < 0 || s->history[i] >= vocabulary)
      REFUSE("sequence %d: token %d at position %d is not in the vocabulary", index, s->history[i], i);
  return SHOAL_OK;
}

/* No page may be written by two sequences: the outcome would depend on the threads' order. */
static int32_t check_distinct(const shoal_program *p, const shoal_batch *b, char *error, int32_t error_bytes) {
  for (int32_t j = 1; j < b->n_sequences; j++) {
    for (int32_t i = 0; i < j; i++) {
      const shoal_sequence *s = &b->sequences[i], *t = &b->sequences[j];
      for (int32_t state = 0; state < p->n_states; state++)
        for (int32_t q = t->first / SHOAL_PAGE; q <= (t->first + t->rows - 1) / SHOAL_PAGE; q++)
          for (int32_t r = s->first / SHOAL_PAGE; r <= (s->first + s->rows - 1) / SHOAL_PAGE; r++)
            if (s->pages[state * s->pages_stride + r] == t->pages[state * t->pages_stride + q])
              REFUSE("sequences %d and %d write the same page of state %d", i, j, state);
    }
  }
  return SHOAL_OK;
}

int32_t shoal_check_batch(const shoal_program *p, const shoal_batch *b, char *error, int32_t error_bytes) {
  int64_t rows = 0, wanted = 0;
  int32_t status;
  if (!b || b->n_sequences < 1 || b->n_sequences > p->max_rows || !b->sequences)
    REFUSE("a batch has between 1 and max_rows (%d) sequences", p->max_rows);
  for (int32_t i = 0; i < b->n_sequences; i++) {
    const shoal_sequence *s = &b->sequences[i];
    if (s->rows < 1 || s->first < 0 || s->first > INT32_MAX - SHOAL_PAGE - s->rows)
      REFUSE("sequence %d: %d rows from position %d", i, s->rows, s->first);
    if (s->wanted != 0 && s->wanted != 1 && s->wanted != s->rows)
      REFUSE("sequence %d: wanted %d is not 0, 1 or %d", i, s->wanted, s->rows);
    if (s->sample != 0 && s->sample != s->wanted && (s->sample != 1 || s->wanted == 0))
      REFUSE("sequence %d: draws %d tokens and wants logits of %d rows", i, s->sample, s->wanted);
    rows += s->rows;
    wanted += s->wanted;
    if (rows > p->max_rows || wanted > p->max_wanted)
      REFUSE("the batch has more than %d rows or wants more than %d", p->max_rows, p->max_wanted);
    if ((status = check_pages(p, s, i, error, error_bytes)) || (status = check_sampling(p, s, i, error, error_bytes)) ||
        (status = check_reported(p, b, s, i, error, error_bytes)))
      return status;
  }
  if ((status = check_distinct(p, b, error, error_bytes))) return status;
  const int32_t table = table_rows(p);
  if (table && !b->tokens) REFUSE("the program reads tokens, the batch has none");
  for (int64_t i = 0; table && i < rows; i++)
    if (b->tokens[i] < 0 || b->tokens[i] >= table)
      REFUSE("token %d of row %d is not in [0, %d)", b->tokens[i], (int32_t)i, table);
  for (int32_t i = 0; i < p->n_inputs; i++)
    if (!b->inputs || !b->inputs[i]) REFUSE("input %d is NULL", i);
  if (p->n_outputs && !b->outputs) REFUSE("the table of outputs is NULL");
  if (!b->drawn) REFUSE("drawn is NULL");
  return SHOAL_OK;
}
