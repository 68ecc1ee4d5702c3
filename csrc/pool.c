/* Threads that run one body together and meet between its parts. The caller of a run is thread 0. Who waits spins for
 * about 50 us and then sleeps in the kernel. No mutex, no condition variable: their sizes differ between C libraries. */
#define _GNU_SOURCE
#include "common.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { SPIN_NS = 50000, SPINS_A_LOOK = 64, MAX_THREADS = 256 };

struct shoal_pool {
  _Atomic uint32_t parted; /* meetings that are over: what waiters watch */
  char apart0[60];
  _Atomic int32_t come; /* threads at the meeting now */
  _Atomic int32_t asleep;
  char apart1[56];
  atomic_flag taken;
  int32_t threads;
  void (*body)(void *argument, int32_t thread); /* NULL: the threads end */
  void *argument;
  pthread_t handles[];
};

typedef struct {
  shoal_pool *pool;
  int32_t thread;
} member;

static void pause_spin(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb" ::: "memory");
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_until_parted(shoal_pool *pool, uint32_t seen) {
#ifdef __linux__
  atomic_fetch_add(&pool->asleep, 1);
  while (atomic_load(&pool->parted) == seen) syscall(SYS_futex, &pool->parted, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
  atomic_fetch_sub(&pool->asleep, 1);
#else
  const struct timespec moment = {0, 100000};
  while (atomic_load(&pool->parted) == seen) nanosleep(&moment, NULL);
#endif
}

int32_t shoal_pool_meet(shoal_pool *pool) {
  const int32_t others = pool->threads - 1; /* read before coming: end() counts on it */
  if (!others) return 1;
  const uint32_t seen = atomic_load_explicit(&pool->parted, memory_order_relaxed); /* changes only when all have come */
  if (atomic_fetch_add(&pool->come, 1) == others) return 1;
  const int64_t begin = now_ns();
  do {
    for (int32_t i = 0; i < SPINS_A_LOOK; i++) {
      if (atomic_load_explicit(&pool->parted, memory_order_acquire) != seen) return 0;
      pause_spin();
    }
  } while (now_ns() - begin < SPIN_NS);
  sleep_until_parted(pool, seen);
  return 0;
}

void shoal_pool_part(shoal_pool *pool) {
  if (pool->threads == 1) return;
  atomic_store(&pool->come, 0);
  atomic_fetch_add(&pool->parted, 1);
#ifdef __linux__
  if (atomic_load(&pool->asleep)) syscall(SYS_futex, &pool->parted, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

static void meet_and_part(shoal_pool *pool) {
  if (shoal_pool_meet(pool)) shoal_pool_part(pool);
}

static void *serve(void *argument) {
  const member m = *(member *)argument;
  free(argument);
  shoal_fenv_set();
  for (;;) {
    meet_and_part(m.pool); /* a run begins */
    if (!m.pool->body) return NULL;
    m.pool->body(m.pool->argument, m.thread);
    meet_and_part(m.pool); /* all have finished it */
  }
}

void shoal_pool_run(shoal_pool *pool, void (*body)(void *argument, int32_t thread), void *argument) {
  pool->body = body;
  pool->argument = argument;
  meet_and_part(pool);
  body(argument, 0);
  meet_and_part(pool);
}

int32_t shoal_pool_threads(const shoal_pool *pool) { return pool->threads; }

int32_t shoal_pool_take(shoal_pool *pool) { return !atomic_flag_test_and_set(&pool->taken); }

void shoal_pool_give(shoal_pool *pool) { atomic_flag_clear(&pool->taken); }

/* Ends threads 1 to started: all of them, or fewer when no more could be had, in which case those must have come to the
 * meeting before it is made smaller. */
static void end(shoal_pool *pool, int32_t started) {
  if (started + 1 < pool->threads) {
    while (atomic_load(&pool->come) < started) pause_spin();
    pool->threads = started + 1;
  }
  pool->body = NULL;
  meet_and_part(pool);
  for (int32_t t = 0; t < started; t++) pthread_join(pool->handles[t], NULL);
  free(pool);
}

shoal_pool *shoal_pool_open(int32_t threads) {
  if (threads < 1 || threads > MAX_THREADS) return NULL;
  shoal_pool *pool = calloc(1, sizeof *pool + sizeof(pthread_t) * (size_t)threads);
  if (!pool) return NULL;
  atomic_flag_clear(&pool->taken);
  pool->threads = threads;
  for (int32_t t = 1; t < threads; t++) {
    member *m = malloc(sizeof *m);
    if (m) *m = (member){pool, t};
    if (!m || pthread_create(&pool->handles[t - 1], NULL, serve, m)) {
      free(m);
      end(pool, t - 1);
      return NULL;
    }
  }
  return pool;
}

void shoal_pool_close(shoal_pool *pool) {
  if (pool) end(pool, pool->threads - 1);
}
