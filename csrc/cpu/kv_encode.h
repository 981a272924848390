// Pages of keys or values from f32 rows and back. Codecs h*: x' = (x - mean) * balance, n = |x'|,
//
//   v = H(signs * x') / n * kappa      code = number of midpoints below v      level = table[code]
//   scale = f16(n D kappa^2 / sum(v * level))      x' is scale / (kappa sqrt(D)) * H^-1(level)
//
// The scale makes <x', decoded x'> = |x'|^2. 8 bits: level = round(H(signs * x') / sqrt(D) / scale), scale =
// f16(max / 127). One rounding per operation and one order of additions, so every ISA stores the same bytes.
//
// Where the time goes: d log2 d additions and 2^bits comparisons a number, once per token: nothing beside a
// token's weights.
#pragma once

namespace hm {
namespace {

// x[i], x[i + 32], .. added in order, then halves of the 32 sums.
inline float lane_sum(const float* x, int64_t d) {
  float s[32];
  memcpy(s, x, sizeof s);
  for (int64_t i = 32; i < d; i += 32)
    for (int l = 0; l < 32; ++l) s[l] += x[i + l];
  for (int h = 16; h; h /= 2)
    for (int l = 0; l < h; ++l) s[l] += s[l + h];
  return s[0];
}

// y = H(signs * (x - mean) * balance), unscaled; centred: their squares. y may be x.
inline void kv_rotate(const KvSide& s, const float* x, float* y, float* squares) {
  for (int64_t i = 0; i < s.d; ++i) {
    float v = x[i];
    if (s.mean) v = v - s.mean[i];
    if (s.balance) v = v * s.balance[i];
    if (squares) squares[i] = v * v;
    y[i] = v * s.signs[i];
  }
  walsh_hadamard(y, s.d);
}

// x = H(signs) y / sqrt(d) undone of balance and mean; y is overwritten. `share` of the mean is added.
inline void kv_unrotate(const KvSide& s, float* y, float* x, float share) {
  const float root = float(1 / sqrt(double(s.d)));
  walsh_hadamard(y, s.d);
  for (int64_t i = 0; i < s.d; ++i) {
    float v = y[i] * root * s.signs[i];
    if (s.balance) v = v / s.balance[i];
    if (s.mean) v = v + s.mean[i] * share;
    x[i] = v;
  }
}

// Rounded to even and kept within 127; a NaN (rows too large for f32) becomes 127.
inline int to_level(float x) {
  x = x < 127 ? x : 127;
  return int(rintf(x > -127 ? x : -127));
}

// One row's codes and scale.
inline uint16_t kv_encode_row(const KvSide& s, const float* x, uint8_t* codes) {
  const int bits = hm_kv_bits(s.codec);
  alignas(64) float v[kMostHeadDim], t[kMostHeadDim];
  kv_rotate(s, x, v, t);
  if (bits == 8) {
    const float root = float(1 / sqrt(double(s.d)));
    float most = 0;
    for (int64_t i = 0; i < s.d; ++i) {
      v[i] = v[i] * root;
      const float size = fabsf(v[i]);
      most = size > most ? size : most;
    }
    float scale = most / 127;
    const uint16_t stored = f32_to_f16(scale < 65504 ? scale : 65504.0f);
    scale = f16_to_f32(stored);
    for (int64_t i = 0; i < s.d; ++i) {
      codes[i] = uint8_t(to_level(scale > 0 ? v[i] / scale : 0) + 128);
    }
    return stored;
  }
  const hm_kv_levels& k = hm_kv_tables[bits - 2];
  const float n = sqrtf(lane_sum(t, s.d)), inverse = n > 0 ? 1 / n : 0;
  memset(codes, 0, size_t(s.d));
  for (int64_t i = 0; i < s.d; ++i) v[i] = v[i] * inverse * k.kappa;
  for (int m = 0; m + 1 < 1 << bits; ++m) {
    const float middle = 0.5f * float(k.level[m] + k.level[m + 1]);
    for (int64_t i = 0; i < s.d; ++i) codes[i] = uint8_t(codes[i] + (middle < v[i]));
  }
  for (int64_t i = 0; i < s.d; ++i) t[i] = v[i] * float(k.level[codes[i]]);
  const float dot = lane_sum(t, s.d), all = float(s.d) * k.kappa * k.kappa;
  const float scale = n > 0 ? n * all / (dot > 0 ? dot : 1) : 0;
  return f32_to_f16(scale < 65504 ? scale : 65504.0f);
}

// Tiles of a page: lanes are tokens for keys, columns for values.
struct KvTiles {
  int bits;
  int64_t lane_blocks, chunks;            // of 16 lanes, of 32 terms
  int64_t lane_stride, term_stride;       // in codes u8[HM_KV_PAGE, d]
  explicit KvTiles(const KvSide& s)
      : bits(hm_kv_bits(s.codec)),
        lane_blocks((s.values ? s.d : HM_KV_PAGE) / kTileLanes),
        chunks((s.values ? HM_KV_PAGE : s.d) / kTileTerms),
        lane_stride(s.values ? 1 : s.d),
        term_stride(s.values ? s.d : 1) {}
  template <class F>
  void each(F&& f) const {
    for (int64_t b = 0; b < lane_blocks; ++b)
      for (int64_t c = 0; c < chunks; ++c)
        f((b * chunks + c) * tile_bytes(bits), b * kTileLanes * lane_stride + c * kTileTerms * term_stride);
  }
};

// x f32[HM_KV_PAGE, d] -> page. Rotated codecs: d is a power of two from 32 on.
inline void kv_store(const KvSide& s, const float* x, uint8_t* page) {
  if (!hm_kv_integer(s.codec)) return kv_peer_store(s, x, page);
  uint8_t codes[HM_KV_PAGE * kMostHeadDim];
  for (int64_t t = 0; t < HM_KV_PAGE; ++t) {
    const uint16_t scale = kv_encode_row(s, x + t * s.d, codes + t * s.d);
    memcpy(page + hm_kv_code_bytes(s.codec, s.d) + 2 * t, &scale, 2);
  }
  const KvTiles tiles(s);
  tiles.each([&](int64_t byte, int64_t code) {
    pack_tile(tiles.bits, codes + code, tiles.lane_stride, tiles.term_stride, page + byte);
  });
}

// The scales of a page's tokens as f32, times `unit`.
inline void kv_scales(const KvSide& s, const uint8_t* page, float unit, float* scale) {
  const uint16_t* stored = reinterpret_cast<const uint16_t*>(page + hm_kv_code_bytes(s.codec, s.d));
  for (int64_t t = 0; t < HM_KV_PAGE; t += kLanes) store(scale + t, mul(load_f16(stored + t), splat(unit)));
}

// A page's tokens in the codec's own basis, f32[HM_KV_PAGE, width].
inline void kv_load(const KvSide& s, const uint8_t* page, float* x, int64_t width) {
  if (!hm_kv_integer(s.codec)) return kv_peer_load(s, page, HM_KV_PAGE, x, width);
  uint8_t codes[HM_KV_PAGE * kMostHeadDim];
  float scale[HM_KV_PAGE];
  const KvTiles tiles(s);
  tiles.each([&](int64_t byte, int64_t code) {
    unpack_tile(tiles.bits, page + byte, codes + code, tiles.lane_stride, tiles.term_stride);
  });
  kv_scales(s, page, s.unit, scale);
  for (int64_t t = 0; t < HM_KV_PAGE; ++t)
    for (int64_t i = 0; i < width; ++i) {
      const uint8_t code = codes[t * s.d + (i < s.d ? i : 0)];
      const int level = tiles.bits == 8 ? code - 128 : hm_kv_tables[tiles.bits - 2].level[code];
      x[t * width + i] = i < s.d ? float(level) * scale[t] : 0;
    }
}

// Units: pages.
void kv_encode(const KvCodecTask& t, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p)
    kv_store(t.side, t.rows + p * HM_KV_PAGE * t.side.d, t.pages + p * t.side.page_bytes);
}

void kv_decode(const KvCodecTask& t, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    float* rows = t.rows + p * HM_KV_PAGE * t.side.d;
    kv_load(t.side, t.pages + p * t.side.page_bytes, rows, t.side.d);
    if (!hm_kv_rotated(t.side.codec)) continue;
    for (int64_t i = 0; i < HM_KV_PAGE; ++i) kv_unrotate(t.side, rows + i * t.side.d, rows + i * t.side.d, 1);
  }
}

}  // namespace
}  // namespace hm
