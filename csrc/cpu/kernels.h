// What a CPU kernel is given and who may call it: one table of function pointers per ISA, chosen
// once at start. Tasks are plain structs, checked by the op before any kernel sees them.
#pragma once
#include <stdint.h>

#include "../core/abi.h"

namespace hm {

// Sum of 64-bit words, as fast as memory delivers them: the yardstick for every other kernel.
struct ReadTask {
  const uint8_t* bytes;
  int64_t size;       // bytes
  uint64_t* sums;     // one per block
  int64_t block;      // bytes per block
};

// Dtypes of activations are hm_f32, hm_f16 or hm_bf16.
struct HadamardTask {
  const void* x;  // [r, k]
  void* y;        // [r, columns]
  hm_scale x_dtype, y_dtype;
  int64_t k, columns;
  int64_t block;             // 0: the powers of two of k, largest first
  const float *pre, *post;   // nullptr: ones
  int64_t pre_period, post_period;  // columns, or a multiple of block
};

struct DequantizeTask {
  const hm_part* parts;  // [experts, per_expert]
  int64_t per_expert;
  int64_t rows;     // of one expert
  int64_t columns;
  const uint8_t* const* buffers;
  const int64_t* index;  // expert-major row numbers
  void* y;               // [len(index), columns]
  hm_scale y_dtype;
};

constexpr int kMostTaps = 8;     // of the convolution; the model has 4
constexpr int kMostTokens = 32;  // of a chunk

struct GatedDeltaTask {
  const void* proj;  // [batch, tokens, proj_width]: qkv | z | b | a
  void* y;           // [batch, tokens, hv * dv]
  hm_scale proj_dtype, y_dtype;
  const float *conv_weight, *a_log, *dt_bias, *norm;
  float* conv_state;  // [batch, channels, taps]
  float* state;       // [batch, hv, dk, dv]
  int64_t batch, tokens, hk, hv, dk, dv;
  int64_t channels, proj_width;
  int taps;
  float eps;
  int64_t first, count;  // tokens of this chunk
  float* qkv;            // [batch, count, channels]: q | k | v of the chunk; the rule puts S^T q over v
};

// One token of qmatmul, prepared once for every row that reads it. The caller provides the memory.
struct QmatmulInput {
  float* x;         // [padded]: columns rounded up to 256, zeros behind them
  int8_t* planes[3];  // AVX-512: x as signed bytes, by layout 0..2; see qmatmul_avx512.h; 64-byte aligned
  float* lane_sums[3];  // AVX-512: by layout, fixed-point sums of x for each lane of codes
  float* spread;      // AVX-512: x in layout 3; see qmatmul_avx512_codebook.h; 64-byte aligned
  int64_t* sums32;    // AVX-512: fixed-point sums of 32 columns, [padded / 32]
  float* sums;      // sums of x: of 32 columns; AVX-512: fixed point, per level of QmatmulLevels
  double unit, total;  // AVX-512: of fixed point, and the sum of all columns
};

// How AVX-512 wants x: 0..2, bytes, by log2 of the vectors of codes it unpacks from one load of at most 64
// bytes; 3, f32 for codebooks.
constexpr int kSpread = 3;
static inline int qmatmul_layout(int table, int bits) {
  if (table == hm_codebook) return kSpread;
  return table == hm_e2m1_gguf || bits > 4 ? 0 : bits == 2 ? 2 : 1;
}
// Columns whose x AVX-512 sums for one scale: a group, or 32 where a block of codes cuts groups.
static inline int64_t qmatmul_unit(int64_t group, int layout) {
  return (64 << layout) % group == 0 || group % (64 << layout) == 0 ? group : 32;
}

// AVX-512 takes the sums of 16 units at a time, so each unit in use is a level of its own.
struct QmatmulLevels {
  static constexpr int kMost = 8;
  int count;
  int64_t unit[kMost];  // multiples of 32
  static int64_t slots(int64_t padded, int64_t unit) { return padded / unit / 16 * 16 + 16; }
};

struct QmatmulPrepare {
  const char* x;  // [t, columns]
  hm_scale x_type;
  int64_t columns;
  int layouts;  // AVX-512: bit i: some reader wants layout i
  QmatmulLevels levels;
  QmatmulInput* inputs;
};

// A block of rows of one instance and the tokens that go through it.
struct QmatmulTask {
  int table, bits, scale_type;  // hm_table, hm_scale
  int64_t columns, group;
  const uint8_t *codes, *codes_end;
  int64_t row_bytes, scale_stride;            // bytes from one row to the next
  const uint8_t *scale, *bias, *codebook;     // nullptr: none
  int64_t sums_offset;                        // of the unit's level in QmatmulInput::sums
  const QmatmulInput* const* tokens;
  char* const* out;                           // where each token's result for row 0 goes
  int64_t token_count;
  hm_scale out_type;
};

struct RouteTask {
  const float* logits;  // [t, experts]
  int32_t* expert;      // [t, top_k], best first
  float* weight;        // [t, top_k]
  int64_t experts, top_k;
  bool normalize;
};

struct SwigluTask {
  const float* gate_up;  // [r, 2 * width]
  float* out;            // [r, width]
  int64_t width;
};

struct CombineTask {
  const float *down, *weight;         // [t, top_k, columns], [t, top_k]
  const float *shared, *shared_gate;  // [t, columns], [t]
  char* y;                            // [t, columns]
  hm_scale out_type;
  int64_t columns, top_k;
};

struct Kernels {
  const char* name;
  void (*read_bytes)(const ReadTask&, int64_t begin, int64_t end);  // blocks
  void (*hadamard)(const HadamardTask&, int64_t begin, int64_t end);  // blocks, or rows where block = 0
  void (*dequantize)(const DequantizeTask&, int64_t begin, int64_t end);  // entries of index
  void (*gated_delta_conv)(const GatedDeltaTask&, int64_t begin, int64_t end);  // heads of q, k, v
  void (*gated_delta_rule)(const GatedDeltaTask&, int64_t begin, int64_t end);  // value heads
  void (*qmatmul_prepare)(const QmatmulPrepare&, int64_t begin, int64_t end);  // tokens
  void (*qmatmul)(const QmatmulTask&, int64_t begin, int64_t end);  // rows
  void (*moe_route)(const RouteTask&, int64_t begin, int64_t end);  // tokens
  void (*moe_swiglu)(const SwigluTask&, int64_t begin, int64_t end);  // rows
  void (*moe_combine)(const CombineTask&, int64_t begin, int64_t end);  // tokens
};

extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_neon;

// The table in use: the best this machine runs, unless set_isa() chose another.
const Kernels& kernels();

}  // namespace hm
