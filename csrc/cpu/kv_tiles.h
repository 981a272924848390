// Tiles of integer codes (csrc/core/kv_codecs.h): 16 lanes x 32 terms as they lie in a page, and their exact
// products with rows of signed bytes:
//
//   sums[r, lane] = start[r] + sum over terms of level(code[lane, term]) * x[r, term]
//
// Lanes are tokens for scores and columns for values, so no sum ever crosses a register. All is integer:
// every ISA, and any order, gives the same numbers.
#pragma once

namespace hm {
namespace {

constexpr int kTileLanes = 16, kTileTerms = 32, kQuads = kTileTerms / 4;
static inline int64_t tile_bytes(int bits) { return bits * 64; }

// 16 sums and 16 x 4 levels, byte i of lane l at 4 l + i. kLevelOffset is added to every level. joined(): high * 128 + low.
#if HM_ISA_AVX512
using LaneSums = __m512i;
using Quad = __m512i;
constexpr int kLevelOffset = 128;  // vpdpbusd multiplies unsigned by signed
inline LaneSums splat_sums(int32_t s) { return _mm512_set1_epi32(s); }
inline void store_sums(int32_t* p, LaneSums s) { _mm512_storeu_si512(p, s); }
inline void store_floats(float* p, LaneSums s) { store(p, _mm512_cvtepi32_ps(s)); }
inline LaneSums joined(LaneSums high, LaneSums low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }
inline LaneSums add_dot(LaneSums s, Quad q, const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return _mm512_dpbusd_epi32(s, q, _mm512_set1_epi32(word));
}
inline Quad load_quad(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Quad plain_levels(Quad q) { return q; }
template <int S>
inline Quad shifted(Quad q) {  // bits from other bytes come along
  return S >= 0 ? _mm512_srli_epi16(q, unsigned(S)) : _mm512_slli_epi16(q, unsigned(-S));
}
inline Quad look_up(Quad table, Quad codes) { return _mm512_permutexvar_epi8(codes, table); }
inline Quad low_two(Quad low, Quad rest) {  // bits 0 and 1 of low, all others of rest
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low, rest, 0xCA);
}
#else
#if HM_ISA_AVX2
struct Half {
  __m256i v;
};
constexpr int kHalfBytes = 32;
inline Half half_load(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Half half_plain(Half h) { return {_mm256_xor_si256(h.v, _mm256_set1_epi8(-128))}; }
inline Half half_shift(Half h, int s) {
  return {s >= 0 ? _mm256_srli_epi16(h.v, s) : _mm256_slli_epi16(h.v, -s)};
}
inline Half half_look_up(Half t, Half c) {
  return {_mm256_shuffle_epi8(t.v, _mm256_and_si256(c.v, _mm256_set1_epi8(15)))};
}
inline Half half_low_two(Half low, Half rest) {
  const __m256i three = _mm256_set1_epi8(3);
  return {_mm256_or_si256(_mm256_and_si256(three, low.v), _mm256_andnot_si256(three, rest.v))};
}
using HalfSums = __m256i;
inline HalfSums half_splat(int32_t s) { return _mm256_set1_epi32(s); }
inline void half_store(int32_t* p, HalfSums s) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s); }
inline void half_floats(float* p, HalfSums s) { _mm256_storeu_ps(p, _mm256_cvtepi32_ps(s)); }
inline HalfSums half_joined(HalfSums high, HalfSums low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 7), low); }
// |level| * (x with level's sign): pairs stay below 2 * 127 * 127 < 2^15.
inline HalfSums half_dot(HalfSums s, Half h, int32_t word) {
  const __m256i x = _mm256_set1_epi32(word);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(h.v), _mm256_sign_epi8(x, h.v));
  return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif HM_ISA_NEON
