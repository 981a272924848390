// Attention over a cache of 64-token pages: page 0 and a query's own page as they are, those between as
// stored. For integer codecs (h*), with q8 the rotated query as signed bytes and w = e^(s - m) * scale of a
// value as 14 bits of the page's largest:
//
//   s[r, t] = (q8[r] . level[t]) * scale[t] * factor[r]        o[r] = sum of unit[r, page] * (w[r] . level)
//
// both dots exact integers. o stays in the rotated basis until all pages are joined, one transform a head.
//
// Where the time goes: a decoded token reads every page once for all rows of its group, and does 12 byte
// products of 64 for each row and token (d = 256: 4 for the score, 8 for the value). 8 pages make a run with one
// maximum; runs are joined in order, then page 0, then the own page: bits depend on neither threads nor tiles.
//
//   scores f32[rows, 512]  ->  weights i8[rows, high | low, 512]  ->  o f32[rows, d], most, total, noise
#pragma once

namespace hm {
namespace {

// Integer sums kept in registers: rows times blocks of 16 tokens; high and low halves of rows.
#if HM_ISA_AVX512
constexpr int kScoreSums = 8, kScoreBlocks = 2, kValueSums = 16;
#elif HM_ISA_GENERIC
constexpr int kScoreSums = 8, kScoreBlocks = 1, kValueSums = 16;  // too many, but looking levels up costs more
#else
constexpr int kScoreSums = 4, kScoreBlocks = 1, kValueSums = 4;
#endif
constexpr int kWeightBits = 14, kWeightMost = (1 << kWeightBits) - 1;

inline KvSide side_of(const KvTask& t, bool values, int64_t g) {
  KvSide s = values ? t.value : t.key;
  if (!t.vectors) return s;
  const float* mean = t.vectors + ((values ? 2 : 0) * t.raw.kv_heads + g) * s.d;
  s.mean = mean;
  s.balance = mean + t.raw.kv_heads * s.d;
  return s;
}

// Units: tokens of the batch. Queries to raw.q, keys and values to the raw rows.
void kv_take(const KvTask& t, int64_t begin, int64_t end) {
  const AttentionTask& a = t.raw;
  const int64_t group = a.heads / a.kv_heads, bytes = a.proj_dtype == hm_f32 ? 4 : 2;
  const int64_t cached = a.cache_dtype == hm_f32 ? 4 : 2;
  alignas(64) float x[kMostHeadDim];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / a.tokens, i = u % a.tokens, token = b * a.proj_stride + i;
    if (i < a.skip[b]) continue;
    for (int64_t h = 0; h < a.heads && t.q_in; ++h) {
      float* q = a.q + (((b * a.kv_heads + h / group) * a.tokens + i) * group + h % group) * a.width;
      widen(static_cast<const char*>(t.q_in) + (token * a.heads + h) * a.d * bytes, q, a.d, Dtype(a.proj_dtype));
      for (int64_t c = a.d; c < a.width; ++c) q[c] = 0;
    }
    for (int64_t g = 0; g < a.kv_heads && t.k_in; ++g) {
      const int64_t from = (token * a.kv_heads + g) * a.d * bytes;
      const int64_t to = ((b * a.kv_heads + g) * a.capacity + a.at[b] + i) * a.d * cached;
      widen(static_cast<const char*>(t.k_in) + from, x, a.d, Dtype(a.proj_dtype));
      narrow(x, static_cast<char*>(a.keys) + to, a.d, Dtype(a.cache_dtype));
      widen(static_cast<const char*>(t.v_in) + from, x, a.d, Dtype(a.proj_dtype));
      narrow(x, static_cast<char*>(a.values) + to, a.d, Dtype(a.cache_dtype));
    }
  }
}

// A full page's raw rows [HM_KV_PAGE, d] to its bytes.
void kv_seal(const KvTask& t, int64_t g, bool values, const void* rows, uint8_t* page) {
  alignas(64) float x[HM_KV_PAGE * kMostHeadDim];
  widen(rows, x, HM_KV_PAGE * t.raw.d, Dtype(t.raw.cache_dtype));
  kv_store(side_of(t, values, g), x, page);
}

// r = H(signs * q / balance) / sqrt(d): q in the basis of the keys' codes.
inline void rotate_query(const KvSide& s, const float* q, float* r) {
  const float root = float(1 / sqrt(double(s.d)));
  for (int64_t i = 0; i < s.d; ++i) r[i] = (s.balance ? q[i] / s.balance[i] : q[i]) * s.signs[i];
  walsh_hadamard(r, s.d);
  for (int64_t i = 0; i < s.d; ++i) r[i] = r[i] * root;
}

// The rotated query as bytes; returns their unit, max / 127.
inline float kv_query_row(const KvSide& s, const float* q, int8_t* q8) {
  alignas(64) float r[kMostHeadDim];
  rotate_query(s, q, r);
  float most = 0;
  for (int64_t i = 0; i < s.d; ++i) {
    const float size = fabsf(r[i]);
    most = size > most ? size : most;
  }
  const float unit = most > 0 ? most / 127 : 1;
  for (int64_t i = 0; i < s.d; ++i) q8[i] = int8_t(to_level(r[i] / unit));
  return unit;
}

inline int32_t byte_sum(const int8_t* x, int64_t n) {
  int32_t s = 0;
  for (int64_t i = 0; i < n; ++i) s += x[i];
  return s;
}

// Units: query rows, [batch, kv_heads, tokens, group].
void kv_query(const KvTask& t, int64_t begin, int64_t end) {
  const AttentionTask& a = t.raw;
  const int64_t per_head = a.tokens * (a.heads / a.kv_heads);
  for (int64_t u = begin; u < end; ++u) {
    float* q = a.q + u * a.width;
    const KvSide s = side_of(t, false, u / per_head % a.kv_heads);
    if (hm_kv_integer(s.codec)) {
      const float unit = kv_query_row(s, q, t.q8 + u * a.d);
      float shift = 0;
      for (int64_t i = 0; i < a.d && s.mean; ++i) shift += q[i] * s.mean[i];
      t.query[u] = {unit * s.unit * t.scale, shift * t.scale, -kLevelOffset * byte_sum(t.q8 + u * a.d, a.d)};
    } else if (hm_kv_rotated(s.codec)) {
      float* r = t.turned + u * a.width;
      rotate_query(s, q, r);
      for (int64_t i = 0; i < a.width; ++i) r[i] = i < a.d ? r[i] * t.scale : 0;
    }
    for (int64_t i = 0; i < a.d; ++i) q[i] = q[i] * t.scale;
  }
}

// Bytes to be in cache soon, a share of them at each call of next(). Values are read 16 columns of all pages at a
// time and pages lie anywhere, which no processor foresees.
struct Ahead {
  const uint8_t* at[2] = {};
  int64_t bytes[2] = {}, step[2] = {};
  void share(int64_t shares) {
    for (int i = 0; i < 2; ++i) step[i] = (bytes[i] + shares * 64 - 1) / (shares * 64) * 64;
  }
  void next() {
    for (int i = 0; i < 2; ++i) {
      for (int64_t b = 0; b < step[i] && b < bytes[i]; b += 64) __builtin_prefetch(at[i] + b, 0, 2);
      at[i] += step[i];
      bytes[i] -= step[i];
    }
  }
};

// The pages of a run that a tile sees.
struct KvPages {
  int64_t count = 0;
  const uint8_t *key[kRunPages], *value[kRunPages];
  KvPages(const KvTask& t, const KvTile& q, int64_t run) {
    const int64_t end = (run + 1) * kRunPages < q.page ? (run + 1) * kRunPages : q.page;
    for (int64_t p = run * kRunPages > q.from ? run * kRunPages : q.from; p < end; ++p, ++count) {
      const int64_t at = int64_t(t.table[q.b * t.table_width + p]) * t.raw.kv_heads + q.g;
      key[count] = t.key_pages + at * t.key.page_bytes;
      value[count] = t.value_pages + at * t.value.page_bytes;
    }
  }
  // What to fetch during the scores of page p: its values, and the next keys.
  Ahead ahead(const KvTask& t, int64_t p) const {
    const bool more = p + 1 < count;
    return {{value[p], more ? key[p + 1] : nullptr}, {t.value.page_bytes, more ? t.key.page_bytes : 0}, {}};
  }
};

// sink(first token of the page, row, sums) for kSumRows interleaved rows against one page.
template <int B, class Sink>
inline void page_scores(const uint8_t* page, int64_t d, const Quad& table, const int8_t* x, const int32_t* start,
                        Ahead ahead, Sink&& sink) {
  const int64_t block = d / kTileTerms * tile_bytes(B);
  ahead.share(HM_KV_PAGE / (kScoreBlocks * kTileLanes) * (kSumRows / kScoreSums) * (d / kTileTerms));
  for (int64_t t = 0; t < HM_KV_PAGE; t += kScoreBlocks * kTileLanes)
    for (int r = 0; r < kSumRows; r += kScoreSums) {
      LaneSums s[kScoreBlocks * kScoreSums];
#pragma GCC unroll 16
      for (int i = 0; i < kScoreBlocks * kScoreSums; ++i) s[i] = splat_sums(start[r + i % kScoreSums]);
      add_tiles<B, kScoreSums, kSumRows, kScoreBlocks>(page + t / kTileLanes * block, d / kTileTerms, block, table,
                                                       x + 4 * r, s, [&] { ahead.next(); });
#pragma GCC unroll 16
      for (int i = 0; i < kScoreBlocks * kScoreSums; ++i)
        sink(t + i / kScoreSums * kTileLanes, r + i % kScoreSums, s[i]);
    }
}

template <int B>
void integer_scores(const KvTask& t, const KvTile& q, const KvPages& pages, const KvWork& work) {
  const Quad table = level_table<B>();
  const int64_t d = t.key.d;
  alignas(64) int8_t x[kSumRows * kMostHeadDim];
  int32_t start[kSumRows];
  for (int64_t r = 0; r < q.rows; r += kSumRows) {
    const KvQuery* query = t.query + q.row + r;
    interleave(t.q8 + (q.row + r) * d, d, d, kSumRows, kSumRows, x);
    for (int i = 0; i < kSumRows; ++i) start[i] = query[i].start;
    for (int64_t p = 0; p < pages.count; ++p) {
      const float* scale = work.key_scale + p * HM_KV_PAGE;
      page_scores<B>(pages.key[p], d, table, x, start, r ? Ahead{} : pages.ahead(t, p), [&](int64_t token, int i, const LaneSums& sums) {
        float* out = work.scores + (r + i) * kRunKeys + p * HM_KV_PAGE + token;
        alignas(64) float s[kTileLanes];
        store_floats(s, sums);
        const Vec factor = splat(query[i].factor), shift = splat(query[i].shift);
        for (int l = 0; l < kTileLanes; l += kLanes)
          store(out + l, fma(mul(load(s + l), load(scale + token + l)), factor, shift));
      });
    }
  }
}

inline void coded_scores(const KvTask& t, const KvTile& q, const KvPages& pages, const KvWork& work) {
  if (hm_kv_integer(t.key.codec)) {
    for (int64_t p = 0; p < pages.count; ++p)
      kv_scales(t.key, pages.key[p], 1, work.key_scale + p * HM_KV_PAGE);
    switch (hm_kv_bits(t.key.codec)) {
      case 2: return integer_scores<2>(t, q, pages, work);
      case 3: return integer_scores<3>(t, q, pages, work);
      case 4: return integer_scores<4>(t, q, pages, work);
      default: return integer_scores<8>(t, q, pages, work);
    }
  }
  const float* rows = (hm_kv_rotated(t.key.codec) ? t.turned : t.raw.q) + q.row * t.raw.width;
  for (int64_t p = 0; p < pages.count; ++p) {
    Ahead ahead = pages.ahead(t, p);
    ahead.share(1);
    ahead.next();
    kv_peer_load(t.key, pages.key[p], HM_KV_PAGE, work.copy, t.raw.width);
    block_scores(rows, q.rows, work.copy, t.raw.width, HM_KV_PAGE, work.scores + p * HM_KV_PAGE, kRunKeys);
  }
}

// A row's softened scores of one page times the values' scales, as 14 bits of the largest; returns their unit.
// x: [token / 4][row, high | low][4].
inline float page_weights(const float* p, const float* scale, int8_t* x, float* noise, int32_t* start) {
  alignas(64) float w[HM_KV_PAGE];
  Vec top = zero(), squares = zero();
  for (int t = 0; t < HM_KV_PAGE; t += kLanes) {
    const Vec x = mul(load(p + t), load(scale + t));
    store(w + t, x);
    top = max_(top, x);
    squares = fma(x, x, squares);
  }
  const float most = max_of(top);
  *noise += sum(squares);
  const float by = most > 1e-30f ? kWeightMost / most : 0;
  int8_t high[HM_KV_PAGE], low[HM_KV_PAGE];
  int32_t sums = 0;  // of high in the upper half, of low in the lower: both below 2^14
  for (int t = 0; t < HM_KV_PAGE; ++t) {
    const float v = w[t] * by + 0.5f;
    const int32_t n = int32_t(v < kWeightMost ? v : kWeightMost);
    high[t] = int8_t(n >> 7);
    low[t] = int8_t(n & 127);
    sums += (n >> 7 << 16) + (n & 127);
  }
  for (int t = 0; t < HM_KV_PAGE; t += 4) {
    memcpy(x + t * 2 * kSumRows, high + t, 4);
    memcpy(x + t * 2 * kSumRows + 4, low + t, 4);
  }
  start[0] = -kLevelOffset * (sums >> 16);
  start[kRunPages] = -kLevelOffset * (sums & 0xffff);
  return most > 1e-30f ? most / kWeightMost : 0;
}

// Scores to weights; most, total and noise of every row.
inline void coded_weights(const KvTask& t, const KvTile& q, const KvPages& pages, const KvWork& work,
                          const AttentionPart& part) {
  const int64_t n = pages.count * HM_KV_PAGE;
  const bool integer = hm_kv_integer(t.value.codec);
  if (integer)
    for (int64_t p = 0; p < pages.count; ++p)
      kv_scales(t.value, pages.value[p], 1, work.value_scale + p * HM_KV_PAGE);
  for (int64_t r = 0; r < q.rows; ++r) {
    float* s = work.scores + r * kRunKeys;
    soften(s, nullptr, n, n, part.most + r, part.total + r);
    part.noise[r] = 0;
    for (int64_t p = 0; p < pages.count && integer; ++p) {
      int8_t* x = work.weights + ((r / kSumRows * kRunPages + p) * HM_KV_PAGE * kSumRows + r % kSumRows * 4) * 2;
      work.unit[r * kRunPages + p] = page_weights(s + p * HM_KV_PAGE, work.value_scale + p * HM_KV_PAGE, x,
                                                  part.noise + r, work.start + 2 * r * kRunPages + p) *
                                     t.value.unit;
    }
  }
  const int64_t whole = (q.rows + kSumRows - 1) / kSumRows * kSumRows;  // rows behind the last are summed, not used
  memset(work.start + 2 * q.rows * kRunPages, 0, size_t(2 * (whole - q.rows) * kRunPages) * sizeof(int32_t));
}

// 16 columns of kValueSums / 2 rows over all pages of a run.
template <int B>
inline void tile_values(const KvPages& pages, int64_t column, const Quad& table, const int8_t* weights,
                        const int32_t* start, const float* unit, float* out, int64_t width) {
  constexpr int kRows = kValueSums / 2;
  const int64_t at = column / kTileLanes * (HM_KV_PAGE / kTileTerms) * tile_bytes(B);
  for (int64_t p = 0; p < pages.count; ++p) {
    LaneSums s[kValueSums];
#pragma GCC unroll 16
    for (int i = 0; i < kValueSums; ++i) s[i] = splat_sums(start[i * kRunPages + p]);
    add_tiles<B, kValueSums, 2 * kSumRows, 1>(pages.value[p] + at, HM_KV_PAGE / kTileTerms, 0, table,
                                              weights + p * HM_KV_PAGE * 2 * kSumRows, s, [] {});
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      alignas(64) float x[kTileLanes];
      store_floats(x, joined(s[2 * r], s[2 * r + 1]));
      const Vec by = splat(unit[r * kRunPages + p]);
      float* o = out + r * width + column;
      for (int l = 0; l < kTileLanes; l += kLanes)
        store(o + l, p ? fma(load(x + l), by, load(o + l)) : mul(load(x + l), by));
    }
  }
}

