/* SHA-256 (FIPS 180-4), so that a program in C can check a model's files without another library. */
#include "common.h"

enum { BLOCK = 64, LENGTH_AT = 56, ROUNDS = 64 };

static const uint32_t FRACTIONS[ROUNDS] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t turned(uint32_t x, int32_t by) { return x >> by | x << (32 - by); }

/* The words a to h of the definition are s[0] to s[7] in round 0, and one place lower in each round. */
SHOAL_INLINE void one_round(uint32_t s[8], int32_t round, uint32_t added) {
  const uint32_t a = s[-round & 7], b = s[(1 - round) & 7], c = s[(2 - round) & 7];
  const uint32_t e = s[(4 - round) & 7], f = s[(5 - round) & 7], g = s[(6 - round) & 7];
  const uint32_t first =
      s[(7 - round) & 7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + added;
  s[(3 - round) & 7] += first;
  s[(7 - round) & 7] = first + (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
}

static void add_block(uint32_t h[8], const uint8_t *block) {
  uint32_t w[ROUNDS], s[8];
  for (int32_t i = 0; i < 16; i++, block += 4)
    w[i] = (uint32_t)block[0] << 24 | (uint32_t)block[1] << 16 | (uint32_t)block[2] << 8 | block[3];
  for (int32_t i = 16; i < ROUNDS; i++)
    w[i] = w[i - 16] + (turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
           (turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10);
  memcpy(s, h, sizeof s);
  for (int32_t i = 0; i < ROUNDS; i += 8) {
    SHOAL_UNROLL(8)
    for (int32_t j = 0; j < 8; j++) one_round(s, j, FRACTIONS[i + j] + w[i + j]);
  }
  for (int32_t i = 0; i < 8; i++) h[i] += s[i];
}

void shoal_sha256(const void *data, uint64_t bytes, char *hexadecimal) {
  uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const uint8_t *at = data;
  uint64_t left = bytes;
  for (; left >= BLOCK; left -= BLOCK, at += BLOCK) add_block(h, at);
  uint8_t last[2 * BLOCK] = {0};
  if (left) memcpy(last, at, left);
  last[left] = 0x80;
  const int32_t blocks = left < LENGTH_AT ? 1 : 2;
  for (int32_t i = 0; i < 8; i++) last[blocks * BLOCK - 1 - i] = (uint8_t)(bytes * 8 >> 8 * i);
  for (int32_t i = 0; i < blocks; i++) add_block(h, last + i * BLOCK);
  for (int32_t i = 0; i < 64; i++) hexadecimal[i] = "0123456789abcdef"[h[i / 8] >> (28 - i % 8 * 4) & 15];
  hexadecimal[64] = 0;
}
