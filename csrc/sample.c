/* The sampler: draws one token as a pure function of the logits, the parameters, the previous tokens and (seed, position), so
 * that a replay, or another device, draws the same token. docs/numerics.md defines it; engine/sampler.py is the test
 * oracle. */
#include "common.h"

enum { RUN = 64 }; /* tokens that share one entry of run_largest */

typedef struct {
  const float *logits;
  float *p;           /* exp((logit - largest) / temperature) */
  float *run_largest; /* largest p in each run of RUN tokens */
  int32_t *ids;       /* candidates: a heap, then sorted */
  int32_t vocab;
} candidates;

static size_t padded(int32_t vocab) { return SHOAL_UP((size_t)vocab, RUN); }

size_t shoal_sample_scratch(int32_t vocab) {
  return padded(vocab) * (2 * sizeof(float) + sizeof(int32_t)) + padded(vocab) / RUN * sizeof(float);
}

static uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

/* A uniform number in [0, 1) with 53 bits: SplitMix64's finaliser over the seed, then over the position. */
static double uniform(uint64_t seed, int32_t position) {
  const uint64_t golden = 0x9e3779b97f4a7c15u;
  return (double)(mix((mix(seed + golden) ^ (uint64_t)position) + golden) >> 11) * 0x1p-53;
}

/* The order of candidates: the larger logit first, among equal ones the lower id. */
static int32_t before(const float *logits, int32_t a, int32_t b) {
  return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

static void sift(const candidates *c, int32_t at, int32_t n) {
  const int32_t id = c->ids[at];
  for (int32_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && before(c->logits, c->ids[child + 1], c->ids[child])) child++;
    if (!before(c->logits, c->ids[child], id)) break;
    c->ids[at] = c->ids[child];
  }
  c->ids[at] = id;
}

/* Moves the first of the n candidates, in order, to the front of ids, until there are `most` of them or their p sum to
 * `mass`; returns their number. */
static int32_t order(const candidates *c, int32_t n, int32_t most, double mass) {
  int32_t taken = 0;
  double sum = 0;
  for (int32_t at = n / 2 - 1; at >= 0; at--) sift(c, at, n);
  while (taken < n && taken < most && (taken == 0 || sum < mass)) {
    const int32_t first = c->ids[0], last = n - 1 - taken;
    c->ids[0] = c->ids[last];
    c->ids[last] = first;
    sift(c, 0, last);
    sum += (double)c->p[first];
    taken++;
  }
  for (int32_t i = 0, j = n - 1; i < j; i++, j--) {
    const int32_t id = c->ids[i];
    c->ids[i] = c->ids[j];
    c->ids[j] = id;
  }
  return taken;
}

/* order() over all tokens with p >= floor. Few of them matter, so only those with p >= cut are examined, and the cut is
 * lowered until they suffice; the outcome does not depend on the cut. */
static int32_t select_first(const candidates *c, int32_t most, double mass, float floor) {
  for (float cut = 0x1p-5f;; cut *= 0x1p-5f) {
    if (cut < floor || cut < 0x1p-80f) cut = floor;
    int32_t n = 0;
    double sum = 0;
    for (int32_t run = 0; run < c->vocab; run += RUN) {
      if (c->run_largest[run / RUN] < cut) continue;
      for (int32_t id = run; id < SHOAL_MIN(run + RUN, c->vocab); id++) {
        if (c->p[id] < cut) continue;
        c->ids[n++] = id;
        sum += (double)c->p[id];
      }
    }
    if (cut > floor && n < most && sum < mass) continue;
    const int32_t taken = order(c, n, most, mass);
    if (taken < n || taken == most || cut <= floor) return taken;
  }
}

static double sum_of(const candidates *c, const int32_t *ids, int32_t n) {
  double sum = 0;
  for (int32_t i = 0; i < n; i++) sum += (double)c->p[ids ? ids[i] : i];
  return sum;
}

/* Truncates to top_k, then to the shortest prefix with the share top_p of the rest, then to p >= min_p times the largest p,
 * which is 1. Returns how many candidates remain, in order, at the front of ids. */
static int32_t truncate(const candidates *c, const shoal_sampling *s) {
  const int32_t k = s->top_k > 0 ? SHOAL_MIN(s->top_k, c->vocab) : c->vocab, some = k < c->vocab;
  const double all = (double)c->vocab * 2;
  double mass = all;
  if (!some && s->top_p < 1) mass = (double)s->top_p * sum_of(c, NULL, c->vocab);
  const int32_t taken = select_first(c, k, mass, some && s->top_p < 1 ? 0.0f : s->min_p);
  if (some && s->top_p < 1) mass = (double)s->top_p * sum_of(c, c->ids, taken);
  double sum = 0;
  int32_t n = 0;
  for (; n < taken && (n == 0 || (sum < mass && c->p[c->ids[n]] >= s->min_p)); n++) sum += (double)c->p[c->ids[n]];
  return n;
}

/* The first of n candidates whose cumulative p exceeds u times the total; ids = NULL: all tokens by id. */
static int32_t draw(const candidates *c, const int32_t *ids, int32_t n, double u) {
  const double goal = u * sum_of(c, ids, n);
  double sum = 0;
  for (int32_t i = 0; i < n; i++) {
    const int32_t id = ids ? ids[i] : i;
    sum += (double)c->p[id];
    if (sum > goal) return id;
  }
  return ids ? ids[n - 1] : n - 1;
}

int32_t shoal_sample(const shoal_kernels *kernels, const float *logits, int32_t vocab, const shoal_sampling *s,
                     const int32_t *history, int32_t position, void *scratch) {
  float *changed = scratch, *p = changed + padded(vocab), *run_largest = p + padded(vocab);
  candidates c = {logits, p, run_largest, (int32_t *)(run_largest + padded(vocab) / RUN), vocab};
  if (!kernels->finite(logits, vocab)) return -1;
  if (s->repetition_penalty != 1.0f) {
    memcpy(changed, logits, (size_t)vocab * sizeof(float));
    for (int32_t i = 0; i < position; i++) { /* from the original logit: a token that occurs twice is penalised once */
      const float logit = logits[history[i]];
      changed[history[i]] = logit > 0 ? logit / s->repetition_penalty : logit * s->repetition_penalty;
    }
    if (!kernels->finite(changed, vocab)) return -1;
    c.logits = changed;
  }
  const float largest = kernels->largest(c.logits, vocab);
  if (s->temperature == 0) {
    int32_t first = 0;
    while (c.logits[first] != largest) first++;
    return first;
  }
  kernels->exponentials(c.logits, vocab, largest, s->temperature, p);
  const double u = uniform(s->seed, position);
  if (s->top_k <= 0 && s->top_p >= 1 && s->min_p <= 0) return draw(&c, NULL, vocab, u);
  for (int32_t run = 0; run < vocab; run += RUN)
    run_largest[run / RUN] = kernels->largest(p + run, SHOAL_MIN(RUN, vocab - run));
  return draw(&c, c.ids, truncate(&c, s), u);
}
