// What a CPU kernel is given and who may call it: one table of function pointers per ISA, chosen
// once at start. Tasks are plain structs, checked by the op before any kernel sees them.
#pragma once
#include <stdint.h>

#include "../core/abi.h"
#include "../core/kv_codecs.h"

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

struct NormTask {
  const void* x;  // [r, columns]
  hm_scale x_dtype;
  const float* gamma;
  float* y;  // [r, columns]
  int64_t columns;
  float eps;
};

constexpr int64_t kBlockKeys = 128;    // keys whose scores are softened together
constexpr int64_t kMostHeadDim = 512;  // the model has 256

// Some tokens of every sequence; `stride` and `proj_stride` are the tokens from one sequence to the next.
struct AttentionTask {
  const void* proj;  // [batch, proj_stride, proj_width]: (q | gate) per head | k | v
  void* y;           // [batch, proj_stride, heads * d]
  hm_scale proj_dtype, y_dtype, cache_dtype;
  const float *q_norm, *k_norm;  // [d]
  const float *cos, *sin;        // [batch, stride, rot]
  const uint8_t* mask;           // [batch, stride, mask_width]: 0 hides a key; nullptr: causal
  void *keys, *values;           // [batch, kv_heads, capacity, d]
  const int64_t *at, *skip;      // [batch]: token i >= skip of a sequence goes to at + i; those before are padding
  int64_t batch, tokens, heads, kv_heads, d, rot, capacity, past;
  int64_t stride, proj_stride, proj_width, mask_width;
  float eps, scale;
  int64_t width;         // d rounded up to 16
  int64_t tile_tokens;   // queries taken together
  int64_t blocks;        // of keys, for attention_parts
  float* q;              // [batch, kv_heads, tokens, heads / kv_heads, width], and 3 rows behind
  const int64_t* start;  // [batch]: the first key any query sees
  const int64_t* limit;  // [batch, tokens]: keys a query sees end here
};

// What a tile's rows (rounded up to 4) found in some keys.
struct AttentionPart {
  float *out, *most, *total;  // [rows, width], [rows], [rows]
  float* noise;               // [rows]: sum of (weight * scale of the value)^2; nullptr where nobody asks
};
struct AttentionWork {
  float *scores, *copy;  // [rows, kBlockKeys], [kBlockKeys, width]
  AttentionPart all, next;
};

// One side of the pages of a head: how hm_kv_codec stores f32 rows [HM_KV_PAGE, d].
struct KvSide {
  int codec;
  bool values;          // kivi groups tokens of a column for keys, columns of a token for values
  int64_t d;
  const float* signs;   // [d]: of the rotation, where the codec has one
  const float *mean, *balance;  // [d] or nullptr: h codecs store (x - mean) * balance
  float scale;          // fp8: of the codes
  float unit, noise;    // h: a row in the rotated basis is stored scale * unit * level; D (1 - D) of values
  int64_t page_bytes;
};

struct KvCodecTask {
  KvSide side;
  float* rows;     // [pages, HM_KV_PAGE, d]
  uint8_t* pages;  // [pages, side.page_bytes]
};

// Integer scores of rows against pages of keys.
struct KvScoresTask {
  KvSide side;
  const float* q;  // [rows, d]
  const uint8_t* pages;
  int64_t rows, count;
  int8_t* q8;       // [rows, d]
  float* unit;      // [rows]
  int32_t* scores;  // [rows, count * HM_KV_PAGE]
};

// Queries of one page of a sequence under one key head; rows are (token, head of the group).
struct KvTile {
  int64_t b, g, first, last;  // tokens of the call
  int64_t page, from;         // of the sequence: their own, and the first coded one they see
  int64_t raw;                // row of the own page's first token in AttentionTask::keys
  int64_t rows, row;          // how many, and the first one in KvTask::query
};

// One query row, ready for each kind of page.
struct KvQuery {
  float factor, shift;  // a score is integer * token's scale * factor + shift
  int32_t start;        // of the integer sum: takes off kLevelOffset
};

constexpr int kRunPages = 8;  // pages whose scores are softened together
constexpr int kRunKeys = kRunPages * HM_KV_PAGE;

// Attention over pages; `raw` has the tokens of the pages this call touches, `sink` page 0 of every sequence.
struct KvTask {
  AttentionTask raw, sink;
  KvSide key, value;            // signs only: mean and balance are per head, in vectors
  const float* vectors;         // [4, kv_heads, d] or nullptr: key mean, key balance, value mean, value balance
  const uint8_t *key_pages, *value_pages;  // [pages, kv_heads, page_bytes]
  const int32_t* table;                    // [batch, table_width]
  int64_t table_width, window;
  float scale;                  // of scores
  float* turned;                // like raw.q: rotated, for codecs that rotate but are not integers
  int8_t* q8;                   // [all rows + kSumRows, d]
  KvQuery* query;               // [all rows + kSumRows]
  const void *q_in, *k_in, *v_in;  // kv_attend: [batch, tokens, heads, d]
};

