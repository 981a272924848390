// Tokens as AVX-512's qmatmul reads them: 24-bit fixed point in three signed bytes, x = 2^16 h + 2^8 m + l, in
// units of a power of two for each 128 columns. The unit is the smallest that holds the block's largest number,
// so x is off by at most 1/8355711 of that, as of f32 (verify/bounds.py). One unit for a whole token would not do,
// real ones have columns 10 to 100 times the rest.
//
// A kernel multiplies one byte of 4 codes at a time, so planes lie as dwords of 4 columns, h m l side by side:
//
//   layout v (V = 2^v vectors of codes unpacked from one vector of words, 4 V codes to a word):
//   [word][vector s < V][h m l][4]: byte i is column 4 V * word + V * i + s
#pragma once

namespace hm {
namespace {

constexpr int kFixedBlock = 128;  // columns under one unit

// For each layout and each of the three vectors that 64 columns become: byte i comes from column `from[i]` of
// h, of m (64 more), or of l where the bit of `low` is set.
struct Interleave {
  uint8_t from[3][3][64] = {};
  uint64_t low[3][3] = {};
  constexpr Interleave() {
    for (int layout = 0; layout < 3; ++layout)
      for (int b = 0; b < 192; ++b) {
        const int vectors = 1 << layout, word = b / (12 * vectors), s = b % (12 * vectors) / 12, plane = b % 12 / 4;
        const int column = word * 4 * vectors + vectors * (b % 4) + s;
        from[layout][b / 64][b % 64] = uint8_t(plane == 1 ? 64 + column : column);
        if (plane == 2) low[layout][b / 64] |= uint64_t(1) << b % 64;
      }
  }
};
constexpr Interleave kInterleave;

// Largest magnitude of x as bits; infinities and NaN compare above every number.
inline uint32_t largest_bits(const float* x, int64_t n) {
  __m512i top = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < n; k += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude));
  return _mm512_reduce_max_epu32(top);
}

// Smallest e with largest * 2^(23 - e) <= 127 * (2^16 + 2^8 + 1), the largest number of three signed bytes. Every f32 is
// a multiple of 2^-149: no unit needs to be smaller.
inline int fixed_exponent(uint32_t bits) {
  const int e = int(bits >> 23) - 126 + ((bits & 0x7fffff) > 8322814);
  return e < -126 ? -126 : e;
}

// 2^e, e in -149..127.
inline float power_of_two(int e) { return bits_to_f32(e < -126 ? uint32_t(1) << (e + 149) : uint32_t(e + 127) << 23); }

// 64 columns of the planes h, m, l in the layouts in use.
inline void store_planes(int8_t* const* planes, int layouts, int64_t column, const __m512i (&plane)[3]) {
  for (int layout = 0; layout < 3; ++layout) {
    if (!(layouts >> layout & 1)) continue;
    for (int j = 0; j < 3; ++j) {
      const __m512i from = _mm512_loadu_si512(kInterleave.from[layout][j]);
      const __m512i v = _mm512_permutex2var_epi8(plane[0], from, plane[1]);
      _mm512_store_si512(planes[layout] + 3 * column + 64 * j,
                         _mm512_mask_permutexvar_epi8(v, kInterleave.low[layout][j], from, plane[2]));
    }
  }
}

// Sums of h, m and l over columns 0..31 and 32..63: sums[0..3] and [4..7], the fourth of each 0.
inline void store_sums(int32_t* sums, const __m512i (&plane)[3]) {
  const __m512i one = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
  __m512i four[3];
  for (int p = 0; p < 3; ++p) four[p] = _mm512_dpbusd_epi32(none, one, plane[p]);
  auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i hm = halves(four[0], four[1]), l = halves(four[2], none);
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(hm, l), _mm512_unpackhi_epi64(hm, l));
  all = _mm512_add_epi32(all, _mm512_shuffle_i32x4(all, all, 0xB1));
  _mm_store_si128(reinterpret_cast<__m128i*>(sums), _mm512_castsi512_si128(all));
  _mm_store_si128(reinterpret_cast<__m128i*>(sums + 4), _mm512_extracti32x4_epi32(all, 2));
}

