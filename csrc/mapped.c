/* Mapped files that become shorter while they are read. The access to a page behind the new end raises SIGBUS, which would
 * end the process; for mappings that are watched, the handler maps zeros there, so that the access succeeds. The rest of the
 * page with the new end reads as zeros without a signal. What was computed from zeros is wrong, so the caller asks after each
 * call whether a file has shrunk. */
#define _GNU_SOURCE
#define _DARWIN_C_SOURCE
#include "common.h"

#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_MAPPINGS = 4096 };

static struct {
  _Atomic uintptr_t first, end; /* end is 0 while the entry is free */
  _Atomic int32_t shrunk, file;
} mappings[MAX_MAPPINGS];
static _Atomic int32_t used; /* entries beyond were never watched */
static _Atomic uintptr_t page;

static atomic_flag busy = ATOMIC_FLAG_INIT; /* guards what follows, and changes of the entries */
static struct sigaction before;
static int32_t watched, installed;

static void lock(void) {
  while (atomic_flag_test_and_set(&busy)) sched_yield();
}

static void unlock(void) { atomic_flag_clear(&busy); }

/* Maps zeros from the page of an address to the end of its mapping; 0: it is in no mapping that is watched. */
static int32_t replaced(uintptr_t at) {
  const int32_t n = atomic_load(&used);
  for (int32_t i = 0; i < n; i++) {
    const uintptr_t end = atomic_load(&mappings[i].end), first = atomic_load(&mappings[i].first);
    if (at < first || at >= end) continue;
    atomic_store(&mappings[i].shrunk, 1);
    const uintptr_t size = atomic_load(&page), begin = at / size * size;
    const size_t bytes = (size_t)((end - begin + size - 1) / size * size);
    return mmap((void *)begin, bytes, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANON, -1, 0) != MAP_FAILED;
  }
  return 0;
}

/* mmap sets errno only when it fails, and then the process ends. */
static void on_sigbus(int number, siginfo_t *info, void *context) {
  const int32_t accessed = info->si_code > 0; /* else a process has sent the signal */
  if (accessed && replaced((uintptr_t)info->si_addr)) return;
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler == SIG_IGN && !accessed) {
    return;
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else { /* the access, or the signal, is repeated and ends the process, as without this handler */
    struct sigaction plain = {0};
    plain.sa_handler = SIG_DFL;
    sigaction(number, &plain, NULL);
    if (!accessed) raise(number);
  }
}

static int32_t install(void) {
  struct sigaction action = {0};
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  return sigaction(SIGBUS, NULL, &before) == 0 && sigaction(SIGBUS, &action, NULL) == 0;
}

/* Gives the handler back, unless somebody has put another one in front of this. */
static void uninstall(void) {
  struct sigaction now;
  if (sigaction(SIGBUS, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) {
    sigaction(SIGBUS, &before, NULL);
    installed = 0;
  }
}

int32_t shoal_watch(const void *first, uint64_t bytes, uint64_t page_bytes, int32_t file) {
  int32_t number = -1;
  if (!bytes || !page_bytes) return number;
  lock();
  atomic_store(&page, (uintptr_t)page_bytes);
  if (!installed) installed = install();
  for (int32_t i = 0; installed && i < MAX_MAPPINGS && number < 0; i++) {
    if (atomic_load(&mappings[i].end)) continue;
    atomic_store(&mappings[i].shrunk, 0);
    atomic_store(&mappings[i].file, file);
    atomic_store(&mappings[i].first, (uintptr_t)first);
    atomic_store(&mappings[i].end, (uintptr_t)first + (uintptr_t)bytes);
    if (i >= atomic_load(&used)) atomic_store(&used, i + 1);
    number = i;
    watched++;
  }
  unlock();
  return number;
}

void shoal_unwatch(int32_t number) {
  if (number < 0 || number >= MAX_MAPPINGS) return;
  lock();
  if (atomic_load(&mappings[number].end)) {
    atomic_store(&mappings[number].end, 0);
    if (--watched == 0) uninstall();
  }
  unlock();
}

int32_t shoal_shrunk(const int32_t *numbers, int32_t n) {
  for (int32_t i = 0; i < n; i++) {
    const int32_t number = numbers[i];
    if (number < 0 || number >= MAX_MAPPINGS) continue;
    const uintptr_t bytes = atomic_load(&mappings[number].end) - atomic_load(&mappings[number].first);
    const int64_t now = lseek(atomic_load(&mappings[number].file), 0, SEEK_END);
    if (atomic_load(&mappings[number].shrunk) || (now >= 0 && (uint64_t)now < bytes)) return i;
  }
  return -1;
}
