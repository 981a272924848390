// Apple's air.* intrinsics on the engine, for the functions of an Apple-compiled .metallib.
// One that is missing here fails when the kernel is loaded, by its name. Built without any library.
#include "../include/simt/abi.h"

using namespace simt;
typedef _Float16 half;
typedef __bf16 bfloat;

// Defines `result name(parameters)` under Apple's symbol, which no C++ name can spell.
#define AIR(symbol, result, name, parameters)                                           \
  extern "C" __attribute__((visibility("default"))) result name parameters asm(symbol); \
  result name parameters

// The engine's own functions, shared with the Metal shim so that both builds round alike.
extern "C" float simt_m1(int function, float x);
extern "C" float simt_m2(int function, float x, float y);
enum { EXP, EXP2, LOG, LOG2, SIN, COS, TAN, TANH, RSQRT = 15 };
enum { POW, FMOD = 2 };

static uint32_t lane() { return tls.cur->lane; }
template <class T> static T& operand(Lane* l) { return *static_cast<T*>(l->val); }

// ---- lanes of a simdgroup
struct Add { template <class T> static T of(T a, T b) { return a + b; } };
struct Min { template <class T> static T of(T a, T b) { return b < a ? b : a; } };
struct Max { template <class T> static T of(T a, T b) { return a < b ? b : a; } };

// Pairs at distance 1, 2, 4 ...: the order of the shim's simd_sum.
template <class Op, class T>
static void join_lanes(Lane** lanes, int n, Lane** by_lane, int width) {
  T value[64];
  bool has[64];
  for (int i = 0; i < width; i++) {
    has[i] = by_lane[i];
    if (has[i]) value[i] = operand<T>(by_lane[i]);
  }
  for (int step = 1; step < width; step *= 2)
    for (int i = 0; i + step < width; i += 2 * step)
      if (has[i + step]) {
        value[i] = has[i] ? Op::of(value[i], value[i + step]) : value[i + step];
        has[i] = true;
      }
  for (int i = 0; i < n; i++) operand<T>(lanes[i]) = value[0];
}
template <class T> static void gather(Lane** lanes, int n, Lane** by_lane, int width) {
  T value[64];
  for (int i = 0; i < width; i++)
    if (by_lane[i]) value[i] = operand<T>(by_lane[i]);
  for (int i = 0; i < n; i++) {
    uint64_t from = lanes[i]->arg;
    if (from < (uint64_t)width && by_lane[from]) operand<T>(lanes[i]) = value[from];
  }
}
template <class T> static void running_sum(Lane** lanes, int n, Lane**, int) {
  T sum = 0;
  for (int i = 0; i < n; i++) operand<T>(lanes[i]) = sum += operand<T>(lanes[i]);
}
template <class T> static T together(T x, uint64_t argument, ResolveFn resolve, uint32_t site) {
  simt_block_coll(&x, argument, 0, resolve, "air", site);
  return x;
}
template <class Op, class T> static T reduce(T x) { return together(x, 0, join_lanes<Op, T>, 1); }
template <class T> static T from_lane(T x, uint64_t source) {
  return together(x, source, gather<T>, 2);
}
template <class T> static T prefix_sum(T x) { return together(x, 0, running_sum<T>, 3); }