inline __m512i low_bytes(const __m512i (&v)[4]) {
  __m512i b = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(v[0]));
  b = _mm512_inserti32x4(b, _mm512_cvtepi32_epi8(v[1]), 1);
  b = _mm512_inserti32x4(b, _mm512_cvtepi32_epi8(v[2]), 2);
  return _mm512_inserti32x4(b, _mm512_cvtepi32_epi8(v[3]), 3);
}

// A level's units from the sums of 32 columns.
inline void to_units(const QmatmulInput& in, const float* unit, const QmatmulLevel& level, int64_t padded,
                     QmatmulUnit* out) {
  for (int64_t column = 0; column < padded; column += level.columns, ++out) {
    const int32_t* s = in.sums32 + column / 8;
    int32_t sum[3] = {s[0], s[1], s[2]};
    for (int i = 1; i < level.columns / 32; ++i)
      for (int p = 0; p < 3; ++p) sum[p] += s[4 * i + p];
    for (int p = 0; p < 3; ++p) out->start[p] = -level.centre * sum[p];
    out->unit = unit[column / kFixedBlock];
    out->total = (float(sum[0] * 256 + sum[1]) * 256.0f + float(sum[2])) * out->unit;
  }
}

// x f32[padded], a multiple of 256, to planes, sums and units.
void to_fixed_point(const QmatmulPrepare& task, QmatmulInput& in, const float* x) {
  const int64_t padded = (task.columns + 255) / 256 * 256;
  const __m512i half = _mm512_set1_epi32(128);
  float* unit = in.sums;  // of each block
  for (int64_t block = 0; block < padded; block += kFixedBlock) {
    const uint32_t top = largest_bits(x + block, kFixedBlock);
    const bool finite = top < 0x7f800000u;
    const int e = fixed_exponent(top);
    // One infinity makes all rows NaN.
    unit[block / kFixedBlock] = finite ? power_of_two(e - 23) : bits_to_f32(0x7fc00000u);
    const __m512 exponent = splat(float(23 - e));
    for (int64_t k = block; k < block + kFixedBlock; k += 64) {
      __m512i v[3][4], plane[3];
      for (int i = 0; i < 4; ++i) {
        const __m512 scaled = _mm512_scalef_ps(load(x + k + 16 * i), exponent);
        v[2][i] = finite ? _mm512_cvtps_epi32(scaled) : _mm512_setzero_si512();
        v[1][i] = _mm512_srai_epi32(_mm512_add_epi32(v[2][i], half), 8);
        v[0][i] = _mm512_srai_epi32(_mm512_add_epi32(v[1][i], half), 8);
      }
      for (int p = 0; p < 3; ++p) plane[p] = low_bytes(v[p]);
      store_planes(in.planes, task.layouts, k, plane);
      store_sums(in.sums32 + k / 32 * 4, plane);
    }
  }
  QmatmulUnit* units = in.units;
  for (int i = 0; i < task.levels.count; units += padded / task.levels.level[i++].columns)
    to_units(in, unit, task.levels.level[i], padded, units);
}

// x f32[padded] as the codebook kernel reads it: column 8 * lane + j of each 128 at 16 * j + lane. Even
// before odd moves the lowest bit of a place to the top; three times moves three.
void to_spread(float* out, const float* x, int64_t padded) {
  alignas(64) int32_t every[16];
  for (int i = 0; i < 16; ++i) every[i] = 2 * i;
  const __m512i even = _mm512_load_si512(every), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int64_t k = 0; k < padded; k += 128) {
    __m512 v[2][8];
    for (int i = 0; i < 8; ++i) v[0][i] = load(x + k + 16 * i);
    for (int pass = 0; pass < 3; ++pass)
      for (int i = 0; i < 4; ++i) {
        const __m512* from = v[pass & 1] + 2 * i;
        v[~pass & 1][i] = _mm512_permutex2var_ps(from[0], even, from[1]);
        v[~pass & 1][i + 4] = _mm512_permutex2var_ps(from[0], odd, from[1]);
      }
    for (int i = 0; i < 8; ++i) _mm512_store_ps(out + k + 16 * i, v[1][i]);
  }
}

}  // namespace
}  // namespace hm
