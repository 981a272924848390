// Codes times many tokens in tiles. The equation, x in three signed bytes h m l, codes as unsigned bytes u and units
// of columns are those of qmatmul_avx512.h; so is every f32 operation and their order, and with them a result's bits.
//
//         u: 16 rows of 64 columns        x: 16 dwords of columns, 16 tokens       int32: 16 rows, 16 tokens
//   row 0  | u0 u1 u2 u3 | ... |          | x0 x1 x2 x3 of token 0 | token 1 | ..
//   row 1  | ...                     X    | x4 x5 x6 x7            |                =  h, m or l
//
// One instruction makes 16384 products. Codes need no transpose, only the order of columns in which the planes of
// x lie. A unit of columns starts from QmatmulUnit's start, ends in memory and becomes f32 a row of 16 tokens at a time.
// That takes about as long as the products, so the two halves of 32 rows take turns: one multiplies while the
// other becomes f32.
//
// 32 rows share what is loaded of x, up to 128 tokens what is unpacked of codes.
#pragma once
#include "amx.h"
#include "qmatmul_avx512.h"

namespace hm {
namespace {

// ---- the instructions. `memory` orders them among ordinary loads and stores: GCC's own intrinsics do not.

struct alignas(64) TileConfig {
  uint8_t palette, start_row, zero[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "what ldtilecfg reads");

HM_INLINE void tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
HM_INLINE void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
HM_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
HM_INLINE void tile_store(void* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t(64)), "i"(kTile) : "memory");
}

// sums += u8 * s8
template <int kSums, int kU8, int kS8>
HM_INLINE void tile_dot() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kU8), "i"(kS8));
}

// Tiles 0..2 and 3..5 are the sums of each half.
constexpr int kCodeTile = 6, kTokenTile = 7;
constexpr int kTilePanel = 1024;  // columns unpacked at once

// For a unit of `columns`.
inline TileConfig tile_shapes(int columns) {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  if (columns == 32) config.row_bytes[kCodeTile] = 32, config.rows[kTokenTile] = 8;
  return config;
}

// ---- codes

// How 64 codes of a row become bytes in the order of layout V: dword d of a chunk is word d / V's vector d % V.
struct TileCodes {
  __m512i index[4], shift, mask;  // index: of each 64 of a chunk's columns
};

template <class C>
inline TileCodes plan_tile_codes(const CodePlan& c) {
  constexpr int V = C::kVectors;
  alignas(64) uint8_t index[64], shift[64];
  TileCodes t;
  auto code = [](int j, int b) { return 4 * V * (16 / V * j + b / 4 / V) + V * (b % 4) + b / 4 % V; };
  for (int j = 0; j < V; ++j) {
    for (int b = 0; b < 64; ++b) {
      if (C::kGguf) {  // block b / 32: a scale byte, then byte i holds code i below and code i + 16 above
        index[b] = uint8_t(b / 32 * 17 + 1 + b % 16);
        shift[b] = uint8_t(b % 8 * 8 + (b % 32 < 16 ? 0 : 4));
      } else {
        const int byte = code(j, b / 8 * 8) * C::kBits / 8;  // a word of 64 bits holds 8 codes
        index[b] = uint8_t((byte + b % 8) % 64);
        shift[b] = uint8_t(code(j, b) * C::kBits - 8 * byte);
      }
    }
    t.index[j] = _mm512_load_si512(index);
  }
  t.shift = _mm512_load_si512(shift);
  t.mask = c.first;
  return t;
}

// Half of a panel's rows as tiles: [64 columns][row][64].
using HalfCodes = uint8_t[kTilePanel / 64][16][64];

