/* csrc/avxvnni.c for CPUs that have not its one instruction: a call in its
 * place, in the seat of the avx2 set, which dispatch.c gives to every CPU that
 * can run the rest. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* vpdpbusd as Intel's manual has it: to each 32-bit lane, four products of
 * unsigned with signed bytes. */
__attribute__((noinline, target("avx2"))) static __m256i
dpbusd(__m256i sum, __m256i w, __m256i x) {
  int32_t lanes[8];
  uint8_t u[32];
  int8_t s[32];
  memcpy(lanes, &sum, sizeof lanes);
  memcpy(u, &w, sizeof u);
  memcpy(s, &x, sizeof s);
  for (int32_t i = 0; i < 32; i++)
    lanes[i / 4] += (int32_t)u[i] * (int32_t)s[i];
  memcpy(&sum, lanes, sizeof sum);
  return sum;
}

#define DPBUSD(sum, w, x) ((sum) = dpbusd(sum, w, x))
#define shoal_kernels_avxvnni shoal_kernels_avx2
#include "../../csrc/avxvnni.c"
