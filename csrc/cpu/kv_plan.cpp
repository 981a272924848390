#include "kv_plan.h"

#include <math.h>

#include <algorithm>

namespace hm {

KvSide kv_side(const Contract& c, int64_t codec, bool values) {
  c.require(codec >= 0 && codec < hm_kv_codecs, "codec",
            "is " + std::to_string(codec) + ", needs 0.." + std::to_string(hm_kv_codecs - 1));
  const int64_t d = c['d'];
  KvSide s{};
  s.codec = int(codec);
  s.values = values;
  s.d = d;
  s.scale = 1;
  s.unit = 1;
  c.require(d > 0 && d <= kMostHeadDim && d % 32 == 0, "d",
            "is " + std::to_string(d) + ", needs a multiple of 32 up to " + std::to_string(kMostHeadDim));
  const char* refused = hm_kv_refuses(s.codec, d);
  c.require(!refused, "d", "is " + std::to_string(d) + ", the codec needs " + (refused ? refused : ""));
  if (hm_kv_integer(s.codec) && s.codec != hm_kv_h8) {
    const hm_kv_levels& k = hm_kv_tables[hm_kv_bits(s.codec) - 2];
    s.unit = float(1 / sqrt(double(d))) / k.kappa;
    s.noise = k.error * (1 - k.error);
  }
  s.page_bytes = hm_kv_page_bytes(s.codec, d);
  return s;
}

KvArguments::KvArguments(Contract& c, const DLTensor* in, const DLTensor* out, const int64_t* ints) {
  const char *raw[] = {"raw_keys", "raw_values"}, *pages[] = {"key_pages", "value_pages"};
  const char* signs[] = {"key_signs", "value_signs"};
  for (int i = 0; i < 2; ++i) c.shape(raw[i], out[i], "bgsud").dtype(raw[i], out[i], "f32 f16 bf16 u16");
  c.dtype(raw[1], out[1], dtype_name(out[0].dtype));
  c.require(c['s'] == 3 && c['u'] == HM_KV_PAGE, raw[0],
            "has s=" + std::to_string(c['s']) + " u=" + std::to_string(c['u']) + ", needs 3 slots of 64 tokens");
  const DLTensor &length = in[0], &count = in[1], &table = in[2], &vectors = in[5], &scales = in[6];
  c.shape("lengths", length, "b").dtype("lengths", length, "i64");
  c.shape("counts", count, "b").dtype("counts", count, "i64");
  c.shape("table", table, "bm").dtype("table", table, "i32");
  KvSide* sides[] = {&task.key, &task.value};
  for (int i = 0; i < 2; ++i) {
    KvSide& side = *sides[i] = kv_side(c, ints[i], i);
    c.bind(pages[i], "no"[i], side.page_bytes).shape(pages[i], out[2 + i], i ? "pgo" : "pgn");
    c.dtype(pages[i], out[2 + i], "u8");
    if (present(in[3 + i])) {
      c.shape(signs[i], in[3 + i], "d").dtype(signs[i], in[3 + i], "f32");
      side.signs = reinterpret_cast<const float*>(data(in[3 + i]));
    }
    c.require(side.signs || !hm_kv_rotated(side.codec), signs[i], "is absent, needs f32[d] for a codec that rotates");
  }
  if (present(vectors)) {
    c.bind("vectors", 'v', 4).shape("vectors", vectors, "vgd").dtype("vectors", vectors, "f32");
    c.require(hm_kv_integer(task.key.codec) && hm_kv_integer(task.value.codec), "vectors",
              "belong to codecs h2, h3, h4 and h8");
    task.vectors = reinterpret_cast<const float*>(data(vectors));
  }
  if (present(scales)) {
    c.bind("scales", 'z', 2).shape("scales", scales, "z").dtype("scales", scales, "f32");
    for (int i = 0; i < 2; ++i) {
      sides[i]->scale = reinterpret_cast<const float*>(data(scales))[i];
      c.require(sides[i]->scale > 0 && isfinite(sides[i]->scale), "scales", "needs positive numbers");
    }
  }
  c.require(ints[2] >= 0, "window", "is " + std::to_string(ints[2]) + ", needs 0 (all pages) or more");
  lengths = reinterpret_cast<const int64_t*>(data(length));
  counts = reinterpret_cast<const int64_t*>(data(count));
  raw_keys = data(out[0]);
  raw_values = data(out[1]);
  key_pages = reinterpret_cast<uint8_t*>(data(out[2]));
  value_pages = reinterpret_cast<uint8_t*>(data(out[3]));
  places = c['p'];
  task.key_pages = key_pages;
  task.value_pages = value_pages;
  task.table = reinterpret_cast<const int32_t*>(data(table));
  task.table_width = c['m'];
  task.window = ints[2];
  AttentionTask& a = task.raw;
  a.cache_dtype = out[0].dtype.code == kDLUInt ? hm_bf16 : storage(out[0]);
  a.batch = c['b'];
  a.kv_heads = c['g'];
  a.d = c['d'];
  a.width = (a.d + 15) / 16 * 16;
  a.scale = 1;  // queries are rotated first
  task.scale = float(1 / sqrt(double(a.d)));
}

void KvArguments::check_tables(const Contract& c, int64_t tokens, bool append) const {
  constexpr int64_t kMost = int64_t(1) << 40;
  for (int64_t b = 0; b < task.raw.batch; ++b) {
    const std::string at = "[" + std::to_string(b) + "] ";
    c.require(counts[b] >= 0 && counts[b] <= tokens, "counts",
              at + "is " + std::to_string(counts[b]) + ", needs 0.." + std::to_string(tokens));
    const int64_t least = append ? 0 : counts[b];
    c.require(lengths[b] >= least && lengths[b] <= kMost, "lengths",
              at + "is " + std::to_string(lengths[b]) + ", needs " + std::to_string(least) + ".." + std::to_string(kMost));
    if (!counts[b]) continue;
    const int64_t from = lengths[b] - (append ? 0 : counts[b]), end = from + counts[b];
    c.require(append || from / HM_KV_PAGE + 1 >= (end - 1) / HM_KV_PAGE, "counts",
              at + "is " + std::to_string(counts[b]) + ", needs tokens of the last two pages");
    const int64_t page = from / HM_KV_PAGE;
    const int64_t first = std::max<int64_t>(1, task.window ? page - task.window : 1);
    for (int64_t p = first; p < (append ? end : end - 1) / HM_KV_PAGE; ++p) {
      c.require(p < task.table_width, "table",
                "has m=" + std::to_string(task.table_width) + ", needs a place for page " + std::to_string(p));
      const int32_t place = task.table[b * task.table_width + p];
      c.require(place >= 0 && place < places, "table",
                "has " + std::to_string(place) + " for page " + std::to_string(p) + " of sequence " + std::to_string(b) +
                    ", needs 0.." + std::to_string(places - 1));
    }
  }
}

}  // namespace hm
