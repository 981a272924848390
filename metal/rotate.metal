// The Hadamard rotation of one row by one threadgroup: 8 numbers a lane, 256 a simdgroup without a barrier.
// Stages run by distance 1, 2, 4, ..., each a sum or a difference: the bits of reference.hadamard.
#include "eight.metal"

namespace hm {

// Size of the block of H that number i of P is in: BLOCK, or, BLOCK 0, one of P's powers of two, largest first.
template <int P, int BLOCK>
METAL_FUNC uint block_of(uint i) {
  return BLOCK ? BLOCK : 1u << (31 - clz((uint(P) ^ i) | 1u));
}
constexpr int largest_block(int p, int block) {
  int size = 1;
  while (2 * size <= p) size *= 2;
  return block ? block : size;
}

// A sum of signed numbers, made orthonormal. TQ divides by sqrt(block), JANGTQ multiplies by the inverse.
template <int P, int BLOCK>
METAL_FUNC float orthonormal(float v, uint i) {
  const uint log = 31 - clz(block_of<P, BLOCK>(i));
  const float root = float(1u << log / 2);
  if constexpr (BLOCK != 0) return v / (log % 2 ? 1.41421356237309504880f * root : root);
  return v * ((log % 2 ? 0.70710678118654752440f : 1.0f) / root);
}

// Stages within 256 numbers, of which a lane has v[0..8), the numbers i .. i + 7.
template <int P, int BLOCK>
METAL_FUNC void near_stages(thread float* v, uint i, uint lane) {
  constexpr int most = largest_block(P, BLOCK), least = BLOCK ? BLOCK : P & -P;
  UNROLL for (int h = 1; h < 8; h *= 2) {
    EACH(e, 8) {
      if ((e & h) == 0 && (h < least || uint(h) < block_of<P, BLOCK>(i + e))) {
        const float a = v[e], b = v[e + h];
        v[e] = a + b, v[e + h] = a - b;
      }
    }
  }
  UNROLL for (int h = 8; h < 256 && h < most; h *= 2) {
    const bool upper = lane & (h / 8);
    EACH(e, 8) {
      const float other = simd_shuffle_xor(v[e], ushort(h / 8));
      if (h < least || uint(h) < block_of<P, BLOCK>(i + e)) v[e] = upper ? other - v[e] : v[e] + other;
    }
  }
}

// Stages from FROM on, between v[m]: the numbers i + FROM * m of P.
template <int P, int BLOCK, int FROM, int COUNT>
METAL_FUNC void far_stages(thread float* v, uint i) {
  UNROLL for (int h = 1; h < COUNT; h *= 2) {
    UNROLL for (int m = 0; m + h < COUNT; m++) {
      if ((m & h) == 0 && uint(FROM * h) < block_of<P, BLOCK>(i + FROM * m)) {
        const float a = v[m], b = v[m + h];
        v[m] = a + b, v[m + h] = a - b;
      }
    }
  }
}

// y[slot(i)] = post * H(pre * gamma * x), numbers `begin` .. begin + SPAN - 1 of P. Where SPAN is less than a block,
// stages from SPAN on, the root and post are left to another kernel. x has IN columns, zeros follow. pre and post
// repeat, a whole number of times. partial: where not null, every simdgroup's sum of x squared.
template <int IN, int P, int BLOCK, int PRES, int POSTS, int SPAN, int THREADS, class T>
METAL_FUNC void rotate(const device T* x, const device float* gamma, const device float* pre, const device float* post,
                       threadgroup float* y, threadgroup float* partial, uint begin, Place at) {
  constexpr int most = largest_block(P, BLOCK), count = (SPAN + 255) / 256;
  float square = 0.0f, v[count < 8 ? 8 : count], s[8];
  for (uint p = at.simd; p < count; p += THREADS / 32) {
    const uint i = begin + 256 * p + 8 * at.lane;
    EACH(e, 8) v[e] = 0.0f;
    if (i < IN) load_eight<IN>(x, i, v);
    EACH(e, 8) square = fma(v[e], v[e], square);
    if (gamma && i < IN) {
      load_eight<IN>(gamma, i, s);
      EACH(e, 8) v[e] *= s[e];
    }
    if (pre && i < P) {
      load_eight<PRES>(pre, i % PRES, s);
      EACH(e, 8) v[e] *= s[e];
    }
    near_stages<P, BLOCK>(v, i, at.lane);
    if (most <= 256 && i < P) {
      if (post) load_eight<POSTS>(post, i % POSTS, s);
      EACH(e, 8) {
        const float n = i + e < P ? orthonormal<P, BLOCK>(v[e], i + e) : 0.0f;
        v[e] = post ? n * s[e] : n;
      }
    }
    if (i < P) {
      UNROLL for (int e = 0; e < 8; e += 4)
        *(threadgroup float4*)(y + slot(i + e - begin)) = float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
    }
  }
  if (partial) {
    square = simd_sum(square);
    if (at.lane == 0) partial[at.simd] = square;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if constexpr (most > 256) {
    for (uint j = at.index; j < 256; j += THREADS) {
      EACH(m, count) v[m] = begin + j + 256 * m < P ? y[slot(j + 256 * m)] : 0.0f;
      far_stages<P, BLOCK, 256, count>(v, begin + j);
      EACH(m, count) {
        const uint i = begin + j + 256 * m;
        if (SPAN >= most) v[m] = orthonormal<P, BLOCK>(v[m], i);
        if (SPAN >= most && post) v[m] *= post[i % POSTS];
        if (i < P) y[slot(j + 256 * m)] = v[m];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

}  // namespace hm
