/* Runs programs of many shapes on data made from a seed and prints a hash of every buffer of every run: machines that
 * give the same lines compute the same bits. Knows nothing of the library but kernels.h.
 *
 *     driver ISA THREADS FLUSH FIRST_SEED LAST_SEED     (FLUSH = 1: with flush-to-zero set by the caller)
 *     driver ISA                                        exit code 0 if this CPU has the set */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

enum { MAX_OPS = 64, MAX_SEQUENCES = 3, MAX_PAGES = 2, POSITIONS = MAX_PAGES * SHOAL_PAGE, MAX_ROWS = 40 };

static uint64_t state;

static uint64_t next(void) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static int32_t below(int32_t n) { return (int32_t)(next() % (uint64_t)n); }
static float number(void) { return (float)(below(1 << 20) - (1 << 19)) * 0x1p-19f; } /* exact, in [-1, 1) */

static uint64_t hash(uint64_t h, const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) h = (h ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
  return h;
}

static void must(int32_t status, const char *error) {
  if (status == SHOAL_OK) return;
  fprintf(stderr, "status %d: %s\n", status, error);
  exit(2);
}

static void *room(size_t bytes) {
  void *p = calloc(bytes + 64, 1);
  if (!p) exit(3);
  return p;
}

static shoal_op ops[MAX_OPS];
static shoal_buffer buffers[MAX_OPS];
static shoal_weight weights[MAX_OPS];
static shoal_state states[2];
static int32_t outputs[MAX_OPS];
static shoal_program program;

static int32_t buffer(int32_t type, int32_t cols, int32_t domain) {
  buffers[program.n_buffers] = (shoal_buffer){type, cols, domain};
  if (type == SHOAL_F32) outputs[program.n_outputs++] = program.n_buffers;
  return program.n_buffers++;
}

static int32_t packed(int32_t type) { return type == SHOAL_Q8 || type == SHOAL_Q4; }

/* Of the packed types, one or the other. */
static int32_t weight(int32_t type, int32_t rows, int32_t cols, float scale) {
  if (type == SHOAL_Q8 && below(2)) type = SHOAL_Q4;
  shoal_weight *w = &weights[program.n_weights];
  const size_t padded = (size_t)(rows + 15) / 16 * 16 * ((cols + 31) / 32 * 32), n = (size_t)rows * cols;
  *w = (shoal_weight){
      .type = type,
      .rows = rows,
      .cols = cols,
      .data_bytes = packed(type) ? padded / (type == SHOAL_Q4 ? 2 : 1) : n * (type == SHOAL_F64 ? 8 : 4)};
  void *data = room(w->data_bytes);
  w->data = data;
  if (type == SHOAL_F32)
    for (size_t i = 0; i < n; i++) ((float *)data)[i] = scale * number();
  if (type == SHOAL_F64) /* a geometric row, by multiplications that round the same everywhere */
    for (size_t i = 0; i < n; i++) ((double *)data)[i] = i ? ((double *)data)[i - 1] * 0.7 : 1.0;
  if (packed(type)) {
    const int32_t groups = (cols + 31) / 32;
    w->scales_bytes = padded / 32 * 2;
    uint16_t *scales = room(w->scales_bytes), *mins = room(w->scales_bytes);
    w->scales = scales;
    if (type == SHOAL_Q4 && below(2)) w->mins = mins, w->mins_bytes = w->scales_bytes;
    for (int32_t p = 0; p < (rows + 15) / 16; p++)
      for (int32_t k = 0; k < cols; k++)
        for (int32_t i = 0; i < 16 && p * 16 + i < rows; i++) {
          const size_t group = (size_t)p * groups + k / 32;
          if (type == SHOAL_Q8)
            ((int8_t *)data)[group * 512 + k % 32 / 4 * 64 + i * 4 + k % 4] = (int8_t)(below(255) - 127);
          else
            ((uint8_t *)data)[group * 256 + k % 16 / 4 * 64 + i * 4 + k % 4] |= (uint8_t)(below(16) << k % 32 / 16 * 4);
          if (k % 32) continue;
          scales[group * 16 + i] = (uint16_t)(below(20) ? 0x1800 + below(0x800) : below(0x400));
          if (w->mins) mins[group * 16 + i] = (uint16_t)(0x8000 + 0x1c00 + below(0x800));
        }
  }
  return program.n_weights++;
}

