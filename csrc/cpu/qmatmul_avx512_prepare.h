// What AVX-512's qmatmul prepares before it meets a row: how to turn codes into unsigned bytes, and tokens as
// signed bytes. The equations are in qmatmul_avx512.h.
#pragma once

namespace hm {
namespace {

// How u8 values arise from codes, and how many byte products make one product.
//   kCode   u = code                                            h u, m u, l u
//   kTable  u = table[code], 8 bits                             the same
//   kWide   u = 24 bits in three tables u2 u1 u0                h u2 | h u1 + m u2 | h u0 + m u1 + l u2
//   kPair   2 bits, c[3] - c[2] - c[1] + c[0] = 0:              c = c[0] + A bit0 + B bit1, exactly; l sees
//   an 8-bit
//           h b0, m b0 | h b1, m b1 | l u                       table, whose rounding is 2^-24 of x
enum UnpackKind { kCode, kTable, kWide, kPair };

struct UnpackPlan {
  __m512i index, shift[4], mask;  // shift: per vector of a block; mask: kCode
  __m512i table[3], pair[2];      // pair: bit 0 and bit 1 of a code, for kPair
  int64_t stride;                 // bytes of a block of codes
  __mmask64 whole, tail;          // bytes of a block; of the last one
  int64_t blocks;                 // whole blocks in a row
  bool has_tail;
  int64_t unit, units, units_per_group;  // columns that share a sum of x; in a row; in a group
  __m512i unit_of_lane;                  // of a block's units
  int units_per_block;
  int64_t blocks_per_unit;
  bool gathers_scales;      // they do not lie side by side, one for each unit
  float pair_a, pair_b;     // kPair: A, and B / 2
  float high, low, offset;  // row = high * (h and m sums) + low * (l sums) + offset * sum of scale * X
};

inline __mmask64 first_bytes(int64_t n) {
  return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1;
}

// Where byte i of vector s finds its code: see qmatmul_avx512.h.
inline void plan_layout(const QmatmulTask& task, UnpackPlan& c) {
  alignas(64) uint8_t index[64], shift[64];
  const bool gguf = task.table == hm_e2m1_gguf;
  const int bits = task.bits, vectors = 1 << qmatmul_fold(task.table, bits);
  for (int s = 0; s < vectors; ++s) {
    for (int i = 0; i < 64; ++i) {
      const int word = i / 8, lane = i / 4;
      if (gguf) {  // block i / 32: a scale byte, then byte j holds code j below and code j + 16 above
        const int code = i % 32;
        index[i] = uint8_t(i / 32 * 17 + 1 + code % 16);
        shift[i] = uint8_t(i % 8 * 8 + (code < 16 ? 0 : 4));
      } else if (vectors == 1) {  // a word holds 8 codes
        index[i] = uint8_t(word * bits + (i % 8 < bits ? i % 8 : 0));
        shift[i] = uint8_t(i % 8 * bits);
      } else {  // a lane holds 4 * vectors codes: whole bytes, at most 4
        const int bytes = vectors * bits / 2;
        index[i] = uint8_t(lane * bytes + (i % 4 < bytes ? i % 4 : 0));
        shift[i] = uint8_t(lane % 2 * 32 + (i % 4 * vectors + s) * bits);
      }
    }
    c.shift[s] = _mm512_load_si512(shift);
  }
  c.index = _mm512_load_si512(index);
  c.mask = _mm512_set1_epi8(char((1 << bits) - 1));
  c.stride = gguf ? 34 : 8 * bits * vectors;
  c.blocks = task.columns / (64 * vectors);
  const int64_t rest = task.columns % (64 * vectors);
  c.has_tail = rest != 0;
  c.unit = qmatmul_unit(task.group, qmatmul_fold(task.table, bits));
  c.units = task.columns / c.unit;
  c.units_per_group = task.group / c.unit;
  c.units_per_block = int(64 * vectors / c.unit);
  c.blocks_per_unit = c.unit / (64 * vectors);
  c.gathers_scales = gguf || c.units_per_group != 1;
  alignas(64) int32_t unit[16];
  for (int lane = 0; lane < 16; ++lane) unit[lane] = int32_t(4 * vectors * lane / c.unit);
  c.unit_of_lane = _mm512_load_si512(unit);
  c.whole = first_bytes(c.stride);
  c.tail = first_bytes(gguf ? rest / 32 * 17 : (rest * bits + 7) / 8);
}

inline __m512i repeated_table(const uint8_t* entries, int count) {
  alignas(64) uint8_t t[64];
  for (int i = 0; i < 64; ++i) t[i] = entries[i & (count - 1)];
  return _mm512_load_si512(t);
}

// Smallest power of two s with range <= 255 s, or 1 for an empty range.
inline double byte_step(double range) {
  uint64_t u;
  memcpy(&u, &range, 8);
  if (range == 0) return 1;
  u = (u >> 52) << 52;
  double s;
  memcpy(&s, &u, 8);
  s *= 1.0 / 128;  // range < 256 s
  return range > 255 * s ? 2 * s : s;
}

inline UnpackKind plan_codebook(const QmatmulTask& task, UnpackPlan& c) {
  int count = 1 << task.bits;
  float book[16];
  double low, range = 0;
  memcpy(book, task.codebook, size_t(count) * 4);
  low = double(book[0]);
  for (int i = 1; i < count; ++i) low = double(book[i]) < low ? double(book[i]) : low;
  for (int i = 0; i < count; ++i) range = double(book[i]) - low > range ? double(book[i]) - low : range;
  double step = byte_step(range);
  uint8_t t[3][16];
  bool exact = true;
  for (int i = 0; i < count; ++i) {
    double q = (double(book[i]) - low) / step;
    t[0][i] = uint8_t(q + 0.5);
    exact = exact && double(t[0][i]) == q;
  }
  c.table[0] = repeated_table(t[0], count);
  c.offset = float(low);
  double a = double(book[1]) - low, b = double(book[2]) - low, off = double(book[3]) - low - a - b;
  if (exact) {
    c.high = float(256 * step);
    c.low = float(step);
    return kTable;
  }
  if (count == 4 && low == double(book[0]) && (off < 0 ? -off : off) <= range * 0x1p-24) {
    c.pair[0] = _mm512_set1_epi8(1);
    c.pair[1] = _mm512_set1_epi8(2);
    c.pair_a = float(a);
    c.pair_b = float(b / 2);
    c.high = 256;
    c.low = float(step);
    return kPair;
  }
  // 24 bits: of a power of two where that is exact, else of the range.
  step /= 65536;
  exact = true;
  for (int i = 0; i < count; ++i) {
    double q = (double(book[i]) - low) / step;
    exact = exact && q == double(uint32_t(q));
  }
  if (!exact) step = range / 0xffffff;
  for (int i = 0; i < count; ++i) {
    uint32_t q = uint32_t((double(book[i]) - low) / step + 0.5);
    for (int d = 0; d < 3; ++d) t[d][i] = uint8_t(q >> (16 - 8 * d));
  }
  for (int d = 0; d < 3; ++d) c.table[d] = repeated_table(t[d], count);
  c.high = float(step * 0x1p24);
  c.low = float(step * 0x1p16);
  return kWide;
}

inline UnpackKind plan_unpack(const QmatmulTask& task, UnpackPlan& c) {
  plan_layout(task, c);
  c.high = 256;
  c.low = 1;
  c.offset = task.bias                        ? 1
             : task.table == hm_linear_signed ? -float(1 << (task.bits - 1))
                                              : 0;  // 1: shifts are biases
  if (task.table == hm_codebook) return plan_codebook(task, c);
  if (task.table != hm_e2m1 && task.table != hm_e2m1_gguf) return kCode;
  uint8_t t[16];
  for (int i = 0; i < 16; ++i) t[i] = uint8_t(e2m1_doubled[i] + 12);
  c.table[0] = repeated_table(t, 16);
  c.high = 128;  // entries are doubled
  c.low = 0.5f;
  c.offset = -6;
  return kTable;
}

// ---- tokens to fixed point

// Largest magnitude of x as bits; infinities and NaN compare above every number.
inline uint32_t largest_bits(const float* x, int64_t n) {
  __m512i top = _mm512_setzero_si512(), magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < n; k += 16)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude));
  return _mm512_reduce_max_epu32(top);
}

