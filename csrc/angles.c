/* Cosines and sines of rotary positions, computed in f64 by our own code, since C libraries differ in the last bits. */
#include "common.h"

/* pi / 2 in four parts of 22 bits: their products with an integer below 2^31 are exact. */
static const double PART[4] = {0x1.921fbp+0, 0x1.5110bp-22, 0x1.184698p-44, 0x1.3198ap-69};

static double polynomial(const double *c, int32_t n, double z) {
  double p = c[n - 1];
  for (int32_t i = n - 2; i >= 0; i--) p = p * z + c[i];
  return p;
}

/* Taylor series: on [-pi / 4, pi / 4] the first omitted term is below 2^-57. */
static double sine(double r) {
  static const double C[] = {-1.0 / 6,        1.0 / 120,        -1.0 / 5040,         1.0 / 362880,
                             -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000};
  const double z = r * r;
  return r + r * (z * polynomial(C, 7, z));
}

static double cosine(double r) {
  static const double C[] = {1.0 / 24,        -1.0 / 720,         1.0 / 40320,         -1.0 / 3628800,
                             1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
  const double z = r * r;
  return 1.0 - 0.5 * z + z * z * polynomial(C, 7, z);
}

void shoal_angles(int32_t position, const double *inv_freq, int32_t half, float *out) {
  for (int32_t i = 0; i < half; i++) {
    const double x = (double)position * inv_freq[i];
    const double n = (x * 0x1.45f306dc9c883p-1 + 0x1.8p52) - 0x1.8p52; /* x * 2 / pi to nearest even */
    const double r = ((x - n * PART[0]) - n * PART[1]) - n * PART[2] - n * PART[3];
    const int64_t quadrant = (int64_t)n & 3;
    const double s = sine(r), c = cosine(r);
    out[i] = (float)(quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s);
    out[half + i] = (float)(quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c);
  }
}
