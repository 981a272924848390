// The single list of what kernels are compiled for. One line adds an instance to every backend,
// to supports(), to the tests and to the README's table.
#pragma once

// table: how a code becomes a number    bits: per code    scale: dtype of scale (and of bias)
//   linear         code, plus a bias per group (MLX affine)
//   linear_signed  code - 2^(bits-1) (compressed-tensors)
//   e2m1           OCP E2M1 (MXFP4); e2m1_gguf: the same numbers in GGUF's 17-byte blocks
//   codebook       f32 table[code] (JANGTQ, TQ)
//   plain          the number itself; bits and scale name its dtype
#define HM_INSTANCES(X)       \
  X(linear, 2, bf16)          \
  X(linear, 3, bf16)          \
  X(linear, 4, bf16)          \
  X(linear, 5, bf16)          \
  X(linear, 6, bf16)          \
  X(linear, 8, bf16)          \
  X(linear, 2, f16)           \
  X(linear, 3, f16)           \
  X(linear, 4, f16)           \
  X(linear, 5, f16)           \
  X(linear, 6, f16)           \
  X(linear, 8, f16)           \
  X(linear, 2, f32)           \
  X(linear, 3, f32)           \
  X(linear, 4, f32)           \
  X(linear, 5, f32)           \
  X(linear, 6, f32)           \
  X(linear, 8, f32)           \
  X(linear_signed, 4, bf16)   \
  X(linear_signed, 4, f16)    \
  X(linear_signed, 4, f32)    \
  X(linear_signed, 8, bf16)   \
  X(linear_signed, 8, f16)    \
  X(linear_signed, 8, f32)    \
  X(e2m1, 4, e8m0)            \
  X(e2m1_gguf, 4, e8m0)       \
  X(codebook, 2, f16)         \
  X(codebook, 4, f16)         \
  X(codebook, 2, f32)         \
  X(codebook, 3, f32)         \
  X(codebook, 4, f32)         \
  X(plain, 16, bf16)          \
  X(plain, 16, f16)           \
  X(plain, 32, f32)

// hm_linear_2_bf16, ...: an instance's position in the list, the `instance` of hm_part.
enum hm_instance {
#define X(table, bits, scale) hm_##table##_##bits##_##scale,
  HM_INSTANCES(X)
#undef X
};
