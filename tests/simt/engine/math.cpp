// Functions whose last bits Metal leaves open. All go through here, so that a run can add an error.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "engine.h"

namespace simt {
namespace {
// Numbers as in include/msl/math.h.
float function1(int f, float x) {
  switch (f) {
    case 0: return expf(x);
    case 1: return exp2f(x);
    case 2: return logf(x);
    case 3: return log2f(x);
    case 4: return sinf(x);
    case 5: return cosf(x);
    case 6: return tanf(x);
    case 7: return tanhf(x);
    case 8: return sinhf(x);
    case 9: return coshf(x);
    case 10: return asinf(x);
    case 11: return acosf(x);
    case 12: return atanf(x);
    case 13: return (float)pow(10.0, x);
    case 14: return log10f(x);
    case 15: return (float)(1.0 / sqrt((double)x));
    case 16: return asinhf(x);
    case 17: return acoshf(x);
    case 18: return atanhf(x);
    case 19: return (float)cos(M_PI * x);
    case 20: return (float)sin(M_PI * x);
  }
  return NAN;
}

enum { POW, ATAN2, FMOD, LDEXP };
float function2(int f, float x, float y) {
  switch (f) {
    case POW: return powf(x, y);
    case ATAN2: return atan2f(x, y);
    case FMOD: return fmodf(x, y);
    case LDEXP: return ldexpf(x, (int)y);
  }
  return NAN;
}

// Up to d->ulp units in the last place, the same for the same call: a function stays a function.
float with_error(float result, int f, float x, float y) {
  uint32_t most = worker ? worker->d->ulp : 0;
  if (!most || result == 0 || isnan(result) || isinf(result)) return result;
  uint32_t a, b;
  memcpy(&a, &x, 4), memcpy(&b, &y, 4);
  uint64_t hash = a * 0x9E3779B97F4A7C15ull ^ b * 0xC2B2AE3D27D4EB4Full ^ (uint64_t)f << 56;
  hash ^= worker->d->seed, hash ^= hash >> 29, hash *= 0xBF58476D1CE4E5B9ull, hash ^= hash >> 32;
  int step = (int)(hash % (2 * most + 1)) - (int)most;
  for (; step > 0; step--) result = nextafterf(result, INFINITY);
  for (; step < 0; step++) result = nextafterf(result, -INFINITY);
  return result;
}
}  // namespace

API float simt_m1(int f, float x) { return with_error(function1(f, x), f, x, 0); }
API float simt_m2(int f, float x, float y) {
  float result = function2(f, x, y);
  return f <= ATAN2 ? with_error(result, 32 + f, x, y) : result;  // the others are exact
}

#if defined(__x86_64__)
// float -> bfloat16, which libgcc has since 13. The result travels in the low half of xmm0.
API float __truncsfbf2(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t rounded = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded &= 0xffff;
  float result;
  memcpy(&result, &rounded, 4);
  return result;
}
#endif
}  // namespace simt
