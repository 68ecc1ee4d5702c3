/* The workspace: a buffer takes room only from an op that writes it anew to the last that reads it, so buffers that
 * never live together share memory. Planned once, when a program is opened, in bytes a row: a batch of few rows lies
 * close together at the beginning. */
#include "common.h"

#include <stdlib.h>

enum { ALIGN = 64 };

/* What a buffer holds from one full writing to the next: alive in ops [begin, end]. */
typedef struct {
  int32_t begin, end, domain;
  uint64_t at, bytes; /* a row */
} version;

size_t shoal_row_bytes(const shoal_buffer *b) {
  const size_t groups = (size_t)shoal_groups(b->cols);
  const size_t bytes = b->type == SHOAL_Q8 ? groups * (SHOAL_GROUP + 8) : (size_t)b->cols * sizeof(float);
  return SHOAL_UP(bytes, ALIGN);
}

static int32_t begin_version(const shoal_program *p, version *versions, int32_t *n, int32_t b, int32_t op) {
  versions[*n] = (version){op, op, p->buffers[b].domain, 0, shoal_row_bytes(&p->buffers[b])};
  return (*n)++;
}

/* Versions are in the order of their beginning: each goes to the lowest place that those of its domain which are still
 * alive leave free. How many bytes a row that takes. */
static uint64_t place(version *versions, int32_t n, int32_t domain, int32_t *alive) {
  uint64_t most = 0;
  int32_t n_alive = 0;
  for (int32_t v = 0; v < n; v++) {
    version *new = &versions[v];
    int32_t kept = 0;
    if (new->domain != domain) continue;
    for (int32_t i = 0; i < n_alive; i++)
      if (versions[alive[i]].end >= new->begin) alive[kept++] = alive[i];
    n_alive = kept;
    for (int32_t i = 0; i < n_alive; i++) {
      const version *old = &versions[alive[i]];
      if (new->at < old->at + old->bytes && old->at < new->at + new->bytes) {
        new->at = old->at + old->bytes;
        i = -1; /* moved: look at all of them again */
      }
    }
    alive[n_alive++] = v;
    most = SHOAL_MAX(most, new->at + new->bytes);
  }
  return most;
}

typedef struct {
  int32_t out, in, angles;
} op_versions;

static void follow(const shoal_program *p, version *versions, int32_t *n, int32_t *now, op_versions *used,
                   int32_t *entering) {
  for (int32_t i = 0; i < p->n_inputs; i++)
    entering[i] = now[p->inputs[i]] = begin_version(p, versions, n, p->inputs[i], -1);
  for (int32_t i = 0; i < p->n_ops; i++) {
    const shoal_op *op = &p->ops[i];
    const int32_t flags = shoal_op_info_of(op->kind)->flags;
    if (flags & SHOAL_READS_IN) versions[used[i].in = now[op->in]].end = i;
    if (flags & SHOAL_READS_ANGLES) versions[used[i].angles = now[op->angles]].end = i;
    if (!(flags & SHOAL_WRITES_OUT)) continue;
    if (!shoal_keeps_out(op)) now[op->out] = begin_version(p, versions, n, op->out, i);
    versions[used[i].out = now[op->out]].end = i;
  }
  for (int32_t i = 0; i < p->n_outputs; i++) versions[now[p->outputs[i]]].end = p->n_ops;
}

int32_t shoal_plan(const shoal_program *p, shoal_places *at, uint64_t *input_at, uint64_t *output_at,
                   uint64_t bytes[2]) {
  const size_t most = (size_t)p->n_ops + (size_t)p->n_inputs + 1;
  version *versions = calloc(most, sizeof *versions);
  op_versions *used = calloc(most, sizeof *used);
  int32_t *ids = calloc(2 * most + (size_t)p->n_buffers, sizeof *ids), n = 0;
  int32_t *alive = ids, *entering = ids + most, *now = ids + 2 * most;
  if (!versions || !used || !ids) {
    free(versions), free(used), free(ids);
    return SHOAL_E_MEMORY;
  }
  follow(p, versions, &n, now, used, entering);
  for (int32_t domain = SHOAL_ALL_ROWS; domain <= SHOAL_WANTED_ROWS; domain++)
    bytes[domain] = place(versions, n, domain, alive);
  for (int32_t i = 0; i < p->n_ops; i++)
    at[i] = (shoal_places){versions[used[i].out].at, versions[used[i].in].at, versions[used[i].angles].at};
  for (int32_t i = 0; i < p->n_inputs; i++) input_at[i] = versions[entering[i]].at;
  for (int32_t i = 0; i < p->n_outputs; i++) output_at[i] = versions[now[p->outputs[i]]].at;
  free(versions), free(used), free(ids);
  return SHOAL_OK;
}
