/* One matrix product of an instruction set, to have its instructions counted. All numbers are 0: no count depends on them.
 *
 *     product ISA q8|q4 ROWS COLUMNS PANELS */
#include "../../csrc/common.h"

#include <stdlib.h>

int main(int argc, char **argv) {
  if (argc != 6) return 1;
  const shoal_kernels *kernels = NULL;
  for (int32_t isa = 1; isa < 8; isa++)
    if (!strcmp(shoal_isa_name(isa), argv[1])) kernels = shoal_kernels_of(isa);
  if (!kernels) return 1;
  const int32_t type = strcmp(argv[2], "q8") ? SHOAL_Q4 : SHOAL_Q8;
  const int32_t rows = atoi(argv[3]), cols = atoi(argv[4]), panels = atoi(argv[5]);
  const size_t outputs = (size_t)panels * SHOAL_PANEL, groups = (size_t)shoal_groups(cols);
  const shoal_buffer in = {SHOAL_Q8, cols, SHOAL_ALL_ROWS}, out = {SHOAL_F32, (int32_t)outputs, SHOAL_ALL_ROWS};
  const shoal_weight w = {
      .data = calloc(outputs * groups, SHOAL_GROUP),
      .scales = calloc(outputs * groups, sizeof(uint16_t)),
      .type = type,
      .rows = (int32_t)outputs,
      .cols = cols,
  };
  const shoal_matmul task = {
      .in = calloc((size_t)rows, shoal_row_bytes(&in)),
      .out = calloc((size_t)rows, shoal_row_bytes(&out)),
      .in_stride = shoal_row_bytes(&in),
      .out_stride = shoal_row_bytes(&out),
      .w = &w,
      .row1 = rows,
      .panel1 = panels,
  };
  if (!w.data || !w.scales || !task.in || !task.out) return 1;
  (type == SHOAL_Q8 ? kernels->matmul_q8 : kernels->matmul_q4)(&task);
  return 0;
}