template <int B>
void integer_values(const KvTask& t, const KvTile& q, const KvPages& pages, const KvWork& work, float* out) {
  const Quad table = level_table<B>();
  for (int64_t c = 0; c < t.value.d; c += kTileLanes)
    for (int64_t r = 0; r < q.rows; r += kValueSums / 2)
      tile_values<B>(pages, c, table,
                     work.weights + (r / kSumRows * kRunPages * HM_KV_PAGE * kSumRows + r % kSumRows * 4) * 2,
                     work.start + 2 * r * kRunPages, work.unit + r * kRunPages, out + r * t.raw.width, t.raw.width);
}

inline void coded_values(const KvTask& t, const KvTile& q, const KvPages& pages, const KvWork& work, float* out) {
  switch (hm_kv_integer(t.value.codec) ? hm_kv_bits(t.value.codec) : 0) {
    case 2: return integer_values<2>(t, q, pages, work, out);
    case 3: return integer_values<3>(t, q, pages, work, out);
    case 4: return integer_values<4>(t, q, pages, work, out);
    case 8: return integer_values<8>(t, q, pages, work, out);
  }
  const int64_t width = t.raw.width;
  float* page = work.attention.next.out;  // [rows, width], free until raw pages
  memset(out, 0, size_t(q.rows * width) * 4);
  for (int64_t p = 0; p < pages.count; ++p) {
    kv_peer_load(t.value, pages.value[p], HM_KV_PAGE, work.copy, width);
    block_values(work.scores + p * HM_KV_PAGE, kRunKeys, q.rows, work.copy, width, HM_KV_PAGE, page);
    for (int64_t i = 0; i < q.rows * width; i += kLanes) store(out + i, add(load(out + i), load(page + i)));
  }
}

