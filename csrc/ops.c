/* The table of op kinds: what each reads, writes and allows. A new op begins with a row here (docs/architecture.md). */
#include "common.h"

enum {
  F32 = 1 << SHOAL_F32,
  F64 = 1 << SHOAL_F64,
  Q8 = 1 << SHOAL_Q8,
  Q4 = 1 << SHOAL_Q4,
  ALL = 1 << SHOAL_ALL_ROWS,
  WANTED = 1 << SHOAL_WANTED_ROWS
};

static const shoal_op_info OPS[] = {
    [SHOAL_OP_EMBED] = {.name = "embed",
                        .flags = SHOAL_WRITES_OUT,
                        .out_types = F32,
                        .domains = ALL,
                        .least_weights = 1,
                        .most_weights = 1,
                        .weight_types = F32 | Q8 | Q4,
                        .split = SHOAL_BY_ROWS},
    [SHOAL_OP_ANGLES] = {.name = "angles",
                         .flags = SHOAL_WRITES_OUT,
                         .out_types = F32,
                         .domains = ALL,
                         .least_weights = 1,
                         .most_weights = 1,
                         .weight_types = F64,
                         .split = SHOAL_BY_ROWS},
    [SHOAL_OP_NORM] = {.name = "norm",
                       .flags = SHOAL_READS_IN | SHOAL_WRITES_OUT | SHOAL_GATHERS,
                       .in_types = F32,
                       .out_types = F32 | Q8,
                       .domains = ALL | WANTED,
                       .least_weights = 1,
                       .most_weights = 1,
                       .weight_types = F32,
                       .split = SHOAL_BY_ROWS},
    [SHOAL_OP_QUANTISE] = {.name = "quantise",
                           .flags = SHOAL_READS_IN | SHOAL_WRITES_OUT,
                           .in_types = F32,
                           .out_types = Q8,
                           .domains = ALL | WANTED,
                           .split = SHOAL_BY_ROWS},
    [SHOAL_OP_MATMUL] = {.name = "matmul",
                         .flags = SHOAL_READS_IN | SHOAL_WRITES_OUT | SHOAL_ACCUMULATES,
                         .in_types = F32 | Q8,
                         .out_types = F32,
                         .domains = ALL | WANTED,
                         .least_weights = 1,
                         .most_weights = SHOAL_MAX_PARTS,
                         .weight_types = F32 | Q8 | Q4,
                         .split = SHOAL_BY_PANELS},
    [SHOAL_OP_ROPE] = {.name = "rope",
                       .flags = SHOAL_READS_ANGLES | SHOAL_WRITES_OUT | SHOAL_IN_PLACE,
                       .out_types = F32,
                       .domains = ALL | WANTED,
                       .split = SHOAL_BY_ROWS},
    [SHOAL_OP_STORE] = {.name = "store",
                        .flags = SHOAL_READS_IN | SHOAL_HAS_STATE,
                        .in_types = F32,
                        .domains = ALL,
                        .split = SHOAL_BY_SPANS},
    [SHOAL_OP_ATTEND] = {.name = "attend",
                         .flags = SHOAL_READS_IN | SHOAL_WRITES_OUT | SHOAL_HAS_STATE,
                         .in_types = F32,
                         .out_types = F32,
                         .domains = ALL,
                         .split = SHOAL_BY_KV_HEADS},
    [SHOAL_OP_GATE] = {.name = "gate",
                       .flags = SHOAL_READS_IN | SHOAL_WRITES_OUT,
                       .in_types = F32,
                       .out_types = F32 | Q8,
                       .domains = ALL | WANTED,
                       .split = SHOAL_BY_ROWS},
    [SHOAL_OP_SAMPLE] = {.name = "sample",
                         .flags = SHOAL_READS_IN,
                         .in_types = F32,
                         .domains = WANTED,
                         .split = SHOAL_BY_SEQUENCES},
};
enum { N_KINDS = sizeof OPS / sizeof *OPS };

const shoal_op_info *shoal_op_info_of(int32_t kind) { return kind >= 0 && kind < N_KINDS ? &OPS[kind] : NULL; }

int32_t shoal_keeps_out(const shoal_op *op) {
  const int32_t flags = OPS[op->kind].flags;
  return (flags & SHOAL_IN_PLACE) || ((flags & SHOAL_ACCUMULATES) && op->accumulate);
}
