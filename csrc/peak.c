/* Ceilings of this device, which `shoal bench` compares the engine with: a loop that only reads memory (with software
 * prefetch and without, since which is faster depends on the CPU and its load), and for each instruction set a loop of dot
 * products on registers. */
#include "executor.h"

enum { LINE = 64, AHEAD = 4096 };

typedef struct {
  const char *const *data;
  const uint64_t *bytes;
  int32_t n;
  int32_t fetch;
  uint64_t seen; /* a checksum, so that the compiler cannot drop the reads */
} reading;

typedef struct {
  void (*turns)(int64_t n);
  int64_t n;
} computing;

SHOAL_INLINE void read_piece(const char *at, uint64_t bytes, const int32_t fetch, uint64_t *seen) {
  for (const char *const end = at + bytes / LINE * LINE; at < end; at += LINE) {
    uint64_t line[LINE / 8];
    if (fetch) __builtin_prefetch(at + AHEAD, 0, 0);
    memcpy(line, at, LINE);
    for (int32_t w = 0; w < LINE / 8; w++) seen[w] ^= line[w];
  }
}

static void read_pieces(void *argument, int64_t first, int64_t last, int32_t thread) {
  reading *r = argument;
  uint64_t seen[LINE / 8] = {0}, all = 0;
  (void)thread;
  for (int64_t i = first; i < last; i++) {
    if (r->fetch)
      read_piece(r->data[i % r->n], r->bytes[i % r->n], 1, seen);
    else
      read_piece(r->data[i % r->n], r->bytes[i % r->n], 0, seen);
  }
  for (int32_t w = 0; w < LINE / 8; w++) all ^= seen[w];
  __atomic_fetch_xor(&r->seen, all, __ATOMIC_RELAXED);
}

uint64_t shoal_read_peak(shoal_pool *pool, const char *const *data, const uint64_t *bytes, int32_t n, int32_t passes,
                         int32_t fetch, uint64_t *seen) {
  if (n < 1 || passes < 1 || (int64_t)n * passes > UINT32_MAX || !shoal_pool_take(pool)) return 0;
  reading r = {data, bytes, n, fetch, 0};
  const int64_t begin = shoal_now_ns();
  shoal_pool_run(pool, read_pieces, &r, (int64_t)n * passes, 1, shoal_pool_threads(pool));
  const int64_t end = shoal_now_ns();
  shoal_pool_give(pool);
  *seen = r.seen;
  return (uint64_t)(end - begin);
}

enum { SUMS = 12 }; /* independent sums: more than latency times throughput of any of these instructions */

#if defined(__x86_64__)
/* Registers are named explicitly, so that no target attribute is needed: 0 to 11 are sums, 12 and 13 are the operands. */
#define TWELVE(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11)
#define NAMED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
#define LOOP(body)                                                        \
  __asm__ volatile("1:\n\t" TWELVE(body) "dec %0\n\tjnz 1b\n\tvzeroupper" \
                   : "+r"(n)                                              \
                   :                                                      \
                   : NAMED, "xmm12", "xmm13", "xmm14", "cc")
#define ZMM(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define YMM(i) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define SIGNED(i)                            \
  "vpsignb %%ymm12, %%ymm13, %%ymm14\n\t"    \
  "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t" \
  "vpmaddwd %%ymm14, %%ymm12, %%ymm14\n\t"   \
  "vpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"

static void avx512(int64_t n) { LOOP(ZMM); }
static void avxvnni(int64_t n) { LOOP(YMM); }
static void avx2(int64_t n) { LOOP(SIGNED); }
#elif defined(__aarch64__)
#include <arm_neon.h>

/* The operand must look new in each iteration, or the compiler would hoist the products out of the loop. */
#define LOOP(one)                                             \
  int8x16_t w = vdupq_n_s8(3), x = vdupq_n_s8(5);             \
  int32x4_t sum[SUMS];                                        \
  for (int32_t i = 0; i < SUMS; i++) sum[i] = vdupq_n_s32(i); \
  for (; n; n--) {                                            \
    SHOAL_UNROLL(12)                                          \
    for (int32_t i = 0; i < SUMS; i++) {                      \
      __asm__ volatile("" : "+w"(x));                         \
      one;                                                    \
    }                                                         \
  }                                                           \
  for (int32_t i = 0; i < SUMS; i++) __asm__ volatile("" ::"w"(sum[i]))

static void neon(int64_t n) { /* as in neon.c: two lines at once, half a register at a time */
  LOOP(sum[i] =
           vpadalq_s16(sum[i], vmlal_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vget_low_s8(w), vget_low_s8(x))));
}

#if defined(SHOAL_ARM_EXTENSIONS)
__attribute__((target("arch=armv8.2-a+dotprod"))) static void neon_dot(int64_t n) {
  LOOP(sum[i] = vdotq_s32(sum[i], w, x));
}

__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))) static void neon_i8mm(int64_t n) {
  LOOP(sum[i] = vmmlaq_s32(sum[i], w, x));
}
#endif
#endif

/* Multiply-accumulates per sum and iteration, and the loop. */
static const struct {
  int32_t macs;
  void (*turns)(int64_t n);
} LOOPS[] = {
#if defined(__x86_64__)
    [SHOAL_ISA_AVX2] = {32, avx2},
    [SHOAL_ISA_AVXVNNI] = {32, avxvnni},
    [SHOAL_ISA_AVX512] = {64, avx512},
#elif defined(__aarch64__)
    [SHOAL_ISA_NEON] = {16, neon},
#if defined(SHOAL_ARM_EXTENSIONS)
    [SHOAL_ISA_NEON_DOT] = {16, neon_dot},
    [SHOAL_ISA_NEON_I8MM] = {32, neon_i8mm},
#endif
#endif
    [SHOAL_ISA_NEON_I8MM + 1] = {0, NULL},
};

static void compute(void *argument, int64_t first, int64_t last, int32_t thread) {
  const computing *c = argument;
  (void)thread;
  for (int64_t i = first; i < last; i++) c->turns(c->n);
}

uint64_t shoal_dot_peak(shoal_pool *pool, int32_t isa, int64_t turns, uint64_t *macs) {
  const int32_t parts = 16 * shoal_pool_threads(pool);
  if (isa == SHOAL_ISA_AUTO) isa = shoal_isa_best();
  *macs = 0;
  if (turns < 1 || !shoal_isa_available(isa) || !LOOPS[isa].turns || !shoal_pool_take(pool)) return 0;
  computing c = {LOOPS[isa].turns, turns};
  const int64_t begin = shoal_now_ns();
  shoal_pool_run(pool, compute, &c, parts, 1, 0);
  const int64_t end = shoal_now_ns();
  shoal_pool_give(pool);
  *macs = (uint64_t)(LOOPS[isa].macs * SUMS) * (uint64_t)turns * (uint64_t)parts;
  return (uint64_t)(end - begin);
}