// One run of coded pages against a tile.
void kv_run(const KvTask& t, const KvTile& q, int64_t run, const KvWork& work, const AttentionPart& part) {
  const KvPages pages(t, q, run);
  if (!pages.count) return attend_none(part, q.rows, t.raw.width);
  coded_scores(t, q, pages, work);
  coded_weights(t, q, pages, work, part);
  coded_values(t, q, pages, work, part.out);
}

// raw <- raw joined with the coded part: Wiener's factor, rotation undone, the mean's share added.
inline void join_coded(const KvTask& t, const KvTile& q, const AttentionPart& raw, const AttentionPart& coded) {
  const KvSide side = side_of(t, true, q.g);
  const int64_t d = side.d;
  for (int64_t r = 0; r < q.rows; ++r) {
    float* o = coded.out + r * t.raw.width;
    if (coded.total[r] == 0 || !hm_kv_rotated(side.codec)) continue;
    if (side.noise > 0) {
      Vec squares = zero();
      for (int64_t i = 0; i < d; i += kLanes) squares = fma(load(o + i), load(o + i), squares);
      const float all = sum(squares), kept = all > 0 ? 1 - side.noise * coded.noise[r] / all : 0;
      for (int64_t i = 0; i < d; i += kLanes) store(o + i, mul(load(o + i), splat(kept > 0 ? kept : 0)));
    }
    kv_unrotate(side, o, o, coded.total[r]);
  }
  attend_join(raw, coded, q.rows, t.raw.width);
}

// A tile's runs (computed here unless `runs` has them), then page 0 and the own page, then the result.
void kv_finish(const KvTask& t, const KvTile& q, const KvWork& work, const AttentionPart* runs) {
  const AttentionTask& a = t.raw;
  const int64_t width = a.width, count = (q.page + kRunPages - 1) / kRunPages;
  attend_none(work.all, q.rows, width);
  for (int64_t i = q.from / kRunPages; i < count; ++i) {
    if (!runs) kv_run(t, q, i, work, work.next);
    attend_join(work.all, runs ? runs[i] : work.next, q.rows, width);
  }
  const QueryTile tile{q.b, q.g, q.first, q.last, q.rows, a.q + q.row * width};
  const AttentionPart &all = work.attention.all, &next = work.attention.next;
  attend_none(all, q.rows, width);
  join_coded(t, q, all, work.all);
  if (q.page > 0) {
    attend_block(t.sink, tile, 0, HM_KV_PAGE, work.attention, next);
    attend_join(all, next, q.rows, width);
  }
  attend_block(a, tile, q.raw, a.limit[q.b * a.tokens + q.last - 1], work.attention, next);
  attend_join(all, next, q.rows, width);
  attend_end(a, tile, all);
}

}  // namespace
}  // namespace hm