inline double pow2(int e) {
  uint64_t u = uint64_t(1023 + e) << 52;
  double d;
  memcpy(&d, &u, 8);
  return d;
}

// Smallest e with round(top * 2^(23 - e)) <= 127 * 65536 + 127 * 256 + 127, the largest number of three
// signed bytes.
inline int fixed_exponent(uint32_t bits) {
  double top = double(bits_to_f32(bits));
  uint64_t u;
  memcpy(&u, &top, 8);
  int e = int(u >> 52) - 1022;  // top < 2^e
  return top * pow2(-e) > 8355711.0 / 8388608.0 ? e + 1 : e;
}

// Four vectors of x's bytes, 256 columns, in the order of each fold in use.
inline void store_folded(int8_t* const* planes, int folds, int64_t k, int plane, const __m512i (&v)[4]) {
  alignas(64) uint8_t every[2][64];
  for (int i = 0; i < 64; ++i) {
    every[0][i] = uint8_t(2 * i);
    every[1][i] = uint8_t(4 * i);
  }
  for (int s = 0; s < 4; ++s) {
    const int64_t at = 3 * (k + 64 * s) + 64 * plane;
    if (folds & 1) _mm512_store_si512(planes[0] + at, v[s]);
    if (folds & 2) {
      const __m512i from = _mm512_add_epi8(_mm512_load_si512(every[0]), _mm512_set1_epi8(char(s % 2)));
      _mm512_store_si512(planes[1] + at, _mm512_permutex2var_epi8(v[s / 2 * 2], from, v[s / 2 * 2 + 1]));
    }
    if (folds & 4) {
      const __m512i from = _mm512_add_epi8(_mm512_load_si512(every[1]), _mm512_set1_epi8(char(s)));
      const __m512i low = _mm512_permutex2var_epi8(v[0], from, v[1]);
      const __m512i high = _mm512_permutex2var_epi8(v[2], from, v[3]);
      _mm512_store_si512(planes[2] + at, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
  }
}

inline __m512i bytes_of(const __m512i (&v)[4]) {
  __m512i b = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(v[0]));
  b = _mm512_inserti32x4(b, _mm512_cvtepi32_epi8(v[1]), 1);
  b = _mm512_inserti32x4(b, _mm512_cvtepi32_epi8(v[2]), 2);
  return _mm512_inserti32x4(b, _mm512_cvtepi32_epi8(v[3]), 3);
}

// x f32[padded], a multiple of 256, to planes and sums; in.unit makes them numbers again.
void to_fixed_point(const QmatmulPrepare& task, QmatmulInput& in, const float* x) {
  const int64_t padded = (task.columns + 255) / 256 * 256;
  const uint32_t top = largest_bits(x, padded);
  const bool finite = top < 0x7f800000u;
  const int e = top && finite ? fixed_exponent(top) : 0;
  in.unit = finite ? pow2(e - 23) : double(bits_to_f32(0x7fc00000u));  // one infinity makes the token NaN
  const __m512 exponent = splat(float(23 - e));
  const __m512i half = _mm512_set1_epi32(128);
  int64_t total = 0;
  for (int64_t k = 0; k < padded; k += 256) {
    __m512i low[4], mid[4], high[4];
    for (int s = 0; s < 4; ++s) {
      __m512i l[4], m[4], h[4];
      for (int i = 0; i < 4; ++i) {
        const __m512 v = _mm512_scalef_ps(load(x + k + 64 * s + 16 * i), exponent);
        l[i] = finite ? _mm512_cvtps_epi32(v) : _mm512_setzero_si512();
        m[i] = _mm512_srai_epi32(_mm512_add_epi32(l[i], half), 8);
        h[i] = _mm512_srai_epi32(_mm512_add_epi32(m[i], half), 8);
      }
      low[s] = bytes_of(l);
      mid[s] = bytes_of(m);
      high[s] = bytes_of(h);
      int32_t* sums = in.sums32 + k / 32 + 2 * s;
      sums[0] = _mm512_reduce_add_epi32(_mm512_add_epi32(l[0], l[1]));
      sums[1] = _mm512_reduce_add_epi32(_mm512_add_epi32(l[2], l[3]));
      total += sums[0] + sums[1];
    }
    store_folded(in.planes, task.folds, k, 0, high);
    store_folded(in.planes, task.folds, k, 1, mid);
    store_folded(in.planes, task.folds, k, 2, low);
  }
  in.total = double(total);
  float* out = in.sums;
  for (int level = 0; level < task.levels.count; ++level) {
    const int64_t unit = task.levels.unit[level], slots = QmatmulLevels::slots(padded, unit);
    for (int64_t g = 0; g < slots; ++g) {
      int64_t sum = 0;
      if ((g + 1) * unit <= padded)
        for (int64_t j = g * unit / 32; j < (g + 1) * unit / 32; ++j) sum += in.sums32[j];
      out[g] = float(sum);
    }
    out += slots;
  }
}

}  // namespace
}  // namespace hm
