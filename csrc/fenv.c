/* The floating-point environment that docs/numerics.md defines. A host application may have set flush-to-zero or another
 * rounding mode; its setting is restored afterwards. */
#include "common.h"

#if defined(__x86_64__)
#include <xmmintrin.h>

uint64_t shoal_fenv_set(void) {
  const uint64_t before = _mm_getcsr();
  _mm_setcsr(0x1f80); /* exceptions masked, to nearest, denormals kept */
  return before;
}

void shoal_fenv_restore(uint64_t before) { _mm_setcsr((uint32_t)before); }

#elif defined(__aarch64__)

uint64_t shoal_fenv_set(void) {
  uint64_t before;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before));
  __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
  return before;
}

void shoal_fenv_restore(uint64_t before) { __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory"); }

#else
#include <fenv.h>

uint64_t shoal_fenv_set(void) {
  const int before = fegetround();
  fesetround(FE_TONEAREST);
  return (uint64_t)before;
}

void shoal_fenv_restore(uint64_t before) { fesetround((int)before); }
#endif
