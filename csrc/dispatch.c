/* CPU detection: the only file that asks the CPU for its instruction sets. */
#define _GNU_SOURCE
#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

typedef struct {
  const char *name;
  const shoal_kernels *kernels; /* NULL: not in this build */
  int32_t (*here)(void);
} isa_row;

static int32_t always(void) { return 1; }

#if defined(__x86_64__)
enum { LEAF1_FMA = 1 << 12, LEAF1_OSXSAVE = 1 << 27, LEAF1_F16C = 1 << 29, LEAF7_AVX2 = 1 << 5 };
enum { XCR0_YMM = 0x6, XCR0_ZMM = 0xe6 };

/* Whether CPUID leaf 7 has all bits of ebx and ecx, and the operating system saves the registers in `saved`. */
static int32_t has(uint32_t ebx, uint32_t ecx, uint32_t saved) {
  uint32_t a, b, c, d, low, high;
  const uint32_t leaf1 = LEAF1_FMA | LEAF1_OSXSAVE | LEAF1_F16C;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1) != leaf1) return 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & saved) != saved) return 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & ebx) == ebx && (c & ecx) == ecx;
}

static int32_t has_avx2(void) { return has(LEAF7_AVX2, 0, XCR0_YMM); }

static int32_t has_avxvnni(void) {
  const uint32_t leaf71_vnni = 1u << 4;
  uint32_t a, b, c, d;
  if (!has_avx2() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return 0; /* a is the last subleaf */
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & leaf71_vnni) != 0;
}

static int32_t has_avx512(void) {
  const uint32_t f = 1u << 16, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
  return has(LEAF7_AVX2 | f | bw | vl, vnni, XCR0_ZMM);
}
#define SET_X86(kernels) &(kernels)
#else
#define has_avx2 always
#define has_avxvnni always
#define has_avx512 always
#define SET_X86(kernels) NULL
#endif

#if defined(__aarch64__) && defined(__linux__)
enum { HWCAP_SDOT = 1 << 20, HWCAP2_SMMLA = 1 << 13 };
static int32_t has_neon_dot(void) { return (getauxval(AT_HWCAP) & HWCAP_SDOT) != 0; }
static int32_t has_neon_i8mm(void) { return has_neon_dot() && (getauxval(AT_HWCAP2) & HWCAP2_SMMLA) != 0; }
#elif defined(__aarch64__)
static int32_t never(void) { return 0; }
#define has_neon_dot never /* detected on Linux only */
#define has_neon_i8mm never
#else
#define has_neon_dot always
#define has_neon_i8mm always
#endif

#if defined(__aarch64__)
#define SET_ARM(kernels) &(kernels)
#else
#define SET_ARM(kernels) NULL
#endif

#if defined(SHOAL_ARM_EXTENSIONS)
#define SET_ARM_EXTENSION(kernels) &(kernels)
#else
#define SET_ARM_EXTENSION(kernels) NULL
#endif

/* Indexed by enum shoal_isa; of the sets that a CPU supports, the last one is the fastest. */
static const isa_row SETS[] = {
    [SHOAL_ISA_AUTO] = {"auto", NULL, always},
    [SHOAL_ISA_SCALAR] = {"scalar", &shoal_kernels_scalar, always},
    [SHOAL_ISA_AVX2] = {"avx2", SET_X86(shoal_kernels_avx2), has_avx2},
    [SHOAL_ISA_AVXVNNI] = {"avxvnni", SET_X86(shoal_kernels_avxvnni), has_avxvnni},
    [SHOAL_ISA_AVX512] = {"avx512", SET_X86(shoal_kernels_avx512), has_avx512},
    [SHOAL_ISA_NEON] = {"neon", SET_ARM(shoal_kernels_neon), always},
    [SHOAL_ISA_NEON_DOT] = {"neon_dot", SET_ARM_EXTENSION(shoal_kernels_neon_dot), has_neon_dot},
    [SHOAL_ISA_NEON_I8MM] = {"neon_i8mm", SET_ARM_EXTENSION(shoal_kernels_neon_i8mm), has_neon_i8mm},
};
enum { N_SETS = sizeof SETS / sizeof *SETS };

const shoal_kernels *shoal_kernels_of(int32_t isa) {
  if (isa == SHOAL_ISA_AUTO) isa = shoal_isa_best();
  return isa > 0 && isa < N_SETS && SETS[isa].kernels && SETS[isa].here() ? SETS[isa].kernels : NULL;
}

int32_t shoal_isa_best(void) {
  for (int32_t isa = N_SETS - 1; isa > SHOAL_ISA_SCALAR; isa--)
    if (shoal_kernels_of(isa)) return isa;
  return SHOAL_ISA_SCALAR;
}

int32_t shoal_isa_available(int32_t isa) { return shoal_kernels_of(isa) != NULL; }

const char *shoal_isa_name(int32_t isa) { return isa >= 0 && isa < N_SETS ? SETS[isa].name : "unknown"; }

#ifndef SHOAL_SOURCE_HASH
#define SHOAL_SOURCE_HASH "unknown"
#endif

const char *shoal_source_hash(void) { return SHOAL_SOURCE_HASH; }
