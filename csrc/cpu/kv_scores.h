// The integers behind scores by themselves (page_scores in kv_attend.h): the same on every machine, so that
// backends can be held to each other.
#pragma once

namespace hm {
namespace {

template <int B>
inline void all_scores(const KvScoresTask& t, int64_t rows, const int8_t* x, const int32_t* start, int32_t* out) {
  const Quad table = level_table<B>();
  for (int64_t p = 0; p < t.count; ++p)
    page_scores<B>(t.pages + p * t.side.page_bytes, t.side.d, table, x, start, Ahead{},
                   [&](int64_t token, int i, const LaneSums& sums) {
                     if (i < rows) store_sums(out + (i * t.count + p) * HM_KV_PAGE + token, sums);
                   });
}

void kv_scores(const KvScoresTask& t) {
  const int64_t d = t.side.d;
  alignas(64) int8_t x[kSumRows * kMostHeadDim];
  for (int64_t r = 0; r < t.rows; r += kSumRows) {
    const int64_t rows = t.rows - r < kSumRows ? t.rows - r : kSumRows;
    int32_t start[kSumRows] = {}, *out = t.scores + r * t.count * HM_KV_PAGE;
    for (int64_t i = r; i < r + rows; ++i) {
      t.unit[i] = kv_query_row(t.side, t.q + i * d, t.q8 + i * d);
      start[i - r] = -kLevelOffset * byte_sum(t.q8 + i * d, d);
    }
    interleave(t.q8 + r * d, d, d, rows, kSumRows, x);
    switch (hm_kv_bits(t.side.codec)) {
      case 2: all_scores<2>(t, rows, x, start, out); break;
      case 3: all_scores<3>(t, rows, x, start, out); break;
      case 4: all_scores<4>(t, rows, x, start, out); break;
      default: all_scores<8>(t, rows, x, start, out);
    }
  }
}

}  // namespace
}  // namespace hm