static shoal_op *op(int32_t kind, int32_t out, int32_t in, int32_t n_weights) {
  shoal_op *o = &ops[program.n_ops++];
  *o = (shoal_op){.kind = kind, .out = out, .in = in, .angles = -1, .state = -1, .n_weights = n_weights};
  return o;
}

static int32_t step(int32_t kind, int32_t out, int32_t in, int32_t w, float epsilon) {
  shoal_op *o = op(kind, out, in, w >= 0);
  if (w >= 0) o->weights[0] = w;
  o->epsilon = epsilon;
  return out;
}

/* Two layers and a head of a shape that the seed chooses; all f32 buffers are outputs. */
static int32_t make_program(void) {
  static const int32_t GROUPS[] = {1, 2, 3, 4, 8, 9}, DIMS[] = {16, 32, 48, 64, 80};
  const int32_t group = GROUPS[below(6)], kv_heads = 1 + below(3), dim = DIMS[below(5)], heads = group * kv_heads;
  const int32_t hidden = 17 + below(200), inner = 17 + below(300), vocab = 100 + below(300), half = 1 + below(dim / 2);
  const int32_t q8 = below(3) > 0, matrix = q8 ? SHOAL_Q8 : SHOAL_F32, act = q8 ? SHOAL_Q8 : SHOAL_F32;
  const int32_t width = (heads + 2 * kv_heads) * dim;
  memset(&program, 0, sizeof program);
  const int32_t x = buffer(SHOAL_F32, hidden, SHOAL_ALL_ROWS), angles = buffer(SHOAL_F32, 2 * half, SHOAL_ALL_ROWS);
  const int32_t table = weight(matrix, vocab, hidden, 1);
  step(SHOAL_OP_EMBED, x, -1, table, 0);
  step(SHOAL_OP_ANGLES, angles, -1, weight(SHOAL_F64, 1, half, 1), 0);
  for (int32_t layer = 0; layer < 2; layer++) {
    states[program.n_states] = (shoal_state){(int32_t[]){SHOAL_F32, SHOAL_F16, SHOAL_Q8}[below(3)], kv_heads, dim};
    int32_t a = step(SHOAL_OP_NORM, buffer(act, hidden, SHOAL_ALL_ROWS), x, weight(SHOAL_F32, 1, hidden, 1), 1e-5f);
    const int32_t qkv = buffer(SHOAL_F32, width, SHOAL_ALL_ROWS);
    shoal_op *o = op(SHOAL_OP_MATMUL, qkv, a, 3);
    o->weights[0] = weight(matrix, heads * dim, hidden, 0.2f);
    o->weights[1] = weight(matrix, kv_heads * dim, hidden, 0.2f);
    o->weights[2] = weight(matrix, kv_heads * dim, hidden, 0.2f);
    if (below(2)) {
      o->n_biases = 3;
      o->biases[0] = weight(SHOAL_F32, 1, heads * dim, 1);
      o->biases[1] = below(2) ? -1 : weight(SHOAL_F32, 1, kv_heads * dim, 1);
      o->biases[2] = weight(SHOAL_F32, 1, kv_heads * dim, 1);
    }
    for (int32_t keys = below(2) ? 0 : 2; keys < 2; keys++) {
      step(SHOAL_OP_HEAD_NORM, qkv, -1, weight(SHOAL_F32, 1, dim, 1), 1e-6f);
      ops[program.n_ops - 1].column = keys ? heads * dim : 0;
      ops[program.n_ops - 1].heads = keys ? kv_heads : heads;
      ops[program.n_ops - 1].head_dim = dim;
    }
    o = op(SHOAL_OP_ROPE, qkv, -1, 0);
    o->angles = angles, o->heads = heads + kv_heads, o->head_dim = dim;
    o = op(SHOAL_OP_STORE, -1, qkv, 0);
    o->state = program.n_states, o->key = heads * dim, o->value = (heads + kv_heads) * dim;
    int32_t b = buffer(SHOAL_F32, heads * dim, SHOAL_ALL_ROWS);
    o = op(SHOAL_OP_ATTEND, b, qkv, 0);
    o->state = program.n_states++, o->heads = heads, o->scale = 0.25f;
    if (q8) b = step(SHOAL_OP_QUANTISE, buffer(SHOAL_Q8, heads * dim, SHOAL_ALL_ROWS), b, -1, 0);
    step(SHOAL_OP_MATMUL, x, b, weight(matrix, hidden, heads * dim, 0.1f), 0);
    ops[program.n_ops - 1].accumulate = 1;
    a = step(SHOAL_OP_NORM, buffer(act, hidden, SHOAL_ALL_ROWS), x, weight(SHOAL_F32, 1, hidden, 1), 1e-5f);
    const int32_t both = buffer(SHOAL_F32, 2 * inner, SHOAL_ALL_ROWS);
    o = op(SHOAL_OP_MATMUL, both, a, 2);
    o->weights[0] = weight(matrix, inner, hidden, 0.5f);
    o->weights[1] = weight(matrix, inner, hidden, 0.2f);
    b = step(SHOAL_OP_GATE, buffer(act, inner, SHOAL_ALL_ROWS), both, -1, 0);
    ops[program.n_ops - 1].activation = below(2) ? SHOAL_SILU : SHOAL_GELU_TANH;
    step(SHOAL_OP_MATMUL, x, b, weight(matrix, hidden, inner, 0.1f), 0);
    ops[program.n_ops - 1].accumulate = 1;
  }
  const int32_t last =
      step(SHOAL_OP_NORM, buffer(act, hidden, SHOAL_WANTED_ROWS), x, weight(SHOAL_F32, 1, hidden, 1), 1e-5f);
  const int32_t logits = step(SHOAL_OP_MATMUL, buffer(SHOAL_F32, vocab, SHOAL_WANTED_ROWS), last, table, 0);
  step(SHOAL_OP_SAMPLE, -1, logits, -1, 0);
  program.ops = ops, program.buffers = buffers, program.weights = weights, program.states = states,
  program.outputs = outputs;
  program.max_rows = program.max_wanted = MAX_ROWS * MAX_SEQUENCES;
  return vocab;
}