struct Half {
  uint8x16_t v;
};
constexpr int kHalfBytes = 16;
inline Half half_load(const uint8_t* p) { return {vld1q_u8(p)}; }
inline Half half_plain(Half h) { return {veorq_u8(h.v, vdupq_n_u8(128))}; }
inline Half half_shift(Half h, int s) { return {vshlq_u8(h.v, vdupq_n_s8(int8_t(-s)))}; }
inline Half half_look_up(Half t, Half c) { return {vqtbl1q_u8(t.v, vandq_u8(c.v, vdupq_n_u8(15)))}; }
inline Half half_low_two(Half low, Half rest) { return {vbslq_u8(vdupq_n_u8(3), low.v, rest.v)}; }
using HalfSums = int32x4_t;
inline HalfSums half_splat(int32_t s) { return vdupq_n_s32(s); }
inline void half_store(int32_t* p, HalfSums s) { vst1q_s32(p, s); }
inline void half_floats(float* p, HalfSums s) { vst1q_f32(p, vcvtq_f32_s32(s)); }
inline HalfSums half_joined(HalfSums high, HalfSums low) { return vaddq_s32(vshlq_n_s32(high, 7), low); }
inline HalfSums half_dot(HalfSums s, Half h, int32_t word) {
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(word)), c = vreinterpretq_s8_u8(h.v);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(c), vget_low_s8(x)));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(c), vget_high_s8(x)));
  return vaddq_s32(s, vpaddq_s32(low, high));
}
#else
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int32_t HalfSums __attribute__((vector_size(16)));
struct Half {
  Bytes v;
};
constexpr int kHalfBytes = 16;
inline Half half_load(const uint8_t* p) {
  Half h;
  memcpy(&h.v, p, sizeof h.v);
  return h;
}
inline Half half_plain(Half h) { return {h.v ^ 128}; }
inline Half half_shift(Half h, int s) { return {s >= 0 ? h.v >> s : h.v << -s}; }
inline Half half_look_up(Half t, Half c) {
  uint8_t table[kHalfBytes], code[kHalfBytes];
  memcpy(table, &t.v, sizeof table);
  memcpy(code, &c.v, sizeof code);
  for (uint8_t& x : code) x = table[x & 15];
  return half_load(code);
}
inline Half half_low_two(Half low, Half rest) { return {(low.v & 3) | (rest.v & 252)}; }
inline HalfSums half_splat(int32_t s) { return HalfSums{s, s, s, s}; }
inline void half_store(int32_t* p, HalfSums s) { memcpy(p, &s, sizeof s); }
inline void half_floats(float* p, HalfSums s) {
  for (int l = 0; l < 4; ++l) p[l] = float(s[l]);
}
inline HalfSums half_joined(HalfSums high, HalfSums low) { return high * 128 + low; }
// Even and odd terms as 16 bits: two products stay below 2 * 127 * 127 < 2^15.
inline HalfSums half_dot(HalfSums s, Half h, int32_t word) {
  const Shorts c = Shorts(h.v), x = Shorts(half_splat(word));
  const HalfSums p = HalfSums(((c << 8) >> 8) * ((x << 8) >> 8) + (c >> 8) * (x >> 8));
  return s + ((p << 16) >> 16) + (p >> 16);
}
#endif
// A quad of 64 bytes as several registers.
constexpr int kHalves = 64 / kHalfBytes, kLevelOffset = 0;  // levels as they are
struct LaneSums {
  HalfSums v[kHalves];
};
struct Quad {
  Half v[kHalves];
};
template <class F>
inline Quad each_half(F f) {
  Quad q;
  for (int i = 0; i < kHalves; ++i) q.v[i] = f(i);
  return q;
}
inline LaneSums splat_sums(int32_t s) {
  LaneSums a;
  for (HalfSums& h : a.v) h = half_splat(s);
  return a;
}
inline void store_sums(int32_t* p, const LaneSums& s) {
  for (int i = 0; i < kHalves; ++i) half_store(p + i * (kTileLanes / kHalves), s.v[i]);
}
inline void store_floats(float* p, const LaneSums& s) {
  for (int i = 0; i < kHalves; ++i) half_floats(p + i * (kTileLanes / kHalves), s.v[i]);
}
inline LaneSums joined(const LaneSums& high, const LaneSums& low) {
  LaneSums a;
  for (int i = 0; i < kHalves; ++i) a.v[i] = half_joined(high.v[i], low.v[i]);
  return a;
}
inline LaneSums add_dot(LaneSums s, const Quad& q, const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  for (int i = 0; i < kHalves; ++i) s.v[i] = half_dot(s.v[i], q.v[i], word);
  return s;
}
inline Quad load_quad(const uint8_t* p) {
  return each_half([&](int i) { return half_load(p + i * kHalfBytes); });
}
inline Quad plain_levels(const Quad& q) {
  return each_half([&](int i) { return half_plain(q.v[i]); });
}
template <int S>
inline Quad shifted(const Quad& q) {
  return each_half([&](int i) { return half_shift(q.v[i], S); });
}
inline Quad look_up(const Quad& table, const Quad& codes) {
  return each_half([&](int i) { return half_look_up(table.v[i], codes.v[i]); });
}
inline Quad low_two(const Quad& low, const Quad& rest) {
  return each_half([&](int i) { return half_low_two(low.v[i], rest.v[i]); });
}
#endif

