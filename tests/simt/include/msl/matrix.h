// <metal_simdgroup_matrix>: 8 x 8, two elements a lane, in Apple's layout.
#pragma once
namespace metal {
METAL_FUNC uint simt_row(uint lane) { return ((lane >> 2) & 4) + ((lane >> 1) & 3); }
METAL_FUNC uint simt_column(uint lane) { return ((lane >> 2) & 2) * 2 + (lane & 1) * 2; }

template <class T, int R, int C>
struct simdgroup_matrix {
  typedef vec<T, 2> storage_type;
  storage_type e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : e{v, v} {}
  thread storage_type& thread_elements() __private { return e; }
  const thread storage_type& thread_elements() const __private { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R = 8, int C = 8>
METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, R, C>(v);
}

#define SIMT_MOVE(SPACE)                                                                       \
  template <class T>                                                                           \
  inline void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& to, const SPACE T* p,           \
                             ulong row_size = 8, ulong2 origin = ulong2{0, 0},                 \
                             bool transpose = false) {                                         \
    uint lane = simt::me()->lane, r = simt_row(lane), c = simt_column(lane);                   \
    for (int i = 0; i < 2; i++) {                                                              \
      ulong y = origin.y + (transpose ? c + i : r), x = origin.x + (transpose ? r : c + i);    \
      to.e[i] = p[y * row_size + x];                                                           \
    }                                                                                          \
  }                                                                                            \
  template <class T>                                                                           \
  inline void simdgroup_store(simdgroup_matrix<T, 8, 8> from, SPACE T* p, ulong row_size = 8,  \
                              ulong2 origin = ulong2{0, 0}, bool transpose = false) {          \
    uint lane = simt::me()->lane, r = simt_row(lane), c = simt_column(lane);                   \
    for (int i = 0; i < 2; i++) {                                                              \
      ulong y = origin.y + (transpose ? c + i : r), x = origin.x + (transpose ? r : c + i);    \
      p[y * row_size + x] = from.e[i];                                                         \
    }                                                                                          \
  }
SIMT_MOVE(device)
SIMT_MOVE(threadgroup)
#undef SIMT_MOVE

namespace collective {
template <class D, class A, class B, class C>
struct Product {
  thread simdgroup_matrix<D, 8, 8>* d;
  simdgroup_matrix<A, 8, 8> a;
  simdgroup_matrix<B, 8, 8> b;
  simdgroup_matrix<C, 8, 8> c;
};
// d = a b + c in f32, k in order, each step fused.
template <class D, class A, class B, class C>
void multiply(Lane* thread*, int, Lane* thread* by, int) {
  typedef Product<D, A, B, C> Operands;
  float a[8][8], b[8][8], c[8][8];
  for (int i = 0; i < 32; i++) {
    if (!by[i]) continue;
    thread Operands& m = value<Operands>(by[i]);
    uint y = simt_row(i), x = simt_column(i);
    for (int k = 0; k < 2; k++) {
      a[y][x + k] = (float)m.a.e[k];
      b[y][x + k] = (float)m.b.e[k];
      c[y][x + k] = (float)m.c.e[k];
    }
  }
  for (int i = 0; i < 32; i++) {
    if (!by[i]) continue;
    uint y = simt_row(i), x = simt_column(i);
    for (int k = 0; k < 2; k++) {
      float sum = c[y][x + k];
      for (int j = 0; j < 8; j++) sum = __builtin_elementwise_fma(a[y][j], b[j][x + k], sum);
      value<Operands>(by[i]).d->e[k] = (D)sum;
    }
  }
}
}  // namespace collective

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                          simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                                          simdgroup_matrix<C, 8, 8> c, SIMT_SITE) {
  collective::Product<D, A, B, C> operands;
  operands.d = &d, operands.a = a, operands.b = b, operands.c = c;
  simt::simt_block_coll(&operands, 0, 0, (ulong)&collective::multiply<D, A, B, C>, simt_f, simt_l);
}
template <class D, class A, class B>
inline void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b, SIMT_SITE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>((D)0), simt_f, simt_l);
}
}  // namespace metal
