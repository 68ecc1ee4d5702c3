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
  const uint8_t *allowed;
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
  int32_t last = n - 1; /* u times the total was rounded up to it */
  while (!shoal_is_allowed(c->allowed, ids ? ids[last] : last)) last--;
  return ids ? ids[last] : last;
}

/* The logits after biases, penalties and the mask: `changed`, or the given ones if nothing changes them. A token's penalties
 * count once, whatever its number of occurrences. */
static const float *adjusted(const float *logits, int32_t vocab, const shoal_sampling *s, const int32_t *history,
                             int32_t position, float *changed, int32_t *counts) {
  if (!s->n_biases && !shoal_penalises(s) && !s->allowed) return logits;
  memcpy(changed, logits, (size_t)vocab * sizeof(float));
  for (int32_t i = 0; i < s->n_biases; i++) changed[s->biased[i]] += s->biases[i];
  if (shoal_penalises(s)) {
    memset(counts, 0, (size_t)vocab * sizeof(int32_t));
    for (int32_t i = 0; i < position; i++) counts[history[i]]++;
    for (int32_t i = 0; i < position; i++) {
      float *logit = &changed[history[i]];
      const float count = (float)counts[history[i]];
      if (count == 0) continue;
      counts[history[i]] = 0;
      if (s->repetition_penalty != 1.0f)
        *logit = *logit > 0 ? *logit / s->repetition_penalty : *logit * s->repetition_penalty;
      *logit -= s->presence_penalty + s->frequency_penalty * count;
    }
  }
  return changed;
}

/* Lowers the logits of tokens that are not allowed so far that they are never drawn. */
static void forbid(float *logits, int32_t vocab, const uint8_t *allowed) {
  for (int32_t t = 0; t < vocab; t++)
    if (!shoal_is_allowed(allowed, t)) logits[t] = -FLT_MAX;
}

int32_t shoal_sample(const shoal_kernels *kernels, const float *logits, int32_t vocab, const shoal_sampling *s,
                     const int32_t *history, int32_t position, void *scratch) {
  float *changed = scratch, *p = changed + padded(vocab), *run_largest = p + padded(vocab);
  candidates c = {logits, p, run_largest, (int32_t *)(run_largest + padded(vocab) / RUN), vocab, s->allowed};
  if (!kernels->finite(logits, vocab)) return -1;
  c.logits = adjusted(logits, vocab, s, history, position, changed, c.ids);
  if (c.logits == changed && !kernels->finite(changed, vocab)) return -1;
  if (s->allowed) forbid(changed, vocab, s->allowed);
  const float largest = kernels->largest(c.logits, vocab);
  if (s->temperature == 0) {
    int32_t first = 0;
    while (c.logits[first] != largest || !shoal_is_allowed(s->allowed, first)) first++;
    return first;
  }
  kernels->exponentials(c.logits, vocab, largest, s->temperature, p);
  for (int32_t t = 0; s->allowed && t < vocab; t++)
    if (!shoal_is_allowed(s->allowed, t)) p[t] = 0; /* at a high temperature, even the lowest logit has some p */
  const double u = uniform(s->seed, position);
  if (s->top_k <= 0 && s->top_p >= 1 && s->min_p <= 0) return draw(&c, NULL, vocab, u);
  for (int32_t run = 0; run < vocab; run += RUN)
    run_largest[run / RUN] = kernels->largest(p + run, SHOAL_MIN(RUN, vocab - run));
  return draw(&c, c.ids, truncate(&c, s), u);
}

/* The natural logarithm of x >= 1, by the series of the inverse hyperbolic tangent: libraries differ in the last bit. */
static double logarithm(double x) {
  int32_t exponent = 0;
  while (x >= 0x1p32) x *= 0x1p-32, exponent += 32;
  while (x > 0x1.6a09e667f3bcdp0) x *= 0.5, exponent++;
  const double z = (x - 1) / (x + 1), square = z * z;
  double sum = 0;
  for (int32_t k = 23; k > 0; k -= 2) sum = sum * square + 1.0 / k;
  return 2 * z * sum + exponent * 0x1.62e42fefa39efp-1;
}

void shoal_report(const shoal_kernels *kernels, const float *logits, int32_t vocab, int32_t n, int32_t *reports,
                  float *logprobs, void *scratch) {
  float *p = (float *)scratch + padded(vocab);
  const candidates c = {logits, p, NULL, NULL, vocab, NULL};
  const float largest = kernels->largest(logits, vocab);
  kernels->exponentials(logits, vocab, largest, 1.0f, p);
  const double total = logarithm(sum_of(&c, NULL, vocab));
  int32_t *likely = reports + 1, found = 0;
  for (int32_t t = 0; n > 1 && t < vocab; t++) {
    if (found == n - 1 && !before(logits, t, likely[found - 1])) continue;
    int32_t at = found < n - 1 ? found++ : found - 1;
    for (; at > 0 && before(logits, t, likely[at - 1]); at--) likely[at] = likely[at - 1];
    likely[at] = t;
  }
  for (int32_t i = 0; i < n; i++) logprobs[i] = (float)((double)logits[reports[i]] - (double)largest - total);
}