// Table of 2^B levels (8 bits need none), repeated: whatever lies above a code is looked at in vain.
template <int B>
inline Quad level_table() {
  alignas(64) uint8_t t[64] = {};
  if constexpr (B < 8)
    for (int i = 0; i < 64; ++i) t[i] = uint8_t(hm_kv_tables[B - 2].level[i & ((1 << B) - 1)] + kLevelOffset);
  return load_quad(t);
}

// Levels of terms 4 Q .. 4 Q + 3 of a tile.
template <int B, int Q>
inline Quad tile_quad(const uint8_t* tile, const Quad& table) {
  if constexpr (B == 8) return plain_levels(load_quad(tile + 64 * Q));
  if constexpr (B == 4) return look_up(table, shifted<Q % 2 * 4>(load_quad(tile + 64 * (Q / 2))));
  const Quad low = shifted<Q % 4 * 2>(load_quad(tile + 64 * (Q / 4)));
  if constexpr (B == 2) return look_up(table, low);
  return look_up(table, low_two(low, shifted<Q - 2>(load_quad(tile + 128))));
}

// Rows of bytes lie interleaved by fours, x[quad][G rows][4]: one after the other, as they are loaded.
// s[N b + r] += tile b times row r, for R rows and N tiles `apart` bytes from each other.
template <int B, int R, int G, int N, int Q = 0>
HM_INLINE void add_quads(const uint8_t* tile, int64_t apart, const Quad& table, const int8_t* x, LaneSums (&s)[N * R]) {
  if constexpr (Q < kQuads) {
    Quad q[N];
#pragma GCC unroll 4
    for (int b = 0; b < N; ++b) q[b] = tile_quad<B, Q>(tile + b * apart, table);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < N; ++b) s[b * R + r] = add_dot(s[b * R + r], q[b], x + (Q * G + r) * 4);
    add_quads<B, R, G, N, Q + 1>(tile, apart, table, x, s);
  }
}

// The same for `count` tiles side by side; each(), before every one.
template <int B, int R, int G, int N, class Each>
HM_INLINE void add_tiles(const uint8_t* tiles, int64_t count, int64_t apart, const Quad& table, const int8_t* x,
                      LaneSums (&s)[N * R], Each&& each) {
  for (int64_t i = 0; i < count; ++i) {
    each();
    add_quads<B, R, G, N>(tiles + i * tile_bytes(B), apart, table, x + i * kTileTerms * G, s);
  }
}

// Rows of n bytes, `stride` apart, to x[n / 4][group][4]; rows from `rows` on become zeros.
inline void interleave(const int8_t* from, int64_t stride, int64_t n, int64_t rows, int64_t group, int8_t* x) {
  for (int64_t r = 0; r < group; ++r)
    for (int64_t i = 0; i < n; i += 4)
      if (r < rows)
        memcpy(x + (i / 4 * group + r) * 4, from + r * stride + i, 4);
      else
        memset(x + (i / 4 * group + r) * 4, 0, 4);
}

// Where term t of a lane is in a tile: planes of 8, 4, 2 or (3 bits) 2 and 1 bits.
template <class F>
inline void tile_fields(int bits, F&& field) {
  for (int plane = 0, width = bits == 3 ? 2 : bits, shift = 0; shift < bits; plane += width * 64, shift += width, width = 1)
    for (int t = 0; t < kTileTerms; ++t) {
      const int q = t / 4, per = 8 / width;
      field(t, plane + q / per * 64 + t % 4, q % per * width, shift, (1 << width) - 1);
    }
}

// Codes [lane * lane_stride + term * term_stride] of a tile to its bytes.
inline void pack_tile(int bits, const uint8_t* codes, int64_t lane_stride, int64_t term_stride, uint8_t* tile) {
  memset(tile, 0, size_t(tile_bytes(bits)));
  tile_fields(bits, [&](int t, int byte, int at, int shift, int mask) {
    for (int l = 0; l < kTileLanes; ++l)
      tile[byte + 4 * l] |= uint8_t((codes[l * lane_stride + t * term_stride] >> shift & mask) << at);
  });
}

inline void unpack_tile(int bits, const uint8_t* tile, uint8_t* codes, int64_t lane_stride, int64_t term_stride) {
  tile_fields(bits, [&](int t, int byte, int at, int shift, int mask) {
    for (int l = 0; l < kTileLanes; ++l) {
      uint8_t& code = codes[l * lane_stride + t * term_stride];
      code = uint8_t((shift ? code : 0) | (tile[byte + 4 * l] >> at & mask) << shift);
    }
  });
}

}  // namespace
}  // namespace hm
