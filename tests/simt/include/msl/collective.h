// Operations of a whole simdgroup, run once when all lanes that take part have left their operand.
// by[i] is lane i, or null; lanes[0 .. n) are those present, in order; a lane's operand is its result.
#pragma once
namespace metal {
namespace collective {
using simt::Lane;
template <class T> METAL_FUNC thread T& value(Lane* lane) { return *(thread T*)lane->val; }

struct Add {
  template <class T> static METAL_FUNC T of(T a, T b) { return a + b; }
  template <class T> static METAL_FUNC T none() { return (T)0; }
};
struct Multiply {
  template <class T> static METAL_FUNC T of(T a, T b) { return a * b; }
  template <class T> static METAL_FUNC T none() { return (T)1; }
};
struct Min {
  template <class T> static METAL_FUNC T of(T a, T b) { return min(a, b); }
};
struct Max {
  template <class T> static METAL_FUNC T of(T a, T b) { return max(a, b); }
};
struct And {
  template <class T> static METAL_FUNC T of(T a, T b) { return a & b; }
};
struct Or {
  template <class T> static METAL_FUNC T of(T a, T b) { return a | b; }
};
struct Xor {
  template <class T> static METAL_FUNC T of(T a, T b) {
    if constexpr (is_floating_point_v<T>) return a;
    else return a ^ b;
  }
};

// Lanes combine pairwise: 0 with 1, 2 with 3, then pairs, and so on.
template <class Op, class T>
T butterfly(Lane* thread* by, int width) {
  T v[64];
  bool has[64];
  for (int i = 0; i < width; i++) {
    has[i] = by[i] != nullptr;
    if (has[i]) v[i] = value<T>(by[i]);
  }
  for (int step = 1; step < width; step *= 2)
    for (int i = 0; i + step < width; i += 2 * step) {
      if (!has[i + step]) continue;
      v[i] = has[i] ? Op::of(v[i], v[i + step]) : v[i + step];
      has[i] = true;
    }
  return v[0];
}

// The order of a sum is not in Metal's specification: a run chooses (GroupInfo::order).
template <class Op, class T>
void reduce(Lane* thread* lanes, int n, Lane* thread* by, int width) {
  int order = simt::group()->order;
  T r;
  if (order == 0) {
    r = butterfly<Op, T>(by, width);
  } else {
    r = value<T>(lanes[order == 1 ? 0 : n - 1]);
    for (int i = 1; i < n; i++) r = Op::of(r, value<T>(lanes[order == 1 ? i : n - 1 - i]));
  }
  for (int i = 0; i < n; i++) value<T>(lanes[i]) = r;
}

template <class Op, class T>
void reduce_quad(Lane* thread*, int, Lane* thread* by, int width) {
  for (int quad = 0; quad < width; quad += 4) {
    T r;
    bool any = false;
    for (int i = quad; i < quad + 4; i++) {
      if (!by[i]) continue;
      r = any ? Op::of(r, value<T>(by[i])) : value<T>(by[i]);
      any = true;
    }
    for (int i = quad; i < quad + 4; i++)
      if (by[i]) value<T>(by[i]) = r;
  }
}

template <class Op, class T, bool INCLUSIVE>
void scan(Lane* thread* lanes, int n, Lane* thread*, int) {
  T before = Op::template none<T>();
  for (int i = 0; i < n; i++) {
    T upto = Op::of(before, value<T>(lanes[i]));
    value<T>(lanes[i]) = INCLUSIVE ? upto : before;
    before = upto;
  }
}

// Every lane takes the value of lane `arg`; KEEP keeps its own.
constexpr __constant ulong KEEP = ~0ul;
template <class T>
void gather(Lane* thread* lanes, int n, Lane* thread* by, int width) {
  T values[64];
  for (int i = 0; i < width; i++)
    if (by[i]) values[i] = value<T>(by[i]);
  for (int i = 0; i < n; i++) {
    ulong from = lanes[i]->arg;
    if (from == KEEP) continue;
    if (from < (ulong)width && by[from]) {
      value<T>(lanes[i]) = values[from];
      continue;
    }
    uchar thread* bytes = (uchar thread*)lanes[i]->val;
    for (int k = 0; k < (int)sizeof(T); k++) bytes[k] = 0xFF;
    simt::simt_fail((ulong) "shuffle-inactive-lane",
                    (ulong) "takes a value from a lane that does not take part", lanes[i]->file,
                    lanes[i]->line);
  }
}

template <class T>
void first(Lane* thread* lanes, int n, Lane* thread*, int) {
  for (int i = 1; i < n; i++) value<T>(lanes[i]) = value<T>(lanes[0]);
}

inline void ballot(Lane* thread* lanes, int n, Lane* thread*, int) {
  ulong votes = 0;
  for (int i = 0; i < n; i++)
    if (lanes[i]->arg) votes |= 1ul << lanes[i]->lane;
  for (int i = 0; i < n; i++) value<ulong>(lanes[i]) = votes;
}

// Waits for the other lanes; `v` is the operand and the result.
template <class T>
METAL_FUNC T wait(T v, ulong arg, ulong resolve, ulong file, uint line) {
  simt::simt_block_coll(&v, arg, 0, resolve, file, line);
  return v;
}
}  // namespace collective
}  // namespace metal
