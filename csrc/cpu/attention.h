// Causal attention between its projections, with grouped heads, RMSNorm of q and k, partial rotary
// positions and a sigmoid gate (transformers' Qwen3_5MoeAttention):
//
//   q, k = rope(norm(q)), rope(norm(k));   y = sigmoid(gate) * softmax(q k^T / sqrt(d)) v
//
// Where the time goes: one token reads every key and value once, for all query heads of a group; a prompt
// does 4 d multiply-adds per (query, key). Both walk the same blocks of kBlockKeys keys:
//
//   keys  |block 0|block 1|...       scores s = q k^T;  m = max s;  p = e^(s - m);  l = sum p;  o = p v
//   rows  (token, head of the group)  then the blocks' (m, l, o) are joined in order
//
// A row of one block is computed the same way whoever else is in its tile, and blocks are joined in
// order, so a query has the same bits alone, in a batch, in a prompt cut anywhere, on any number of
// threads. Blocks start at a sequence's first key: padding in front of it does not move them.
#pragma once

namespace hm {
namespace {

#if HM_ISA_AVX512 || HM_ISA_NEON
constexpr int kScoreRows = 4, kValueVecs = 4;  // 16 accumulators of 32 registers
#else
constexpr int kScoreRows = 2, kValueVecs = 2;  // 8 of 16
#endif
constexpr int kValueRows = 4;

// x[:, rot] turned by the angles of one token; pairs are (i, i + rot / 2).
inline void rope(float* x, const float* cosine, const float* sine, int64_t rot) {
  const int64_t half = rot / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

// Units: tokens of the batch. Queries to t.q, keys and values to the caches.
void attention_prepare(const AttentionTask& t, int64_t begin, int64_t end) {
  const int64_t group = t.heads / t.kv_heads, bytes = t.proj_dtype == hm_f32 ? 4 : 2;
  const int64_t cached = t.cache_dtype == hm_f32 ? 4 : 2;
  alignas(64) float x[kMostHeadDim];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / t.tokens, i = u % t.tokens;
    if (i < t.skip[b]) continue;
    const char* proj = static_cast<const char*>(t.proj) + (b * t.proj_stride + i) * t.proj_width * bytes;
    const int64_t angles = (b * t.stride + i) * t.rot;
    for (int64_t h = 0; h < t.heads; ++h) {
      float* q = t.q + (((b * t.kv_heads + h / group) * t.tokens + i) * group + h % group) * t.width;
      widen(proj + h * 2 * t.d * bytes, x, t.d, Dtype(t.proj_dtype));
      normalise(x, t.q_norm, x, t.d, t.eps);
      rope(x, t.cos + angles, t.sin + angles, t.rot);
      for (int64_t c = 0; c < t.d; ++c) q[c] = x[c] * t.scale;
      for (int64_t c = t.d; c < t.width; ++c) q[c] = 0;
    }
    for (int64_t g = 0; g < t.kv_heads; ++g) {
      const int64_t at = ((b * t.kv_heads + g) * t.capacity + t.at[b] + i) * t.d * cached;
      widen(proj + (2 * t.heads + g) * t.d * bytes, x, t.d, Dtype(t.proj_dtype));
      normalise(x, t.k_norm, x, t.d, t.eps);
      rope(x, t.cos + angles, t.sin + angles, t.rot);
      narrow(x, static_cast<char*>(t.keys) + at, t.d, Dtype(t.cache_dtype));
      widen(proj + (2 * t.heads + t.kv_heads + g) * t.d * bytes, x, t.d, Dtype(t.proj_dtype));
      narrow(x, static_cast<char*>(t.values) + at, t.d, Dtype(t.cache_dtype));
    }
  }
}

// A tile of queries: tokens first..last of sequence b under key head g, and its rows of t.q.
struct QueryTile {
  int64_t b, g, first, last, rows;
  const float* q;
};

inline QueryTile query_tile(const AttentionTask& t, int64_t unit) {
  const int64_t tiles = (t.tokens + t.tile_tokens - 1) / t.tile_tokens, group = t.heads / t.kv_heads;
  QueryTile q;
  q.b = unit / tiles / t.kv_heads;
  q.g = unit / tiles % t.kv_heads;
  // The last tile has the most keys: it goes first, so that threads finish together.
  q.first = (tiles - 1 - unit % tiles) * t.tile_tokens;
  q.last = q.first + t.tile_tokens < t.tokens ? q.first + t.tile_tokens : t.tokens;
  q.rows = (q.last - q.first) * group;
  q.q = t.q + ((q.b * t.kv_heads + q.g) * t.tokens + q.first) * group * t.width;
  return q;
}

// Keys that some query of the tile sees end here.
inline int64_t keys_end(const AttentionTask& t, const QueryTile& q) {
  int64_t end = 0;
  for (int64_t i = q.first; i < q.last; ++i) end = t.limit[q.b * t.tokens + i] > end ? t.limit[q.b * t.tokens + i] : end;
  return end;
}

// n rows of a cache from key `first` on as f32[n, width]: in place where they are, else a copy.
inline const float* widened(const AttentionTask& t, const void* cache, const QueryTile& q, int64_t first, int64_t n,
                            float* copy) {
  const int64_t at = ((q.b * t.kv_heads + q.g) * t.capacity + first) * t.d;
  if (t.cache_dtype == hm_f32 && t.width == t.d) return static_cast<const float*>(cache) + at;
  const int64_t bytes = t.cache_dtype == hm_f32 ? 4 : 2;
  for (int64_t j = 0; j < n; ++j) {
    float* row = copy + j * t.width;
    widen(static_cast<const char*>(cache) + (at + j * t.d) * bytes, row, t.d, Dtype(t.cache_dtype));
    for (int64_t c = t.d; c < t.width; ++c) row[c] = 0;
  }
  return copy;
}

// scores[r, j] = q[r] . k[j] for kScoreRows rows and 4 keys; keys from n on repeat the last one.
inline void score_tile(const float* q, const float* k, int64_t width, int64_t j, int64_t n, float* scores,
                       int64_t stride) {
  const float* key[4];
  for (int i = 0; i < 4; ++i) key[i] = k + (j + i < n ? j + i : n - 1) * width;
  Vec a[kScoreRows * 4];
#pragma GCC unroll 16
  for (int i = 0; i < kScoreRows * 4; ++i) a[i] = zero();
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec k0 = load(key[0] + c), k1 = load(key[1] + c), k2 = load(key[2] + c), k3 = load(key[3] + c);
#pragma GCC unroll 4
    for (int r = 0; r < kScoreRows; ++r) {
      const Vec x = load(q + r * width + c);
      a[4 * r] = fma(x, k0, a[4 * r]);
      a[4 * r + 1] = fma(x, k1, a[4 * r + 1]);
      a[4 * r + 2] = fma(x, k2, a[4 * r + 2]);
      a[4 * r + 3] = fma(x, k3, a[4 * r + 3]);
    }
  }
  alignas(64) float s[kScoreRows * 4];
#pragma GCC unroll 4
  for (int i = 0; i < kScoreRows * 4; i += kLanes) store(s + i, sums(a + i));
  for (int r = 0; r < kScoreRows; ++r) memcpy(scores + r * stride + j, s + 4 * r, 16);
}

// Rows in groups that stay in the first-level cache while the keys pass. Values are on their way already.
inline void block_scores(const float* q, int64_t rows, const float* k, int64_t width, int64_t n, float* scores,
                         int64_t stride) {
  constexpr int64_t kNear = 16;
  for (int64_t r = 0; r < rows; r += kNear)
    for (int64_t j = 0; j < n; j += 4)
      for (int64_t i = r; i < rows && i < r + kNear; i += kScoreRows)
        score_tile(q + i * width, k, width, j, n, scores + i * stride, stride);
}

// One row's scores of `seen` keys to weights of n (a multiple of kLanes, or the block): max and sum.
inline void soften(float* s, const uint8_t* mask, int64_t seen, int64_t n, float* most, float* total) {
  const float none = bits_to_f32(0xff800000u);
  for (int64_t j = 0; mask && j < seen; ++j)
    if (!mask[j]) s[j] = none;
  for (int64_t j = seen; j < n; ++j) s[j] = none;
  Vec top = splat(none);
  for (int64_t j = 0; j < n; j += kLanes) top = max_(top, load(s + j));
  const float m = max_of(top);
  *most = m;
  *total = 0;
  if (m == none) {
    memset(s, 0, size_t(n) * 4);
    return;
  }
  Vec all = zero();
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec p = exp_(sub(load(s + j), splat(m)));
    store(s + j, p);
    all = add(all, p);
  }
  *total = sum(all);
}