template <class C>
void unpack_tiles(const Panel<C>& panel, const TileCodes& t, HalfCodes& out) {
  const int64_t chunks = (panel.end - panel.first + 127) / 128 * 2;
  const int64_t far = 32 * panel.task.row_bytes;
  for (int r = 0; r < 16; ++r) {
    const uint8_t* row = panel.codes + (r < panel.rows ? r : panel.rows - 1) * panel.task.row_bytes;
    for (int64_t i = 0; i < chunks; i += C::kVectors) {
      const int64_t at = (panel.first / 64 + i) / C::kVectors * C::kStride, left = panel.grid.row_bytes - at;
      const int64_t bytes = left < 0 ? 0 : left < C::kStride ? left : C::kStride;
      const __m512i words = _mm512_maskz_loadu_epi8(first_bytes(bytes), row + at);
      if (panel.task.codes_end - row > far + at)
        _mm_prefetch(reinterpret_cast<const char*>(row + far + at), _MM_HINT_T1);
      HM_UNROLL
      for (int j = 0; j < C::kVectors; ++j) {
        const __m512i v = _mm512_multishift_epi64_epi8(t.shift, _mm512_permutexvar_epi8(t.index[j], words));
        const __m512i u = C::kLooksUp ? _mm512_permutexvar_epi8(v, t.mask) : _mm512_and_si512(v, t.mask);
        if (i + j < chunks) _mm512_store_si512(out[i + j][r], u);
      }
    }
  }
}

// ---- tokens

// Up to 16 tokens as tiles, zeros for those that are not there.
struct TileTokens {
  int8_t* planes;  // [64 columns][h m l][dword][token][4]
  AmxUnit* units;
};

// 64 bytes of each token, turned: a[d] has dword d of all of them.
template <class F>
HM_INLINE void turn(const QmatmulInput* const* tokens, int count, F place, __m512i (&a)[16]) {
  HM_UNROLL
  for (int t = 0; t < 16; ++t) a[t] = t < count ? _mm512_load_si512(place(*tokens[t])) : _mm512_setzero_si512();
  transpose(a);
}

// Planes lie as dwords h m l, h m l ...; units come in pairs, 8 dwords each.
inline void turn_tokens(const QmatmulTask& task, const QmatmulInput* const* tokens, int count, int layout, int unit,
                        const TileTokens& out) {
  __m512i a[16];
  const int64_t chunks = (task.columns + 127) / 128 * 2;
  for (int64_t i = 0; i < chunks; ++i)
    for (int j = 0; j < 3; ++j) {
      turn(tokens, count, [&](const QmatmulInput& in) { return in.planes[layout] + 192 * i + 64 * j; }, a);
      HM_UNROLL
      for (int d = 0; d < 16; ++d)
        _mm512_store_si512(out.planes + 3072 * i + (16 * j + d) % 3 * 1024 + (16 * j + d) / 3 * 64, a[d]);
    }
  for (int64_t u = 0; u * unit < task.columns; u += 2) {
    turn(tokens, count, [&](const QmatmulInput& in) { return in.units + task.units + u; }, a);
    for (int i = 0; i < 2; ++i) {
      AmxUnit& to = out.units[u + i];
      for (int p = 0; p < 3; ++p) _mm512_store_si512(to.start[p], a[8 * i + p]);
      _mm512_store_si512(to.unit, a[8 * i + 3]);
      _mm512_store_si512(to.total, a[8 * i + 4]);
    }
  }
}

// ---- products

// What one pass needs: a panel of 32 rows and 16 tokens.
struct TilePass {
  const HalfCodes* codes;      // of both halves
  const int8_t* x;             // of the panel's first columns
  const AmxUnit* units;
  int count, per_group, left;  // units; left: of the first group
  const float (*scale[2])[16], (*shift[2])[16];
  float (*y[2])[16];           // [row][token]
};

enum Join { kWhole, kScaled, kShifted };  // how a unit joins its row

// Starts the sums of a unit of kUnit columns and adds its products.
template <int kHalf, int kUnit>
HM_INLINE void multiply_tiles(const uint8_t* codes, const int8_t* x, const AmxUnit& unit) {
  tile_load<3 * kHalf>(unit.start[0], 0);
  tile_load<3 * kHalf + 1>(unit.start[1], 0);
  tile_load<3 * kHalf + 2>(unit.start[2], 0);
  HM_UNROLL
  for (int chunk = 0; chunk < (kUnit + 63) / 64; ++chunk) {
    tile_load<kCodeTile>(codes + chunk * 1024, 64);
    tile_load<kTokenTile>(x + chunk * 3072, 64);
    tile_dot<3 * kHalf, kCodeTile, kTokenTile>();
    tile_load<kTokenTile>(x + chunk * 3072 + 1024, 64);
    tile_dot<3 * kHalf + 1, kCodeTile, kTokenTile>();
    tile_load<kTokenTile>(x + chunk * 3072 + 2048, 64);
    tile_dot<3 * kHalf + 2, kCodeTile, kTokenTile>();
  }
}