#define LANES(T, type)                                                                            \
  AIR("air.simd_sum." type, T, sum_##T, (T x)) { return reduce<Add>(x); }                         \
  AIR("air.simd_max." type, T, max_lane_##T, (T x)) { return reduce<Max>(x); }                    \
  AIR("air.simd_min." type, T, min_lane_##T, (T x)) { return reduce<Min>(x); }                    \
  AIR("air.simd_prefix_inclusive_sum." type, T, prefix_##T, (T x)) { return prefix_sum(x); }      \
  AIR("air.simd_shuffle." type, T, shuffle_##T, (T x, uint16_t l)) { return from_lane(x, l); }    \
  AIR("air.simd_broadcast." type, T, share_##T, (T x, uint16_t l)) { return from_lane(x, l); }    \
  AIR("air.simd_shuffle_xor." type, T, xor_##T, (T x, uint16_t mask)) {                           \
    return from_lane(x, lane() ^ mask);                                                           \
  }                                                                                               \
  AIR("air.simd_shuffle_down." type, T, down_##T, (T x, uint16_t by)) {                           \
    return from_lane(x, lane() + by);                                                             \
  }                                                                                               \
  AIR("air.simd_shuffle_up." type, T, up_##T, (T x, uint16_t by)) {                               \
    return from_lane(x, (uint64_t)lane() - by);                                                   \
  }
LANES(float, "f32")
LANES(half, "f16")
LANES(int32_t, "s.i32")
LANES(uint32_t, "u.i32")
AIR("air.wg.barrier", void, wg_barrier, (int flags, int)) { simt_barrier(flags, "air", 4); }
AIR("air.simdgroup.barrier", void, simdgroup_barrier, (int flags, int)) {
  simt_simd_barrier(flags, 0, "air", 5);
}

// ---- arithmetic
#define MATH(name, expression)                                                  \
  AIR("air." #name ".f32", float, name##_f32, (float x)) { return expression; } \
  AIR("air.fast_" #name ".f32", float, fast_##name##_f32, (float x)) { return expression; }
MATH(exp, simt_m1(EXP, x))
MATH(exp2, simt_m1(EXP2, x))
MATH(log, simt_m1(LOG, x))
MATH(log2, simt_m1(LOG2, x))
MATH(sin, simt_m1(SIN, x))
MATH(cos, simt_m1(COS, x))
MATH(tanh, simt_m1(TANH, x))
MATH(rsqrt, simt_m1(RSQRT, x))
MATH(sqrt, __builtin_elementwise_sqrt(x))
MATH(fabs, __builtin_elementwise_abs(x))
MATH(floor, __builtin_elementwise_floor(x))
MATH(ceil, __builtin_elementwise_ceil(x))
MATH(rint, __builtin_elementwise_rint(x))
MATH(trunc, __builtin_elementwise_trunc(x))
AIR("air.pow.f32", float, pow_f32, (float x, float y)) { return simt_m2(POW, x, y); }
AIR("air.fmod.f32", float, fmod_f32, (float x, float y)) { return simt_m2(FMOD, x, y); }
// A NaN gives the other operand, as in C.
AIR("air.fmax.f32", float, fmax_f32, (float x, float y)) { return x != x || x < y ? y : x; }
AIR("air.fmin.f32", float, fmin_f32, (float x, float y)) { return x != x || y < x ? y : x; }

#define MINMAX(T, type)                                                  \
  AIR("air.min." type, T, min_##T, (T x, T y)) { return y < x ? y : x; } \
  AIR("air.max." type, T, max_##T, (T x, T y)) { return x < y ? y : x; }
MINMAX(int32_t, "s.i32")
MINMAX(uint32_t, "u.i32")
MINMAX(int16_t, "s.i16")
MINMAX(uint16_t, "u.i16")
MINMAX(int64_t, "s.i64")
MINMAX(uint64_t, "u.i64")

// Every narrow number is exact in f32; 32-bit integers round once, there.
#define CONVERT(To, to, From, from) \
  AIR("air.convert." to "." from, To, to_##To##_from_##From, (From x)) { return (To)(float)x; }
#define CONVERT_FROM(From, from)      \
  CONVERT(float, "f.f32", From, from) \
  CONVERT(half, "f.f16", From, from)  \
  CONVERT(bfloat, "f.bf16", From, from)
CONVERT_FROM(uint8_t, "u.i8")
CONVERT_FROM(int8_t, "s.i8")
CONVERT_FROM(uint16_t, "u.i16")
CONVERT_FROM(int16_t, "s.i16")
CONVERT_FROM(uint32_t, "u.i32")
CONVERT_FROM(int32_t, "s.i32")
CONVERT(bfloat, "f.bf16", half, "f.f16")
CONVERT(half, "f.f16", bfloat, "f.bf16")
AIR("air.convert.s.i32.f.f32", int32_t, to_i32, (float x)) { return (int32_t)x; }
AIR("air.convert.u.i32.f.f32", uint32_t, to_u32, (float x)) { return (uint32_t)x; }

// ---- what a kernel asks about itself
AIR("air.get_simdgroup_size.i16", int16_t, simdgroup_size, (int16_t)) { return 32; }
AIR("air.normalize_function_constant_predicate.i8", uint8_t, is_set, (uint8_t x)) { return x != 0; }
AIR("air.is_uniform.i1", bool, is_uniform_i1, (bool)) { return false; }
AIR("air.is_uniform.i32", bool, is_uniform_i32, (int)) { return false; }

// ---- called by the LLVM IR that air.py writes
#define EXPORT extern "C" __attribute__((visibility("default")))
// Component of a builtin input, numbered as in air.py's BUILTINS.
EXPORT uint32_t simt_air_builtin(int which, int component) {
  const Lane& l = *tls.cur;
  const GroupInfo& g = tls.g;
  auto part = [&](const U3& v) { return component == 0 ? v.x : component == 1 ? v.y : v.z; };
  switch (which) {
    case 0: return part(g.gid) * part(g.gsize_nominal) + part(l.tid);
    case 1: return part(l.tid);
    case 2: return part(g.gid);
    case 3: return part(g.gsize);
    case 4: return part(g.ngroups);
    case 5: return part(g.grid);
    case 6: return l.lin;
    case 7: return l.lane;
    case 8: return l.simd;
    case 9: return g.nsimd;
    default: return g.width;
  }
}

// An 8x8 matrix over 32 lanes: each holds two neighbours of one row.
static uint32_t row_of(uint32_t l) { return ((l >> 2) & 4) + ((l >> 1) & 3); }
static uint32_t column_of(uint32_t l) { return ((l >> 2) & 2) * 2 + (l & 1) * 2; }
struct Product { float a[2], b[2], c[2], d[2]; };
static void multiply_accumulate(Lane**, int, Lane** by_lane, int) {
  float a[8][8] = {}, b[8][8] = {}, c[8][8] = {};
  for (uint32_t l = 0; l < 32; l++)
    if (by_lane[l])
      for (int i = 0; i < 2; i++) {
        const Product& p = operand<Product>(by_lane[l]);
        uint32_t row = row_of(l), column = column_of(l) + i;
        a[row][column] = p.a[i], b[row][column] = p.b[i], c[row][column] = p.c[i];
      }
  for (uint32_t l = 0; l < 32; l++)
    if (by_lane[l])
      for (int i = 0; i < 2; i++) {
        uint32_t row = row_of(l), column = column_of(l) + i;
        float sum = c[row][column];
        for (int k = 0; k < 8; k++) sum = __builtin_elementwise_fma(a[row][k], b[k][column], sum);
        operand<Product>(by_lane[l]).d[i] = sum;
      }
}
EXPORT void simt_air_multiply(Product* p) {
  simt_block_coll(p, 0, 0, multiply_accumulate, "air", 6);
}

// Where this lane's i-th element of a matrix at (x, y) of an array lies, in elements.
EXPORT int64_t simt_air_element(int64_t stride, int64_t x, int64_t y, bool transposed, int i) {
  int64_t row = row_of(lane()), column = column_of(lane()) + i;
  return transposed ? (y + column) * stride + x + row : (y + row) * stride + x + column;
}