// out[r, c] = sum_j p[r, j] v[j, c] for kValueRows rows and V vectors of columns.
template <int V>
inline void value_tile(const float* p, int64_t stride, const float* v, int64_t width, int64_t n, float* out) {
  Vec a[kValueRows * V];
#pragma GCC unroll 16
  for (int i = 0; i < kValueRows * V; ++i) a[i] = zero();
  for (int64_t j = 0; j < n; ++j) {
    Vec x[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) x[i] = load(v + j * width + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kValueRows; ++r) {
      const Vec w = splat(p[r * stride + j]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) a[r * V + i] = fma(x[i], w, a[r * V + i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kValueRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(out + r * width + i * kLanes, a[r * V + i]);
}

inline void block_values(const float* p, int64_t stride, int64_t rows, const float* v, int64_t width, int64_t n,
                         float* out) {
  int64_t c = 0;
  for (; c + kValueVecs * kLanes <= width; c += kValueVecs * kLanes)
    for (int64_t r = 0; r < rows; r += kValueRows)
      value_tile<kValueVecs>(p + r * stride, stride, v + c, width, n, out + r * width + c);
  for (; c < width; c += kLanes)
    for (int64_t r = 0; r < rows; r += kValueRows)
      value_tile<1>(p + r * stride, stride, v + c, width, n, out + r * width + c);
}

// One tile against one block of keys: part.out[rows, width], most and total of every row.
void attend_block(const AttentionTask& t, const QueryTile& q, int64_t first, int64_t end, const AttentionWork& work,
                  const AttentionPart& part) {
  const int64_t group = t.heads / t.kv_heads, n = end - first, padded = (n + kLanes - 1) / kLanes * kLanes;
  block_scores(q.q, q.rows, widened(t, t.keys, q, first, n, work.copy), t.width, n, work.scores,
               kBlockKeys);
  for (int64_t r = 0; r < q.rows; ++r) {
    const int64_t row = q.b * t.tokens + q.first + r / group;
    int64_t seen = t.limit[row] - first;
    seen = seen < 0 ? 0 : seen > n ? n : seen;
    const int64_t masked = (q.b * t.stride + q.first + r / group) * t.mask_width + first;
    const uint8_t* mask = t.mask ? t.mask + masked : nullptr;
    soften(work.scores + r * kBlockKeys, mask, seen, padded, part.most + r, part.total + r);
  }
  block_values(work.scores, kBlockKeys, q.rows, widened(t, t.values, q, first, n, work.copy), t.width, n, part.out);
}

// all <- all joined with the next block. A row that saw no key of the block stays as it is.
void attend_join(const AttentionPart& all, const AttentionPart& next, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    if (next.total[r] == 0) continue;
    const float most = next.most[r] > all.most[r] ? next.most[r] : all.most[r];
    float scale[2][kLanes];
    store(scale[0], exp_(splat(all.most[r] - most)));
    store(scale[1], exp_(splat(next.most[r] - most)));
    const Vec a = splat(scale[0][0]), b = splat(scale[1][0]);
    float *x = all.out + r * width, *y = next.out + r * width;
    for (int64_t c = 0; c < width; c += kLanes) store(x + c, fma(load(y + c), b, mul(load(x + c), a)));
    all.total[r] = next.total[r] * scale[1][0] + all.total[r] * scale[0][0];
    if (all.noise)
      all.noise[r] = next.noise[r] * scale[1][0] * scale[1][0] + all.noise[r] * scale[0][0] * scale[0][0];
    all.most[r] = most;
  }
}

inline void attend_none(const AttentionPart& part, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    part.most[r] = bits_to_f32(0xff800000u);
    part.total[r] = 0;
    if (part.noise) part.noise[r] = 0;
  }
  memset(part.out, 0, size_t(rows * width) * 4);
}

// y = sigmoid(gate) * out / total, zero for a query that sees no key. No proj, no gate.
void attend_end(const AttentionTask& t, const QueryTile& q, const AttentionPart& part) {
  const int64_t group = t.heads / t.kv_heads, bytes = t.proj_dtype == hm_f32 ? 4 : 2;
  const int64_t y_bytes = t.y_dtype == hm_f32 ? 4 : 2;
  alignas(64) float gate[kMostHeadDim], y[kMostHeadDim];
  for (int64_t r = 0; r < q.rows; ++r) {
    const int64_t row = q.b * t.proj_stride + q.first + r / group, h = q.g * group + r % group;
    const Vec share = splat(part.total[r] == 0 ? 0.0f : 1.0f / part.total[r]);
    const float* out = part.out + r * t.width;
    for (int64_t c = 0; c < t.width; c += kLanes) store(y + c, mul(load(out + c), share));
    if (t.proj) {
      const char* proj = static_cast<const char*>(t.proj) + (row * t.proj_width + (2 * h + 1) * t.d) * bytes;
      widen(proj, gate, t.d, Dtype(t.proj_dtype));
      for (int64_t c = t.d; c < t.width; ++c) gate[c] = 0;
      for (int64_t c = 0; c < t.width; c += kLanes) store(y + c, mul(load(y + c), sigmoid(load(gate + c))));
    }
    narrow(y, static_cast<char*>(t.y) + (row * t.heads + h) * t.d * y_bytes, t.d, Dtype(t.y_dtype));
  }
}

// Units: tiles of queries, each against all its keys.
void attention_tiles(const AttentionTask& t, const AttentionWork& work, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const QueryTile q = query_tile(t, u);
    const int64_t last = keys_end(t, q);
    attend_none(work.all, q.rows, t.width);
    for (int64_t k = t.start[q.b]; k < last; k += kBlockKeys) {
      attend_block(t, q, k, k + kBlockKeys < last ? k + kBlockKeys : last, work, work.next);
      attend_join(work.all, work.next, q.rows, t.width);
    }
    attend_end(t, q, work.all);
  }
}

// Units: tiles times blocks of keys (few tiles, long context); `parts` keeps every block's result.
void attention_parts(const AttentionTask& t, const AttentionWork& work, const AttentionPart* parts, int64_t begin,
                     int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const QueryTile q = query_tile(t, u / t.blocks);
    const int64_t last = keys_end(t, q), k = t.start[q.b] + u % t.blocks * kBlockKeys;
    if (k < last) attend_block(t, q, k, k + kBlockKeys < last ? k + kBlockKeys : last, work, parts[u]);
  }
}

// Units: tiles; joins what attention_parts left.
void attention_join(const AttentionTask& t, const AttentionWork& work, const AttentionPart* parts, int64_t begin,
                    int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const QueryTile q = query_tile(t, u);
    const int64_t last = keys_end(t, q);
    attend_none(work.all, q.rows, t.width);
    for (int64_t i = 0; i < t.blocks && t.start[q.b] + i * kBlockKeys < last; ++i)
      attend_join(work.all, parts[u * t.blocks + i], q.rows, t.width);
    attend_end(t, q, work.all);
  }
}

}  // namespace
}  // namespace hm