template <int kHalf>
HM_INLINE void store_tiles(int32_t (&sums)[3][16][16]) {
  tile_store<3 * kHalf>(sums[0]);
  tile_store<3 * kHalf + 1>(sums[1]);
  tile_store<3 * kHalf + 2>(sums[2]);
}

// A unit's sums to f32, times their scales, onto 16 rows: the operations of AVX-512's pass().
template <Join kJoin>
HM_INLINE void join_tiles(const int32_t (&sums)[3][16][16], const AmxUnit& unit, const float* scale, const float* shift,
                          float (*y)[16]) {
  const __m512 size = _mm512_load_ps(unit.unit), total = _mm512_load_ps(unit.total);
  HM_UNROLL
  for (int r = 0; r < 16; ++r) {
    const __m512 d = mul(number_of(_mm512_load_si512(sums[0][r]), _mm512_load_si512(sums[1][r]),
                                   _mm512_load_si512(sums[2][r])), size);
    __m512 row = _mm512_load_ps(y[r]);
    row = kJoin == kWhole ? add(row, d) : fma(d, splat(scale[r]), row);
    if (kJoin == kShifted) row = fma(splat(shift[r]), total, row);
    _mm512_store_ps(y[r], row);
  }
}

template <int kUnit, Join kJoin>
__attribute__((noinline)) void tile_pass(const TilePass& pass) {
  alignas(64) int32_t sums[2][3][16][16];
  const uint8_t* codes = pass.codes[0][0][0];
  const int8_t* x = pass.x;
  const AmxUnit* unit = pass.units;
  const float *scale[2] = {pass.scale[0][0], pass.scale[1][0]}, *shift[2] = {pass.shift[0][0], pass.shift[1][0]};
  float(*const y[2])[16] = {pass.y[0], pass.y[1]};
  const int count = pass.count, per_group = pass.per_group;
  int left = pass.left;
  for (int u = 0; u < count; ++u, ++unit) {
    multiply_tiles<0, kUnit>(codes, x, *unit);
    if (u) join_tiles<kJoin>(sums[1], unit[-1], scale[1], shift[1], y[1]);
    if (u && left == per_group) scale[1] += 16, shift[1] += 16;
    store_tiles<0>(sums[0]);
    multiply_tiles<1, kUnit>(codes + sizeof(HalfCodes), x, *unit);
    join_tiles<kJoin>(sums[0], *unit, scale[0], shift[0], y[0]);
    store_tiles<1>(sums[1]);
    if (--left == 0) scale[0] += 16, shift[0] += 16, left = per_group;
    if (kUnit == 32) {  // two to 64 columns
      codes += u % 2 ? 1024 - 32 : 32;
      x += u % 2 ? 3072 - 512 : 512;
    } else {
      codes += kUnit * 16;
      x += kUnit * 48;
    }
  }
  join_tiles<kJoin>(sums[1], unit[-1], scale[1], shift[1], y[1]);
}

template <int kUnit>
void tile_pass_of(const TilePass& pass, Join join) {
  if (join == kWhole) return tile_pass<kUnit, kWhole>(pass);
  join == kScaled ? tile_pass<kUnit, kScaled>(pass) : tile_pass<kUnit, kShifted>(pass);
}

// 32 rows of up to 128 tokens.
template <class C>
struct TileRows {
  Panel<C> half[2];
  const TileCodes codes;
  const TileTokens* tokens;  // of each 16
  int tiles;
  alignas(64) HalfCodes unpacked[2];
  alignas(64) float y[kMostAmxTiles][2][16][16];  // [row][token]

