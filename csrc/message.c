/* Error messages without stdio, which a library cross-built for Android must not take from libc. */
#include "common.h"

#include <stdarg.h>

typedef struct {
  char *at, *end;
} cursor;

static void put(cursor *c, char letter) {
  if (c->at < c->end) *c->at++ = letter;
}

static void put_unsigned(cursor *c, uint64_t n) {
  char digits[20];
  int32_t count = 0;
  do digits[count++] = (char)('0' + n % 10);
  while (n /= 10);
  while (count) put(c, digits[--count]);
}

static void put_string(cursor *c, const char *s) {
  while (*s) put(c, *s++);
}

int32_t shoal_fail(char *error, int32_t error_bytes, int32_t status, const char *format, ...) {
  if (!error || error_bytes <= 0) return status;
  cursor c = {error, error + error_bytes - 1};
  va_list arguments;
  va_start(arguments, format);
  for (const char *f = format; *f; f++) {
    if (*f != '%') {
      put(&c, *f);
      continue;
    }
    switch (*++f) {
      case 'd': {
        const int32_t n = va_arg(arguments, int32_t);
        if (n < 0) put(&c, '-');
        put_unsigned(&c, n < 0 ? (uint64_t)(-(int64_t)n) : (uint64_t)n);
        break;
      }
      case 'u': put_unsigned(&c, va_arg(arguments, uint64_t)); break;
      case 's': put_string(&c, va_arg(arguments, const char *)); break;
      default: put(&c, *f);
    }
  }
  va_end(arguments);
  *c.at = 0;
  return status;
}
