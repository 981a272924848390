// Attention of one token over its pages: scores, weights, sums of values, in parts that kv_join.cuh joins. A block has up to
// 8 query heads of a key head and a part: page 0 raw, the token's own page raw, or coded pages between them. Whatever the
// length, a part has a whole number of runs of 4 pages, and there are 128 parts at most, so a row's bits depend on nothing
// but its own sequence. Meaning: kv_ops.kv_attend.
#pragma once
#include "kv_page.cuh"
#include "kv_soften.cuh"

namespace hm {

constexpr uint PARTS = 128;  // of coded pages, at most: hadamoe.cuda_kv.PARTS
constexpr uint RAW_PARTS = 2;

// Pages of a part, where the pages before the token's own are 0 .. own - 1.
__device__ inline uint part_pages(uint own) { return (own + PARTS * RUN - 1) / (PARTS * RUN) * RUN; }
__device__ inline uint coded_parts(uint own) { return own < 2 ? 0 : (own + part_pages(own) - 1) / part_pages(own); }

// Codecs that a kernel is compiled for: one, beside 16-bit numbers, or all of them, which takes twice the registers.
constexpr int ANY = 99;
__host__ __device__ constexpr bool may_be(int compiled, int codec) { return compiled == ANY || compiled == codec; }

// Pages of one side of a sequence's key head: where page p is of a table or an array of its own; raw ones: one page.
struct Pages {
  const uint* base;
  const int* table;  // of the sequence
  uint words, groups, group, skip, codec;
  __device__ void raw(const void* rows, size_t word, int dtype) {
    base = static_cast<const uint*>(rows) + word, table = nullptr, words = 0, codec = raw_codec(dtype);
  }
  __device__ const uint* at(uint p) const {
    const size_t place = table ? size_t(table[p - skip]) * groups + group : size_t(p - skip);
    return base + place * words;
  }
};

// ---- scores
template <int D, class T>
__device__ __forceinline__ void store_scores(RunMemory<D>& m, uint unit, const Pages& keys, const uint* page, uint count,
                                    const T (*sums)[4]) {
  const uint lane = lane_index(), token = unit % 2 * 32 + lane / 4 * 4, head = lane % 4 * 2;
  const uint* scales = page + code_words(keys.codec, D);
  float scale[4];
  EACH(i, 4) {
    scale[i] = 1.0f;
    if (is_ours(keys.codec)) scale[i] = half_at(scales, token + i);
    if (is_turbo(keys.codec)) scale[i] = __uint_as_float(scales[token + i]);
  }
  EACH(h, 2) {
    float s[4];
    EACH(i, 4) {
      const float v = float(sums[i / 2][i % 2 * 2 + h]) * scale[i] * m.factors[head + h];
      s[i] = token + i < count ? v : -infinity();
    }
    float* to = m.scores + (head + h) * SCORE_ROW + unit / 2 * PAGE + token;
    *reinterpret_cast<float4*>(to) = make_float4(s[0], s[1], s[2], s[3]);
  }
}

template <int BITS, int D>
__device__ __forceinline__ void score_codes(RunMemory<D>& m, uint unit, const Pages& keys, const uint* page) {
  int sums[2][4];
  code_sums<BITS, D>(page, unit % 2, m.bytes + lane_index() / 4 * D, sums);
  store_scores<D>(m, unit, keys, page, PAGE, sums);
}
template <int BITS, int D>
__device__ __forceinline__ void score_numbers(RunMemory<D>& m, uint unit, const Pages& keys, const uint* page, uint count) {
  float sums[2][4];
  const Source source{page, m.book, int(keys.codec), 0, count};
  number_sums<BITS, D>(source, unit % 2, m.queries, sums);
  store_scores<D>(m, unit, keys, page, count, sums);
}
// 32 tokens of a page.
template <int D, int KEY>
__device__ __forceinline__ void score(RunMemory<D>& m, uint unit, const Pages& keys, const uint* page, uint count) {
  switch (keys.codec) {
    case kv_bf16:
    case kv_raw_f16: return score_numbers<16, D>(m, unit, keys, page, count);
    case kv_h2: if constexpr (may_be(KEY, kv_h2)) return score_codes<2, D>(m, unit, keys, page); break;
    case kv_h3: if constexpr (may_be(KEY, kv_h3)) return score_codes<3, D>(m, unit, keys, page); break;
    case kv_h4: if constexpr (may_be(KEY, kv_h4)) return score_codes<4, D>(m, unit, keys, page); break;
    case kv_h8: if constexpr (may_be(KEY, kv_h8)) return score_codes<8, D>(m, unit, keys, page); break;
  }
  if constexpr (KEY == ANY) {
    switch (code_bits(keys.codec)) {
      case 2: return score_numbers<2, D>(m, unit, keys, page, count);
      case 3: return score_numbers<3, D>(m, unit, keys, page, count);
      case 4: return score_numbers<4, D>(m, unit, keys, page, count);
      case 8: return score_numbers<8, D>(m, unit, keys, page, count);
      case 32: return score_numbers<32, D>(m, unit, keys, page, count);
    }
  }
}

// ---- values
// A run: pages begin .. end - 1, of which tokens from `count` on of the last are not there.
struct Span {
  uint begin, end, count;
  bool first;  // of its part
};

// What a thread has of a part's sum: columns 4 (lane / 4) + 2 i + e / 2 of its warp's 32, heads 2 (lane % 4) + e % 2.
using Sums = float[2][4];

template <int D>
__device__ __forceinline__ void soften_all(RunMemory<D>& m, bool first, bool ours, float worth, float (*o)[4]) {
  __syncthreads();
  for (uint head = warp_index(); head < 8; head += D / 32) soften(m, head, first, ours, worth);
  __syncthreads();
  EACH(i, 2) EACH(e, 4) o[i][e] = first ? 0.0f : o[i][e] * m.by[lane_index() % 4 * 2 + e % 2];
}

template <int BITS, int D>
__device__ __forceinline__ void weigh_codes(RunMemory<D>& m, const Span& span, const Pages& values, float worth, float (*o)[4]) {
  constexpr int AHEAD = BITS == 8 ? 2 : RUN;  // pages on their way while scores are softened
  Codes<BITS> codes[AHEAD];
  const uint lane = lane_index(), tiles = (2 * warp_index() + lane / 16) * 32 * BITS;
  EACH(p, AHEAD) {
    if (span.begin + p < span.end) codes[p].load(values.at(span.begin + p) + tiles);
  }
  soften_all(m, span.first, true, worth, o);
  EACH(p, RUN) {
    if (span.begin + p >= span.end) break;
    uint bytes[4];
    int high[2][4] = {}, low[2][4] = {};
    load_terms<BITS>(m.digits(p, lane / 4), bytes);
    add_products<BITS>(codes[p % AHEAD], bytes, high);
    load_terms<BITS>(m.digits(p, lane / 4) + PAGE, bytes);
    add_products<BITS>(codes[p % AHEAD], bytes, low);
    if (p + AHEAD < RUN && span.begin + p + AHEAD < span.end)
      codes[p % AHEAD].load(values.at(span.begin + p + AHEAD) + tiles);
    EACH(i, 2) EACH(e, 4) {
      const float unit = m.units[p * 8 + lane % 4 * 2 + e % 2];
      o[i][e] = fmaf(float(high[i][e] * 128 + low[i][e]), unit, o[i][e]);
    }
  }
}
template <int BITS, int D>
__device__ __forceinline__ void weigh_numbers(RunMemory<D>& m, const Span& span, const Pages& values, float (*o)[4]) {
  soften_all(m, span.first, false, 0.0f, o);
  for (uint p = span.begin; p < span.end; p++) {
    const Source source{values.at(p), m.book + 16, int(values.codec), 1, p + 1 < span.end ? PAGE : span.count};
    add_numbers<BITS, D>(source, m.shares() + (p - span.begin) * PAGE, 32 * warp_index(), o);
  }
}
template <int D, int VALUE>
__device__ __forceinline__ void weigh(RunMemory<D>& m, const Span& span, const Pages& values, float worth, float (*o)[4]) {
  switch (values.codec) {
    case kv_bf16:
    case kv_raw_f16: return weigh_numbers<16, D>(m, span, values, o);
    case kv_h2: if constexpr (may_be(VALUE, kv_h2)) return weigh_codes<2, D>(m, span, values, worth, o); break;
    case kv_h3: if constexpr (may_be(VALUE, kv_h3)) return weigh_codes<3, D>(m, span, values, worth, o); break;
    case kv_h4: if constexpr (may_be(VALUE, kv_h4)) return weigh_codes<4, D>(m, span, values, worth, o); break;
    case kv_h8: if constexpr (may_be(VALUE, kv_h8)) return weigh_codes<8, D>(m, span, values, worth, o); break;
  }
  if constexpr (VALUE == ANY) {
    switch (code_bits(values.codec)) {
      case 2: return weigh_numbers<2, D>(m, span, values, o);
      case 3: return weigh_numbers<3, D>(m, span, values, o);
      case 4: return weigh_numbers<4, D>(m, span, values, o);
      case 8: return weigh_numbers<8, D>(m, span, values, o);
      case 32: return weigh_numbers<32, D>(m, span, values, o);
    }
  }
}

// ---- a part
// Scales of a run's values. scale: of fp8.
template <int D>
__device__ inline void load_token_scales(RunMemory<D>& m, const Span& span, const Pages& values, float scale) {
  for (uint i = threadIdx.x; i < RUN * PAGE; i += D) {
    const uint p = span.begin + i / PAGE;
    float x = values.codec == kv_fp8 ? scale : 1.0f;
    if ((is_ours(values.codec) || is_turbo(values.codec)) && p < span.end) {
      const uint* scales = values.at(p) + code_words(values.codec, D);
      x = is_ours(values.codec) ? half_at(scales, i % PAGE) : __uint_as_float(scales[i % PAGE]);
    }
    m.token_scales[i] = x;
  }
}

template <int D, int KEY, int VALUE>
__device__ __forceinline__ void attend_run(RunMemory<D>& m, const Span& span, const Pages& keys, const Pages& values, float scale,
                                  float worth, float (*o)[4]) {
  load_token_scales(m, span, values, scale);
  for (uint unit = warp_index(); unit < 2 * RUN; unit += D / 32) {
    const uint p = span.begin + unit / 2;
    if (p < span.end) {
      score<D, KEY>(m, unit, keys, keys.at(p), p + 1 < span.end ? PAGE : span.count);
    } else {
      EACH(i, 8) m.scores[i * SCORE_ROW + unit * 32 + lane_index()] = -infinity();
    }
  }
  weigh<D, VALUE>(m, span, values, worth, o);
  __syncthreads();
}

// heads: how many of 8 there are; `part` has a place for each.
template <int D>
__device__ inline void store_part(const RunMemory<D>& m, uint heads, const float (*o)[4], float* parts, float4* sums) {
  EACH(h, 2) {
    const uint head = lane_index() % 4 * 2 + h, column = 32 * warp_index() + lane_index() / 4 * 4;
    if (head < heads)
      *reinterpret_cast<float4*>(parts + head * D + column) = make_float4(o[0][h], o[0][2 + h], o[1][h], o[1][2 + h]);
  }
  if (threadIdx.x < heads) sums[threadIdx.x] = make_float4(m.most[threadIdx.x], m.total[threadIdx.x], m.noise[threadIdx.x], 0.0f);
}

// q f32 [b, groups, heads, D], x, factors: of attention.cuh; table [b, m] and pages as kv_append has them; raw
// [2, b, groups, 192, D]; lengths [b]: tokens of each sequence, but for `more` of this call. Out: parts
// [b, groups, RAW_PARTS + gridDim.x - 4, heads, D], sums alike (most, total, noise, 0). A page that this token fills is
// encoded. Blocks: (page 0, own page, encoding of keys, of values, then coded parts; groups * ceil(heads / 8); b).
template <int D, int KEY, int VALUE>
struct kv_runs {
  static constexpr int THREADS = D, BLOCKS = KEY == ANY ? 1 : 512 / D;
  using Memory = RunMemory<D>;

