/* A libc.so with the names and the version of bionic's, for a process that runs on glibc: every call goes on to glibc. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sched.h>
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

void bionic_free(void *memory) { free(memory); }
__asm__(".symver bionic_free, free@LIBC");
