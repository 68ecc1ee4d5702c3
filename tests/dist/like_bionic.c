/* A libc.so with the names and the version of bionic's, for a process that runs on glibc: every call goes on to glibc. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define AS(type, name, parameters, ...)                     \
  type bionic_##name parameters { return name __VA_ARGS__; } \
  __asm__(".symver bionic_" #name ", " #name "@LIBC")

AS(void *, calloc, (size_t n, size_t size), (n, size));
AS(void *, malloc, (size_t n), (n));
AS(void *, memcpy, (void *to, const void *from, size_t n), (to, from, n));
AS(void *, memset, (void *to, int byte, size_t n), (to, byte, n));
AS(unsigned long, getauxval, (unsigned long type), (type));
AS(int, madvise, (void *memory, size_t n, int advice), (memory, n, advice));
AS(int, sched_yield, (void), ());
AS(pid_t, getpid, (void), ());
AS(int, poll, (struct pollfd * watched, unsigned n, int milliseconds), (watched, n, milliseconds));
AS(int, clock_gettime, (clockid_t clock, struct timespec *now), (clock, now));
AS(int, pthread_create, (pthread_t * thread, const pthread_attr_t *with, void *(*body)(void *), void *argument),
   (thread, with, body, argument));
AS(int, pthread_join, (pthread_t thread, void **result), (thread, result));
AS(long, syscall, (long number, long a, long b, long c, long d, long e, long f), (number, a, b, c, d, e, f));

AS(void *, mmap, (void *at, size_t n, int protection, int flags, int file, off_t offset),
   (at, n, protection, flags, file, offset));
AS(off_t, lseek, (int file, off_t offset, int from), (file, offset, from));
AS(int, raise, (int number), (number));

/* bionic's struct sigaction has another order of fields, and a short mask. */
struct bionic_action {
  int flags;
  void (*handler)(int);
  unsigned long mask;
  void *restorer;
};

int bionic_sigaction(int number, const struct bionic_action *action, struct bionic_action *before) {
  struct sigaction in = {0}, out = {0};
  if (action) {
    in.sa_flags = action->flags;
    in.sa_handler = action->handler;
  }
  const int result = sigaction(number, action ? &in : NULL, &out);
  if (before) *before = (struct bionic_action){out.sa_flags, out.sa_handler, 0, NULL};
  return result;
}
__asm__(".symver bionic_sigaction, sigaction@LIBC");

void bionic_free(void *memory) { free(memory); }
__asm__(".symver bionic_free, free@LIBC");
