// What AVX-512's qmatmul prepares before it meets a row: how to turn codes into unsigned bytes, and tokens as
// signed bytes. The equations are in qmatmul_avx512.h.
#pragma once

namespace hm {
namespace {

// How u8 values arise from codes.
//   kByte                         the bytes as they are
//   kShiftedCode, kShiftedTable   2 and 4 bits: a byte holds whole codes, so shifts by constants do
//   kCode, kTable                 any other width or place
// u is the code, or table[code].
enum UnpackKind { kByte, kShiftedCode, kShiftedTable, kCode, kTable };

struct UnpackPlan {
  __m512i index, shift[4], first;  // shift: per vector of a block; first: the code's bits, or the table
  int64_t stride;                 // bytes of a block of codes
  __mmask64 whole, tail;          // bytes of a block; of the last one
  int64_t blocks;                 // whole blocks in a row
  bool has_tail;
  int64_t unit, units, units_per_group;  // columns that share a sum of x; in a row; in a group
  __m512i unit_of_lane;                  // of a block's units
  int units_per_block;
  int64_t blocks_per_unit;
  bool gathers_scales;      // they do not lie side by side, one for each unit
  float unit_of_u, offset;  // of a row: scale * unit_of_u * (u + offset) + shift
  bool has_shift;           // shift = bias - scale * offset
};

inline __mmask64 first_bytes(int64_t n) {
  return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1;
}

// Where byte i of vector s finds its code: see qmatmul_avx512.h.
inline void plan_layout(const QmatmulTask& task, UnpackPlan& c) {
  alignas(64) uint8_t index[64], shift[64];
  const bool gguf = task.table == hm_e2m1_gguf;
  const int bits = task.bits, vectors = 1 << qmatmul_layout(task.table, bits);
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
  c.first = _mm512_set1_epi8(char((1 << bits) - 1));
  c.stride = gguf ? 34 : 8 * bits * vectors;
  c.blocks = task.columns / (64 * vectors);
  const int64_t rest = task.columns % (64 * vectors);
  c.has_tail = rest != 0;
  c.unit = qmatmul_unit(task.group, qmatmul_layout(task.table, bits));
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

inline UnpackKind plan_unpack(const QmatmulTask& task, UnpackPlan& c) {
  plan_layout(task, c);
  c.unit_of_u = 1;
  c.offset = -float(1 << (task.bits - 1));
  c.has_shift = task.table == hm_linear;
  if (task.table == hm_linear || task.table == hm_linear_signed)
    return task.bits == 8 ? kByte : task.bits == 2 || task.bits == 4 ? kShiftedCode : kCode;
  uint8_t t[16];
  for (int i = 0; i < 16; ++i) t[i] = uint8_t(e2m1_doubled[i] + 12);
  c.first = repeated_table(t, 16);
  c.unit_of_u = 0.5f;
  c.offset = -12;
  return task.table == hm_e2m1 ? kShiftedTable : kTable;
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

// Smallest e with top * 2^(31 - e) <= 127 * (2^24 + 2^16 + 2^8 + 1), the largest number of four signed bytes.
inline int fixed_exponent(uint32_t bits) {
  double top = double(bits_to_f32(bits));
  uint64_t u;
  memcpy(&u, &top, 8);
  int e = int(u >> 52) - 1022;  // top < 2^e
  return top * pow2(-e) > 2139062143.0 / 2147483648.0 ? e + 1 : e;
}

// Four vectors of bytes, 256 columns of a plane, in the order of each fold in use.
inline void store_folded(int8_t* const* planes, int folds, int64_t k, int plane, const __m512i (&v)[4]) {
  alignas(64) uint8_t every[2][64];
  for (int i = 0; i < 64; ++i) {
    every[0][i] = uint8_t(2 * i);
    every[1][i] = uint8_t(4 * i);
  }
  for (int s = 0; s < 4; ++s) {
    const int64_t at = 4 * (k + 64 * s) + 64 * plane;
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

// Sums of the columns that each lane of a block sees.
inline void to_lane_sums(QmatmulInput& in, int fold, int64_t padded) {
  const __m512i one = _mm512_set1_epi8(1);
  for (int64_t block = 0; block < padded >> (6 + fold); ++block) {
    __m512i sums[4];
    for (int i = 0; i < 4; ++i) {
      sums[i] = _mm512_setzero_si512();
      const int8_t* plane = in.planes[fold] + ((block << fold) * 4 + i) * 64;
      for (int s = 0; s < 1 << fold; ++s)
        sums[i] = _mm512_dpbusd_epi32(sums[i], one, _mm512_load_si512(plane + 256 * s));
    }
    const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]);
    const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(sums[2], 8), sums[3]);
    const __m512 sum = fma(_mm512_cvtepi32_ps(high), splat(65536), _mm512_cvtepi32_ps(low));
    _mm512_store_ps(in.lane_sums[fold] + 16 * block, sum);
  }
}

// The exact sum of 32 columns.
inline int64_t sum32(__m512i a, __m512i b) {
  auto wide = [](__m512i v) {
    return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                            _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
  };
  return _mm512_reduce_add_epi64(_mm512_add_epi64(wide(a), wide(b)));
}

// x f32[padded], a multiple of 256, to planes and sums; in.unit makes them numbers again.
void to_fixed_point(const QmatmulPrepare& task, QmatmulInput& in, const float* x) {
  const int64_t padded = (task.columns + 255) / 256 * 256;
  const uint32_t top = largest_bits(x, padded);
  const bool finite = top < 0x7f800000u;
  const int e = top && finite ? fixed_exponent(top) : 0;
  in.unit = finite ? pow2(e - 31) : double(bits_to_f32(0x7fc00000u));  // one infinity makes the token NaN
  const __m512 exponent = splat(float(31 - e));
  const __m512i half = _mm512_set1_epi32(128);
  int64_t total = 0;
  for (int64_t k = 0; k < padded; k += 256) {
    __m512i bytes[4][4];  // by plane, then 64 columns
    for (int s = 0; s < 4; ++s) {
      __m512i v[4][4];
      for (int i = 0; i < 4; ++i) {
        const __m512 scaled = _mm512_scalef_ps(load(x + k + 64 * s + 16 * i), exponent);
        v[3][i] = finite ? _mm512_cvtps_epi32(scaled) : _mm512_setzero_si512();
        for (int p = 3; p > 0; --p) v[p - 1][i] = _mm512_srai_epi32(_mm512_add_epi32(v[p][i], half), 8);
      }
      for (int p = 0; p < 4; ++p) bytes[p][s] = bytes_of(v[p]);
      int64_t* sums = in.sums32 + k / 32 + 2 * s;
      sums[0] = sum32(v[3][0], v[3][1]);
      sums[1] = sum32(v[3][2], v[3][3]);
      total += sums[0] + sums[1];
    }
    for (int p = 0; p < 4; ++p) store_folded(in.planes, task.layouts, k, p, bytes[p]);
  }
  for (int fold = 0; fold < kSpread; ++fold)
    if (task.layouts >> fold & 1) to_lane_sums(in, fold, padded);
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