  // Both halves of a panel with all tokens.
  void run_panel() {
    const Grid& grid = half[0].grid;
    const Join join = grid.whole_row ? kWhole : grid.has_shift ? kShifted : kScaled;
    const int64_t first = half[0].first, unit = first / grid.unit;
    TilePass pass{unpacked, nullptr, nullptr, int((half[0].end - first + grid.unit - 1) / grid.unit), grid.per_group,
                  grid.per_group - int(unit % grid.per_group), {half[0].scale, half[1].scale},
                  {half[0].shift, half[1].shift}, {}};
    for (int i = 0; i < tiles; ++i) {
      pass.x = tokens[i].planes + first * 48;
      pass.units = tokens[i].units + unit;
      for (int h = 0; h < 2; ++h) pass.y[h] = y[i][h];
      if (grid.unit == 128) tile_pass_of<128>(pass, join);
      if (grid.unit == 64) tile_pass_of<64>(pass, join);
      if (grid.unit == 32) tile_pass_of<32>(pass, join);
    }
  }

  void run(int64_t row, int64_t end) {
    const QmatmulTask& task = half[0].task;
    memset(y, 0, size_t(tiles) * sizeof y[0]);
    // Without a second half the first one is done twice.
    const int64_t rows[2] = {row, row + 16 < end ? row + 16 : row};
    for (int h = 0; h < 2; ++h) {
      half[h].rows = int(end - rows[h] < 16 ? end - rows[h] : 16);
      half[h].codes = task.codes + rows[h] * task.row_bytes;
    }
    for (int64_t first = 0; first < task.columns; first += kTilePanel) {
      for (int h = 0; h < 2; ++h) {
        half[h].first = first;
        half[h].end = first + kTilePanel < task.columns ? first + kTilePanel : task.columns;
        half[h].load_scales(rows[h]);
        unpack_tiles(half[h], codes, unpacked[h]);
      }
      run_panel();
    }
  }

  // Scales of whole rows and results of `count` tokens to memory.
  void finish_rows(int64_t row, int64_t end, int64_t first, int count) {
    for (int i = 0; i < tiles; ++i)
      for (int h = 0; h < 2 && row + 16 * h < end; ++h) {
        __m512i a[16];
        HM_UNROLL
        for (int r = 0; r < 16; ++r) a[r] = _mm512_load_si512(y[i][h][r]);
        transpose(a);
        HM_UNROLL
        for (int t = 0; t < 16; ++t) _mm512_store_si512(y[i][h][t], a[t]);
        finish(half[h].task, half[h].c, half[h].grid, row + 16 * h, half[h].rows, first + 16 * i,
               count - 16 * i < 16 ? count - 16 * i : 16, y[i][h]);
      }
  }
};

template <class C>
void tiles_of(const QmatmulTask& task, const CodePlan& c, int64_t begin, int64_t end, char* scratch) {
  const Grid grid = plan_grid<C>(task, c);
  const int64_t bytes = amx_tile_bytes(task.columns), planes = (task.columns + 255) / 256 * 256 * 48;
  const int most = 16 * amx_tiles(task.columns);
  TileTokens tokens[kMostAmxTiles];
  TileRows<C> rows{
      {{task, c, grid, nullptr, 0, 0, 0, {}, {}, nullptr}, {task, c, grid, nullptr, 0, 0, 0, {}, {}, nullptr}},
      plan_tile_codes<C>(c), tokens, 0, {}, {}};
  tile_config(tile_shapes(grid.unit));
  for (int64_t t = 0; t < task.token_count; t += most) {
    const int count = int(task.token_count - t < most ? task.token_count - t : most);
    rows.tiles = (count + 15) / 16;
    for (int i = 0; i < rows.tiles; ++i) {
      char* at = scratch + i * bytes;
      tokens[i] = {reinterpret_cast<int8_t*>(at), reinterpret_cast<AmxUnit*>(at + planes)};
      turn_tokens(task, task.tokens + t + 16 * i, count - 16 * i < 16 ? count - 16 * i : 16, C::kLayout, grid.unit,
                  tokens[i]);
    }
    for (int64_t row = begin; row < end; row += 32) {
      rows.run(row, end);
      rows.finish_rows(row, end, t, count);
    }
  }
  tile_release();
}

}  // namespace

void amx_qmatmul(const QmatmulTask& task, int64_t begin, int64_t end, char* scratch) {
  CodePlan c;
  plan_codes(task, c);
  with_codes(task, [&](auto codes) { tiles_of<decltype(codes)>(task, c, begin, end, scratch); });
}

}  // namespace hm
