/* What csrc/ takes from Android's C library (bionic, API 24, AArch64), so that no NDK is needed to compile it. android.py
 * lets every system header that csrc/ includes mean this file, and links against the functions declared here. Only what
 * has one binary form in all versions of bionic may be added: no mutex, no FILE, no errno. */
#ifndef SHOAL_BIONIC_H
#define SHOAL_BIONIC_H

#include <stddef.h>

void *calloc(size_t count, size_t size);
void *malloc(size_t size);
void free(void *memory);
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
unsigned long getauxval(unsigned long type);
int madvise(void *memory, size_t size, int advice);
long syscall(long number, ...);
int sched_yield(void);
int getpid(void);

struct pollfd {
  int fd;
  short events, revents;
};
int poll(struct pollfd *watched, unsigned int n, int milliseconds);

struct timespec {
  long tv_sec, tv_nsec;
};
int clock_gettime(int clock, struct timespec *now);

typedef long pthread_t;
int pthread_create(pthread_t *thread, const void *attributes, void *(*body)(void *), void *argument);
int pthread_join(pthread_t thread, void **result);

typedef struct {
  int si_signo, si_errno, si_code, padding;
  void *si_addr;
  char rest[104];
} siginfo_t;
struct sigaction {
  int sa_flags;
  union {
    void (*sa_handler)(int);
    void (*sa_sigaction)(int, siginfo_t *, void *);
  };
  unsigned long sa_mask;
  void (*sa_restorer)(void);
};
int sigaction(int signal, const struct sigaction *action, struct sigaction *before);
int raise(int signal);
void *mmap(void *at, size_t size, int protection, int flags, int file, long offset);
long lseek(int file, long offset, int from);
#define SIG_DFL ((void (*)(int))0)
#define SIG_IGN ((void (*)(int))1)
#define MAP_FAILED ((void *)-1)

/* Instructions, not calls. */
#define fmaf __builtin_fmaf
#define sqrtf __builtin_sqrtf

/* The kernel's numbers on AArch64. */
enum { CLOCK_MONOTONIC = 1, SYS_futex = 98, FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129 };
enum { SIGBUS = 7, SA_SIGINFO = 4, SA_ONSTACK = 0x08000000 };
enum { SEEK_END = 2, PROT_READ = 1, MAP_PRIVATE = 2, MAP_FIXED = 16, MAP_ANON = 32 };
enum { AT_HWCAP = 16, AT_HWCAP2 = 26, POLLIN = 1 };

#endif