  static __device__ void load_head(Memory& m, const void* queries, bool ours, size_t first, uint heads, const float* factors,
                                   const float* book) {
    if (ours) {
      const uint* from = static_cast<const uint*>(queries) + first * (D / 4);
      for (uint w = threadIdx.x; w < 2 * D; w += D)
        reinterpret_cast<uint*>(m.bytes)[w] = w < heads * (D / 4) ? from[w] : 0;
    } else {
      store_queries<D>(static_cast<const float*>(queries) + first * D, heads, m.queries);
    }
    const uint i = threadIdx.x;
    if (i < 8) m.factors[i] = i >= heads ? 0.0f : factors ? factors[first + i] : root_of(D);
    if (book && i < 32) m.book[i] = book[i];
    __syncthreads();
  }

  static __device__ void run(const float* q, const void* x, const float* factors, const void* raw, const int* table,
                             const float* key_signs, const float* value_signs, const float* book, const int* lengths,
                             const unsigned char* fixed_keys, const unsigned char* fixed_values, float* parts,
                             float* sums, unsigned char* key_pages, unsigned char* value_pages, int groups, int heads, int m_pages, int skip, int more, int key, int value, float key_scale,
                             float value_scale, float worth, int raw_dtype) {
    Memory& m = *shared_memory<Memory>();
    const uint eights = (heads + 7) / 8, g = blockIdx.y / eights, head = blockIdx.y % eights * 8, b = blockIdx.z;
    const uint seq = b * groups + g, first = seq * heads + head, part = blockIdx.x < 2 ? blockIdx.x : blockIdx.x - 2;
    const uint count = min_of(heads - head, 8);
    wait_for_previous();
    const uint length = lengths[b] + more, own = (length - 1) / PAGE;
    const int* places = table ? table + size_t(b) * m_pages : nullptr;
    const size_t raw_at = size_t(seq) * 3 * PAGE * D, values_at = size_t(gridDim.z) * groups * 3 * PAGE * D;
    const size_t array = table ? 0 : size_t(seq) * m_pages;
    const uint key_words = page_words(key, D), value_words = page_words(value, D);
    const uint* key_base = reinterpret_cast<const uint*>(fixed_keys ? fixed_keys : key_pages) + array * key_words;
    const uint* value_base = reinterpret_cast<const uint*>(fixed_values ? fixed_values : value_pages) + array * value_words;
    Pages keys{key_base, places, key_words, uint(groups), g, uint(skip), uint(key)};
    Pages values{value_base, places, value_words, uint(groups), g, uint(skip), uint(value)};

    if (blockIdx.x == 2 || blockIdx.x == 3) {
      if (own == 0 || length % PAGE || head || fixed_keys) return;
      const bool side = blockIdx.x == 3;
      const Side how{side ? value : key, int(side), side ? value_signs : key_signs, book + 16 * side,
                     side ? value_scale : key_scale};
      const PageRows rows(nullptr, 0, raw, raw_at + side * values_at + raw_slot(own) * PAGE * D, 0, raw_dtype);
      encode_page<D>(how, rows, const_cast<uint*>(side ? values.at(own) : keys.at(own)), shared_memory<unsigned char>());
      return;
    }
    const bool coded = blockIdx.x > 3;
    const uint each = part_pages(own);
    uint begin = coded ? (blockIdx.x - 4) * each : 0, end = coded ? min_of(begin + each, own) : 1, tokens = PAGE;
    if (coded ? own < 2 || begin >= own : blockIdx.x == 0 && own == 0) return;
    if (!coded) {
      const size_t at = raw_at + (blockIdx.x ? raw_slot(own) * PAGE * D : 0), words = raw_dtype == F32 ? 1 : 2;
      keys.raw(raw, at / words, raw_dtype), values.raw(raw, (at + values_at) / words, raw_dtype);
      if (blockIdx.x) tokens = length - own * PAGE;
    }
    load_head(m, coded ? x : q, is_ours(keys.codec), first, count, coded ? factors : nullptr, coded ? book : nullptr);
    Sums o;
    const uint from = begin;
    for (; begin < end; begin += RUN) {
      const Span span{coded && begin == 0 ? 1 : begin, min_of(begin + RUN, end), tokens, begin == from};
      attend_run<D, KEY, VALUE>(m, span, keys, values, value_scale, worth, o);
    }
    const size_t to = ((size_t(seq) * (gridDim.x - 2) + part) * heads + head);
    store_part<D>(m, count, o, parts + to * D, reinterpret_cast<float4*>(sums) + to);
  }
};

}  // namespace hm
