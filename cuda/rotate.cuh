// The Hadamard rotation of one row by one block: 8 numbers a lane, 256 a warp without a barrier.
// Stages run by distance 1, 2, 4, ..., each a sum or a difference: the bits of reference.hadamard.
#pragma once
#include "number.cuh"

namespace hm {

// A rotation post . H . pre of rows of `columns` numbers, padded with zeros to `wide`. block: of H, 0 for the powers
// of two that wide is a sum of, largest first. pre, post: signs, or null; they repeat, a whole number of times.
struct Rotation {
  const float *pre, *post;
  int columns, wide, block, pres, posts;
};

// Where number i of a rotated row lies in shared memory: lanes that read 4 numbers, 8 to 64 apart, meet different banks.
__device__ inline uint slot(uint i) { return i ^ ((i >> 5 ^ i >> 8) & 7u) << 2; }
__host__ __device__ constexpr int padded(int k) { return (k + 31) / 32 * 32; }  // floats that a row needs there

// Size of the block of H that number i is in.
__device__ inline uint block_of(const Rotation& r, uint i) {
  return r.block ? uint(r.block) : 1u << (31 - __clz(int((uint(r.wide) ^ i) | 1u)));
}
__device__ inline uint largest_block(const Rotation& r) {
  return r.block ? uint(r.block) : 1u << (31 - __clz(r.wide));
}

// A sum of signed numbers, made orthonormal. TQ divides by sqrt(block), JANGTQ multiplies by the inverse.
__device__ inline float orthonormal(const Rotation& r, float v, uint i) {
  const uint log = 31 - __clz(int(block_of(r, i)));
  const float root = float(1u << log / 2);
  if (r.block) return __fdiv_rn(v, log % 2 ? 1.41421356237309504880f * root : root);
  return v * __fdiv_rn(log % 2 ? 0.70710678118654752440f : 1.0f, root);
}

// Whether every block of H has the same size: then all lanes ask the same, once.
__device__ inline bool alike(const Rotation& r) { return r.block || (r.wide & (r.wide - 1)) == 0; }

template <bool ALIKE>
__device__ inline void near_stages_of(const Rotation& r, float* v, uint i) {
  const uint most = largest_block(r);
  HM_UNROLL for (int h = 1; h < 8; h *= 2) {
    if (ALIKE && uint(h) >= most) break;
    EACH(e, 8) {
      if ((e & h) == 0 && (ALIKE || uint(h) < block_of(r, i + e))) {
        const float a = v[e], b = v[e + h];
        v[e] = a + b, v[e + h] = a - b;
      }
    }
  }
  HM_UNROLL for (int h = 8; h < 256; h *= 2) {
    if (uint(h) >= most) break;
    const float sign = lane_index() & (h / 8) ? -1.0f : 1.0f;  // the upper one is subtracted
    EACH(e, 8) {
      const float other = __shfl_xor_sync(FULL, v[e], h / 8);
      if (ALIKE || uint(h) < block_of(r, i + e)) v[e] = fmaf(sign, v[e], other);
    }
  }
}
// Stages within 256 numbers, of which a lane has v[0..8), the numbers i .. i + 7.
__device__ inline void near_stages(const Rotation& r, float* v, uint i) {
  if (alike(r)) near_stages_of<true>(r, v, i);
  else near_stages_of<false>(r, v, i);
}

// Stages from `from` on, between v[m]: the numbers i + from * m.
template <int COUNT>
__device__ inline void far_stages(const Rotation& r, float* v, uint i, uint from) {
  HM_UNROLL for (int h = 1; h < COUNT; h *= 2) {
    EACH(m, COUNT) {
      if ((m & h) == 0 && m + h < COUNT && from * h < block_of(r, i + from * m)) {
        const float a = v[m], b = v[m + h];
        v[m] = a + b, v[m + h] = a - b;
      }
    }
  }
}

// y[slot(i)] = post * H(pre * gamma * x), numbers `begin` .. begin + span - 1 of r.wide; x begins at element `row`.
// span: a multiple of 256 and at most 256 * COUNT, or all of the row. Where it is less than a block of H, stages from
// span on, the root and post are left to another kernel. Returns this thread's part of the sum of x squared.
template <int COUNT>
__device__ inline float rotate(const Rotation& r, const void* x, size_t row, int dtype, const float* gamma, float* y,
                               uint begin, uint span) {
  const uint most = largest_block(r), wide = r.wide, stride = blockDim.x;
  const bool whole = span >= most;
  float square = 0.0f, v[COUNT < 8 ? 8 : COUNT], s[8];
  for (uint p = 256 * warp_index(); p < span; p += 8 * stride) {
    const uint i = begin + p + 8 * lane_index();
    load_eight(x, row, int(i), r.columns, dtype, v);
    EACH(e, 8) square = fmaf(v[e], v[e], square);
    if (gamma) {
      load_eight(gamma, 0, int(i), r.columns, F32, s);
      EACH(e, 8) v[e] *= s[e];
    }
    if (r.pre && i < wide) {
      load_eight(r.pre, 0, int(i % r.pres), r.pres, F32, s);
      EACH(e, 8) v[e] *= s[e];
    }
    near_stages(r, v, i);
    if (most <= 256 && i < wide) {
      if (r.post) load_eight(r.post, 0, int(i % r.posts), r.posts, F32, s);
      EACH(e, 8) {
        const float n = i + e < wide ? orthonormal(r, v[e], i + e) : 0.0f;
        v[e] = r.post ? n * s[e] : n;
      }
    }
    if (i < wide) {
      EACH(q, 2) *reinterpret_cast<float4*>(y + slot(i + 4 * q - begin)) =
          make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
    }
  }
  __syncthreads();
  if (most > 256) {
    for (uint j = threadIdx.x; j < 256; j += stride) {
      EACH(m, COUNT) v[m] = 256u * m < span && begin + j + 256 * m < wide ? y[slot(j + 256 * m)] : 0.0f;
      far_stages<COUNT>(r, v, begin + j, 256);
      EACH(m, COUNT) {
        const uint i = begin + j + 256 * m;
        if (256u * m >= span || i >= wide) continue;
        if (whole) v[m] = orthonormal(r, v[m], i);
        if (whole && r.post) v[m] *= r.post[i % r.posts];
        y[slot(j + 256 * m)] = v[m];
      }
    }
    __syncthreads();
  }
  return square;
}

}  // namespace hm
