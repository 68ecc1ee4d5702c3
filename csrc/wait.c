/* Waiting for sockets. A thread that sleeps wakes tens of microseconds late, on a core that has cooled down, so a stage
 * whose next rows are due soon looks again and again for a while instead. */
#include "executor.h"

#include <poll.h>
#include <sched.h>

enum { MAX_HANDLES = 64, BUSY_NS = 1000000, GAVE_UP = 1 << 16 };

int32_t shoal_wait(const int32_t *handles, int32_t n, int64_t spin_ns, int64_t wait_ns) {
  struct pollfd watched[MAX_HANDLES];
  if (n < 1 || n > MAX_HANDLES) return -1;
  for (int32_t i = 0; i < n; i++) watched[i] = (struct pollfd){handles[i], POLLIN, 0};
  const int64_t begin = shoal_now_ns();
  if (wait_ns >= 0) spin_ns = SHOAL_MIN(spin_ns, wait_ns);
  int64_t now = begin;
  int32_t gave_up = 0;
  while (now - begin < spin_ns && !gave_up) {
    const int32_t ready = poll(watched, (unsigned)n, 0);
    const int64_t then = now;
    now = shoal_now_ns();
    gave_up = now - then > BUSY_NS ? GAVE_UP : 0; /* another program had this core for a while */
    if (ready) return ready < 0 ? ready : ready | gave_up;
    sched_yield(); /* the coordinator may be on this device, too, and about to run for a moment */
  }
  const int64_t left = SHOAL_MAX(wait_ns - (shoal_now_ns() - begin), 0);
  const int64_t ms = wait_ns < 0 ? -1 : SHOAL_MIN((left + 999999) / 1000000, INT32_MAX);
  const int32_t ready = poll(watched, (unsigned)n, (int)ms);
  return ready < 0 ? ready : ready | gave_up;
}
