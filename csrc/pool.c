/* The thread pool: parallel loops with dynamic scheduling. A thread that is free claims the next part of the loop. The caller
 * returns when all parts are done and never waits for an idle thread, so one that has lost its core to another program delays
 * nobody. Waiting threads spin for about 200 us, then sleep on a futex. There is no mutex and no condition variable, because
 * their sizes differ between C libraries. */
#define _GNU_SOURCE
#include "common.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum { SPIN_NS = 200000, SPINS_A_LOOK = 64, MAX_THREADS = 256 };

struct shoal_pool {
  _Atomic uint64_t left; /* loop number << 32 | unclaimed units: what waiting threads watch */
  char apart0[56];
  _Atomic uint32_t done; /* finished units of the loop */
  char apart1[60];
  _Atomic uint32_t bell; /* the futex: incremented to wake sleeping threads */
  _Atomic int32_t asleep;
  _Atomic int32_t ended;
  /* The current loop. Written only when no unit of the previous loop is unclaimed or running, so a thread that has claimed a
   * part has read the values of that loop. */
  _Atomic uint32_t units, claim, shares;
  void (*_Atomic body)(void *argument, int64_t first, int64_t last, int32_t thread);
  void *_Atomic argument;
  atomic_flag taken;
  int32_t threads;
  int32_t process; /* that started the threads: a process forked from it has none of them */
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

/* How many of the unclaimed units to claim. Guided self-scheduling: with `shares`, the first 7/8 of the units are claimed in
 * that many equal parts and the rest in shrinking ones, so that slow threads finish together with fast ones. */
static uint32_t part(uint32_t units, uint32_t left, uint32_t claim, uint32_t shares) {
  uint32_t n = 0;
  if (shares) n = left > units / 8 ? (uint32_t)((uint64_t)units * 7 / 8 / shares) : left / (2 * shares);
  return SHOAL_MIN(SHOAL_MAX(claim, n), left);
}

/* Claims and runs parts of the current loop until none is left. */
static void work(shoal_pool *pool, int32_t thread) {
  uint64_t left = atomic_load(&pool->left);
  while ((uint32_t)left) {
    const uint32_t units = atomic_load_explicit(&pool->units, memory_order_relaxed);
    const uint32_t claim = atomic_load_explicit(&pool->claim, memory_order_relaxed);
    const uint32_t shares = atomic_load_explicit(&pool->shares, memory_order_relaxed);
    const uint32_t n = part(units, (uint32_t)left, claim, shares);
    void (*const body)(void *, int64_t, int64_t, int32_t) = atomic_load_explicit(&pool->body, memory_order_relaxed);
    void *const argument = atomic_load_explicit(&pool->argument, memory_order_relaxed);
    if (!atomic_compare_exchange_weak(&pool->left, &left, left - n)) continue;
    const int64_t first = (int64_t)units - (uint32_t)left;
    body(argument, first, first + n, thread);
    atomic_fetch_add(&pool->done, n);
    left = atomic_load(&pool->left);
  }
}

/* Sleeps until the bell differs from the value `heard`. */
static void sleep_until_rung(shoal_pool *pool, uint32_t heard) {
#ifdef __linux__
  syscall(SYS_futex, &pool->bell, FUTEX_WAIT_PRIVATE, heard, NULL, NULL, 0);
#else
  const struct timespec moment = {0, 100000};
  if (atomic_load(&pool->bell) == heard) nanosleep(&moment, NULL);
#endif
}

static void ring(shoal_pool *pool) {
  atomic_fetch_add(&pool->bell, 1);
#ifdef __linux__
  syscall(SYS_futex, &pool->bell, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

static int32_t nothing_to_do(shoal_pool *pool) {
  return !(uint32_t)atomic_load(&pool->left) && !atomic_load_explicit(&pool->ended, memory_order_relaxed);
}

static void wait_for_work(shoal_pool *pool) {
  const int64_t begin = now_ns();
  do {
    for (int32_t i = 0; i < SPINS_A_LOOK; i++) {
      if (!nothing_to_do(pool)) return;
      pause_spin();
    }
  } while (now_ns() - begin < SPIN_NS);
  atomic_fetch_add(&pool->asleep, 1); /* before the last check: a loop that starts after it rings the bell */
  const uint32_t heard = atomic_load(&pool->bell);
  if (nothing_to_do(pool)) sleep_until_rung(pool, heard);
  atomic_fetch_sub(&pool->asleep, 1);
}

static void *serve(void *argument) {
  const member m = *(member *)argument;
  free(argument);
  shoal_fenv_set();
  while (!atomic_load(&m.pool->ended)) {
    work(m.pool, m.thread);
    wait_for_work(m.pool);
  }
  return NULL;
}

void shoal_pool_run(shoal_pool *pool, void (*body)(void *argument, int64_t first, int64_t last, int32_t thread),
                    void *argument, int64_t units, int64_t claim, int64_t shares) {
  const uint64_t number = (atomic_load(&pool->left) >> 32) + 1;
  atomic_store_explicit(&pool->body, body, memory_order_relaxed);
  atomic_store_explicit(&pool->argument, argument, memory_order_relaxed);
  atomic_store_explicit(&pool->units, (uint32_t)units, memory_order_relaxed);
  atomic_store_explicit(&pool->claim, (uint32_t)claim, memory_order_relaxed);
  atomic_store_explicit(&pool->shares, (uint32_t)shares, memory_order_relaxed);
  atomic_store(&pool->done, 0);
  atomic_store(&pool->left, number << 32 | (uint32_t)units);
  if (atomic_load(&pool->asleep)) ring(pool);
  work(pool, 0);
  const int64_t begin = now_ns();
  for (int32_t i = 1; atomic_load(&pool->done) != (uint32_t)units; i++) { /* other threads still run the last parts */
    pause_spin();
    if (i % SPINS_A_LOOK == 0 && now_ns() - begin > SPIN_NS) sched_yield(); /* one of them may be waiting for this core */
  }
}

int32_t shoal_pool_threads(const shoal_pool *pool) { return pool->threads; }

int32_t shoal_pool_take(shoal_pool *pool) { return !atomic_flag_test_and_set(&pool->taken); }

void shoal_pool_give(shoal_pool *pool) { atomic_flag_clear(&pool->taken); }

/* Joins threads 1 to `started` and frees the pool. */
static void end(shoal_pool *pool, int32_t started) {
  atomic_store(&pool->ended, 1);
  ring(pool);
  for (int32_t t = 0; t < started && getpid() == pool->process; t++) pthread_join(pool->handles[t], NULL);
  free(pool);
}

shoal_pool *shoal_pool_open(int32_t threads) {
  if (threads < 1 || threads > MAX_THREADS) return NULL;
  shoal_pool *pool = calloc(1, sizeof *pool + sizeof(pthread_t) * (size_t)threads);
  if (!pool) return NULL;
  atomic_flag_clear(&pool->taken);
  pool->threads = threads;
  pool->process = getpid();
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