// What one thread needs for a tile of rows (rounded up to kSumRows) against a run.
struct KvWork {
  float *scores;    // [rows, kRunKeys]
  int8_t* weights;  // [rows / kSumRows, kRunPages, 16 quads, kSumRows, 2, 4]: high and low 7 bits
  float* unit;      // [rows, kRunPages]: of the weights
  int32_t* start;   // [rows, 2, kRunPages]
  float *key_scale, *value_scale, *copy;  // [kRunKeys] each, [kBlockKeys, width]
  AttentionWork attention;  // of raw pages; its `all` is their result
  AttentionPart all, next;  // of coded pages
};
constexpr int kSumRows = 8;

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
  const int64_t* counts;  // [batch]: tokens each sequence has, the others leave no trace; nullptr: all
  float* qkv;            // [batch, count, channels]: q | k | v of the chunk; the rule puts S^T q over v
};

// Where AVX-512's integer sums of a unit of columns begin, and what they become numbers with; see qmatmul_avx512.h.
struct QmatmulUnit {
  int32_t start[3];
  float unit, total;  // of x as fixed point; the sum of x
  int32_t unused[3];  // two to a cache line
};

// One token of qmatmul, prepared once for every row that reads it. The caller provides the memory; AVX-512's
// arrays are 64-byte aligned and explained in qmatmul_avx512_prepare.h.
struct QmatmulInput {
  float* x;            // [padded]: columns rounded up to 256, zeros behind them
  float* sums;         // [padded / 32]: of 32 columns; AVX-512: units of 128
  int8_t* planes[3];   // AVX-512: x as three signed bytes, by layout
  float* spread;       // AVX-512: x for codebooks; see qmatmul_avx512_f32.h
  int32_t* sums32;     // AVX-512: sums of the bytes over 32 columns, [padded / 32][4]
  QmatmulUnit* units;  // AVX-512: of each level in turn, padded / level's columns
};

// The order in which AVX-512 wants the bytes of x: log2 of the vectors of codes it unpacks from one of words.
constexpr int kSpread = 3;  // f32 for codebooks
static inline int qmatmul_layout(int table, int bits) {
  if (table == hm_codebook) return kSpread;
  return table == hm_e2m1_gguf || bits > 4 ? 0 : bits == 2 ? 2 : 1;
}

// What AVX-512's sums of a unit depend on: its columns, 32, 64 or 128 inside one group, and what is taken off the bytes
// that stand for codes.
struct QmatmulLevel {
  int columns, centre;
};
static inline QmatmulLevel qmatmul_level(int table, int bits, int64_t group, bool one_scale_a_row) {
  const int columns = one_scale_a_row || group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
  return {columns, table == hm_e2m1 || table == hm_e2m1_gguf ? 12 : 1 << (bits - 1)};
}
struct QmatmulLevels {
  static constexpr int kMost = 16;
  int count;
  QmatmulLevel level[kMost];
  // Where a level's units begin; `padded` columns, a multiple of 128. Behind the last one where it is not known.
  int64_t offset(const QmatmulLevel& wanted, int64_t padded) const {
    int64_t at = 0;
    for (int i = 0; i < count; at += padded / level[i++].columns)
      if (level[i].columns == wanted.columns && level[i].centre == wanted.centre) break;
    return at;
  }
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
  int64_t units;                              // where the level's begin in QmatmulInput::units
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
  const float* residual;              // [t, columns], added last; nullptr: none
  char* y;                            // [t, columns]
  hm_scale out_type;
  int64_t columns, top_k;
};

struct Kernels {
  const char* name;
  void (*read_bytes)(const ReadTask&, int64_t begin, int64_t end);  // blocks
  void (*hadamard)(const HadamardTask&, int64_t begin, int64_t end);  // blocks, or rows where block = 0
  void (*dequantize)(const DequantizeTask&, int64_t begin, int64_t end);  // entries of index
  void (*norm)(const NormTask&, int64_t begin, int64_t end);  // rows
  void (*attention_prepare)(const AttentionTask&, int64_t begin, int64_t end);  // tokens
  void (*attention_tiles)(const AttentionTask&, const AttentionWork&, int64_t begin, int64_t end);  // tiles
  void (*attention_parts)(const AttentionTask&, const AttentionWork&, const AttentionPart*, int64_t begin,
                          int64_t end);  // tiles times blocks of keys
  void (*attention_join)(const AttentionTask&, const AttentionWork&, const AttentionPart*, int64_t begin,
                         int64_t end);  // tiles
  void (*kv_encode)(const KvCodecTask&, int64_t begin, int64_t end);  // pages
  void (*kv_decode)(const KvCodecTask&, int64_t begin, int64_t end);  // pages
  void (*kv_scores)(const KvScoresTask&);
  void (*kv_take)(const KvTask&, int64_t begin, int64_t end);   // tokens: q_in, k_in, v_in to raw
  void (*kv_query)(const KvTask&, int64_t begin, int64_t end);  // query rows
  void (*kv_seal)(const KvTask&, int64_t g, bool values, const void* rows, uint8_t* page);
  void (*kv_run)(const KvTask&, const KvTile&, int64_t run, const KvWork&, const AttentionPart&);
  void (*kv_finish)(const KvTask&, const KvTile&, const KvWork&, const AttentionPart* runs);  // nullptr: runs them
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