/* Sequences that grow together by runs of rows that the seed chooses. */
static void run_program(uint64_t seed, shoal_executor *executor, int32_t vocab) {
  static void *pages[MAX_SEQUENCES][2][MAX_PAGES];
  static int32_t history[MAX_SEQUENCES][POSITIONS];
  const int32_t n = seed % 3 ? MAX_SEQUENCES : 1; /* one row alone is shared out over threads in another way */
  shoal_sequence s[MAX_SEQUENCES];
  char error[256] = "";
  memset(s, 0, sizeof s);
  for (int32_t i = 0; i < MAX_SEQUENCES; i++) {
    for (int32_t k = 0; k < program.n_states; k++)
      for (int32_t p = 0; p < MAX_PAGES; p++) {
        const size_t bytes = (size_t)2 * SHOAL_PAGE * states[k].kv_heads * states[k].head_dim * 4;
        memset(pages[i][k][p] = room(bytes), 0xff, bytes); /* NaN: nobody may read what was not stored */
      }
    for (int32_t t = 0; t < POSITIONS; t++) history[i][t] = below(vocab);
    s[i] = (shoal_sequence){.pages = &pages[i][0][0], .pages_stride = MAX_PAGES, .history = history[i]};
    s[i].sampling = (shoal_sampling){(float)below(3) * 0.5f, below(2) * 20,       below(2) ? 1 : 0.9f,
                                     below(2) ? 0 : 0.05f,   below(2) ? 1 : 1.3f, next(),
                                     below(2) ? 0 : 0.7f,    below(2) ? 0 : 0.3f, 0, NULL, NULL, NULL};
    s[i].reported = (int32_t[]){0, 1, 4}[below(3)];
  }
  for (int32_t turn = 0;; turn++) {
    int32_t tokens[MAX_ROWS * MAX_SEQUENCES], drawn[MAX_ROWS * MAX_SEQUENCES], rows = 0, wanted = 0;
    float *out[MAX_OPS];
    for (int32_t i = 0; i < n; i++) {
      s[i].first += s[i].rows;
      s[i].rows = below(4) ? 1 + below(n > 1 ? 9 : 1) : 1 + below(MAX_ROWS);
      s[i].wanted = (int32_t[]){0, 1, s[i].rows}[below(3)];
      s[i].sample = (int32_t[]){0, s[i].wanted > 0, s[i].wanted}[below(3)];
      s[i].given = !s[i].sample && s[i].reported ? history[i] : NULL;
      if (s[i].first + s[i].rows > POSITIONS) return;
      for (int32_t r = 0; r < s[i].rows; r++) tokens[rows++] = history[i][s[i].first + r];
      wanted += s[i].wanted;
    }
    for (int32_t o = 0; o < program.n_outputs; o++) out[o] = room((size_t)rows * buffers[outputs[o]].cols * 4);
    static int32_t reports[MAX_ROWS * MAX_SEQUENCES][4];
    static float logprobs[MAX_ROWS * MAX_SEQUENCES][4];
    memset(reports, 0, sizeof reports);
    memset(logprobs, 0, sizeof logprobs);
    const shoal_batch batch = {.sequences = s,        .n_sequences = n,       .tokens = tokens,
                               .outputs = out,        .drawn = drawn,         .most_reported = 4,
                               .reports = reports[0], .logprobs = logprobs[0]};
    must(shoal_run(executor, &batch, error, sizeof error), error);
    uint64_t h = hash(0xcbf29ce484222325u, drawn, (size_t)wanted * sizeof drawn[0]);
    h = hash(hash(h, reports, sizeof reports), logprobs, sizeof logprobs);
    printf("%d %d drawn %016llx\n", (int)seed, turn, (unsigned long long)h);
    for (int32_t o = 0; o < program.n_outputs; o++) {
      const shoal_buffer *b = &buffers[outputs[o]];
      h = hash(0xcbf29ce484222325u, out[o], (size_t)(b->domain == SHOAL_ALL_ROWS ? rows : wanted) * b->cols * 4);
      if (turn == 0 || o == program.n_outputs - 1)
        printf("%d %d buffer %d %016llx\n", (int)seed, turn, outputs[o], (unsigned long long)h);
      free(out[o]);
    }
  }
}

static void flush_to_zero(void) {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)1 << 24));
#endif
}

int main(int argc, char **argv) {
  int32_t isa = -1;
  for (int32_t i = 0; i < 8; i++)
    if (argc > 1 && !strcmp(shoal_isa_name(i), argv[1])) isa = i;
  if (argc == 2) return !shoal_isa_available(isa);
  if (argc != 6 || isa < 0) return 1;
  shoal_pool *pool = shoal_pool_open(atoi(argv[2]));
  if (!pool) return 3;
  if (atoi(argv[3])) flush_to_zero();
  for (int32_t seed = atoi(argv[4]); seed < atoi(argv[5]); seed++) {
    char error[256] = "";
    shoal_executor *executor;
    state = (uint64_t)seed * 1000003;
    const int32_t vocab = make_program();
    must(shoal_open(&program, pool, isa, &executor, error, sizeof error), error);
    run_program((uint64_t)seed, executor, vocab);
    shoal_close(executor);
  }
  shoal_pool_close(pool);
  return 0;
}
