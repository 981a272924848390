// Processors with AMX: AVX-512's kernels, but codes times many tokens go through tiles (qmatmul_amx.h) and come out as
// the same bits.
#pragma once
#include "kernels.h"

namespace hm {

// Whether this processor multiplies tiles of bytes and the system lets this process.
bool amx_usable();

// The table of kernels; only for AVX-512 where amx_usable().
const Kernels& kernels_amx();

// 16 tokens' units of columns, turned: one number of each token side by side.
struct AmxUnit {
  int32_t start[3][16];
  float unit[16], total[16];
};

// Memory of 16 tokens as tiles: three planes of bytes, and the units, at most one to 32 columns.
static inline int64_t amx_tile_bytes(int64_t columns) {
  const int64_t padded = (columns + 255) / 256 * 256;
  return padded * 48 + padded / 32 * int64_t(sizeof(AmxUnit));
}

// How many times 16 tokens share unpacked codes: as many as half of a second-level cache holds.
constexpr int kMostAmxTiles = 8;
static inline int amx_tiles(int64_t columns) {
  const int64_t fit = (int64_t(1) << 20) / amx_tile_bytes(columns);
  return int(fit < 1 ? 1 : fit > kMostAmxTiles ? kMostAmxTiles : fit);
}

// Rows [begin, end) of a task of bytes (no codebook, no plain numbers) with all of its tokens. `scratch` is
// amx_tiles * amx_tile_bytes bytes, 64-byte aligned.
void amx_qmatmul(const QmatmulTask& task, int64_t begin, int64_t end, char* scratch);

}  // namespace hm
