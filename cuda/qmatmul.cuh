// y = x W^T for a prompt on tensor cores: tiles of TOKENS tokens and 32 rows a warp. Codes become signed bytes in
// registers, once for all tokens of a tile; tokens are fixed point in PLANES bytes under a unit for each 128 columns
// (qmatmul_prepare.cuh). Integer sums are exact; f32 joins groups, or blocks of 128 columns, in the order of columns.
//
// What is multiplied, bytes at twice the rate of bf16, and the time of it in units of a bf16 product:
//                                PLANES 2                 PLANES 3
//   linear, E2M1                 2 bytes of x: 1.0        3: 1.5
//   codebook, PLANES bytes too   hh, hl, lh: 1.5          hh, hm, mh, mm, hl, lh: 3.0
//   plain, 16 bits               2 terms: 2.0 (x of that type: 1 term)
//   plain, f32                   -                        6: 6.0
// x is off by at most 1 / 32639 of the largest of its 128 columns with two planes, 1 / 8355711 with three; a codebook's
// entries as much of their largest, and the products left out are 2.01 / 32639 (4.02 / 8355711) of both largest at most.
//
// sm_90a has wgmma, of which mma reaches 60 %: A from the same registers, B from the same shared memory, so that only who
// multiplies differs. Plain numbers go by mma everywhere.
//
// A block of 128 columns is the pipeline's step: at H200's rate it takes 1000 clocks and more, in which L2 gives what the
// next one needs, so two stages are enough. Records lie in shared memory in lines of 128 bytes, whose 16-byte pieces
// are exchanged by the line's number: ldmatrix meets no bank twice. Lines of codes have an odd number of pieces.
#pragma once
#include "qmatmul_prepare.cuh"

namespace hm {

template <int PLANES, int TOKENS>
struct Prompt {
  enum { TILES = TOKENS / 8, RECORD = record_bytes(PLANES), X = PLANES * TOKENS * 128, FACTS = 20 * TOKENS };
  struct Head {
    uint4 table[4];  // bytes of entries, a plane each
    int source[TOKENS], target[TOKENS];  // token, and row of y or -1
    float factor;
  };
  static_assert(sizeof(Head) <= 1024, "");

  const char* records;
  const uint* words;
  Part part;
  TileKind kind;
  Head* head;
  char* stages;
  int columns, per_token, row, groups, pieces, stage_bytes;  // pieces: of 16 bytes, in a line of codes
  float y[2][TILES][4];

  __device__ char* stage(int i) const { return stages + i % 2 * stage_bytes; }
  __device__ int line() const { return (pieces | 1) * 16; }
  __device__ int steps() const {  // of 32 columns under one scale
    const int group = groups == 1 ? 128 : int(part.group);
    return kind.plain() || group % 128 == 0 ? 4 : group % 64 == 0 ? 2 : 1;
  }

  __device__ void load(int block) const {
    char *x = stage(block), *codes = x + X + FACTS;
    for (int i = threadIdx.x; i < TOKENS * PLANES * 8; i += blockDim.x) {
      const int token = i / (8 * PLANES), piece = i % 8, plane = i / 8 % PLANES;
      const char* from = records + (size_t(head->source[token]) * per_token + block) * RECORD + (8 * plane + piece) * 16;
      copy_async<16>(x + (plane * TOKENS + token) * 128 + ((piece ^ token % 8) << 4), from);
    }
    const int count = 4 / steps(), sums = kind.biased() ? count : 0;
    for (int i = threadIdx.x; i < TOKENS * (1 + sums); i += blockDim.x) {
      const int token = i % TOKENS, fact = i / TOKENS ? count + i / TOKENS - 1 : 0;
      const char* from = records + (size_t(head->source[token]) * per_token + block) * RECORD + PLANES * 128 + 4 * fact;
      copy_async<4>(x + X + 4 * i, from);
    }
    const int height = blockDim.x, whole = part.stride / 4;
    const char* first = reinterpret_cast<const char*>(piece(words, part.codes));
    int n = threadIdx.x / pieces, c = threadIdx.x % pieces;
    while (n < height) {
      const int at = block * pieces + c, in = min_of(row + n, part.rows - 1);
      // behind a row's end x is 0, and any codes will do
      copy_async<16>(codes + n * line() + c * 16, first + (size_t(in) * whole + (at < whole ? at : 0)) * 16);
      c += height % pieces, n += height / pieces;
      if (c >= pieces) c -= pieces, n++;
    }
    copies_commit();
  }

  // Adds a's STEPS steps, from step `first` on, times a plane of all tokens to sum(half, 8 tokens).
  template <int STEPS, class Sum, class F>
  __device__ void multiply(const char* x, int first, const uint (&a)[2][STEPS][4], Sum sum, F mma) const {
    const uint lane = lane_index(), line = (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 ^ lane) & 1) * 16 + (lane & 6) * 16;
    EACH(s, STEPS) {
      const char* from = x + (line ^ (first + s) << 5);
      EACH(p, TILES / 2) {
        uint b[4];
        load_matrices(b, from + 2048 * p);
        EACH(m, 2) EACH(i, 2) mma(sum(m, 2 * p + i), a[m][s], b + 2 * i);
      }
    }
  }

  __device__ float load_scale(const uint* p, size_t i) const {
    if (kind.scale() != E8M0) return load_number(p, i, kind.scale());
    return scale_number(reinterpret_cast<const unsigned char*>(p)[i], E8M0);
  }

  // The scale and the bias of the lane's four rows, of the group that column is in.
  __device__ void factors(int column, float* scale, float* shift) const {
    const int g = groups == 1 ? 0 : column / int(part.group);
    EACH(r, 4) {
      const uint n = min_of(row + 32 * warp_index() + 8 * r + lane_index() / 4, part.rows - 1);
      const size_t i = size_t(n) * groups + g;
      const float s = load_scale(piece(words, part.scale), i);
      scale[r] = s * head->factor;
      const bool biased = kind.biased() && part.bias != NONE;
      shift[r] = biased ? load_scale(piece(words, part.bias), i) : 0.0f;
      if (kind.biased()) shift[r] += float(1 << (kind.bits() - 1)) * s;
    }
  }

  // y += unit * sums of half m under a scale, and what a bias adds. facts: of the block's tokens; total: which of their
  // sums.
  template <bool WHOLE, class F>
  __device__ void join(int m, const float* facts, int total, const float* scale, const float* shift, F sum) {
    EACH(j, TILES) {
      const int token = 8 * j + lane_index() % 4 * 2;
      const float2 unit = *reinterpret_cast<const float2*>(facts + token);
      float2 all = make_float2(0.0f, 0.0f);
      if (!WHOLE && kind.biased()) all = *reinterpret_cast<const float2*>(facts + (1 + total) * TOKENS + token);
      EACH(i, 4) {
        float& to = y[m][j][i];
        const float d = sum(j, i), u = i % 2 ? unit.y : unit.x;
        to = WHOLE ? fmaf(d, u, to) : fmaf(d * u, scale[2 * m + i / 2], to);
        if (!WHOLE && kind.biased()) to = fmaf(i % 2 ? all.y : all.x, shift[2 * m + i / 2], to);
      }
    }
  }

  // Sums of bytes: high counts 256 times low, where there are both.
  struct Sums {
    int high[TILES][4], low[TILES][4];
    __device__ void clear() { EACH(j, TILES) EACH(i, 4) high[j][i] = low[j][i] = 0; }
    __device__ void shift() { EACH(j, TILES) EACH(i, 4) high[j][i] *= 256; }
    __device__ float operator()(int j, int i) const {
      return PLANES == 2 ? float(high[j][i]) : fmaf(float(high[j][i]), 256.0f, float(low[j][i]));
    }
  };

  // Bytes c of codes times bytes q of x: products of 256^-(c + q). The sums of the largest are shifted before the next.
  template <int STEPS>
  __device__ void multiply_both(const char* x, const uint* codes, int first, int c, int q, uint (&a)[2][STEPS][4],
                                Sums (&sums)[2]) const {
    if (q == 0) EACH(m, 2) decode<STEPS>(kind, codes + 4 * m * line(), line() / 4, head->table[c], c, a[m]);
    if (c + q == 1 && q == 1) EACH(m, 2) sums[m].shift();
    auto sum = [&](int m, int j) { return c + q < 2 ? sums[m].high[j] : sums[m].low[j]; };
    multiply<STEPS>(x + q * TOKENS * 128, first, a, sum, multiply_bytes);
  }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // The same by warpgroups. The halves take turns: one is decoded, shifted or joined while the other multiplies.
  template <int LEFT>
  static __device__ void wait_half(Sums& sums) {
    group_wait<LEFT>();
    group_sums(sums.high);
    if (PLANES > 2) group_sums(sums.low);
  }
  template <int STEPS>
  __device__ void start_half(int m, const char* x, const uint* codes, int first, int c, int q, uint (&a)[STEPS][4],
                             Sums& sums) const {
    if (c + q) wait_half<1>(sums);
    if (c + q == 1 && q == 1) sums.shift();
    if (q == 0) decode<STEPS>(kind, codes + 4 * m * line(), line() / 4, head->table[c], c, a);
    const unsigned long long b = group_matrix(x + q * TOKENS * 128) + 2 * first;
    group_fence();
    EACH(s, STEPS) multiply_group(c + q < 2 ? sums.high : sums.low, a[s], b + 2 * s);
    group_commit();
  }
#endif

  template <int STEPS>
  __device__ void integers(int block) {
    const char* x = stage(block);
    const float* facts = reinterpret_cast<const float*>(x + X);
    const uint* codes = reinterpret_cast<const uint*>(x + X + FACTS + (32 * warp_index() + lane_index() / 4) * line());
    const bool whole = groups == 1 && !kind.biased();
    for (int first = 0; first < 4; first += STEPS) {
      const int column = 128 * block + 32 * first;
      if (column >= columns) break;
      float scale[4], shift[4];
      if (!whole) factors(column, scale, shift);
      Sums sums[2];
      EACH(m, 2) sums[m].clear();
      uint a[2][STEPS][4];
      EACH(c, PLANES) {
        if (c && !kind.book()) break;
        EACH(q, PLANES - c) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
          EACH(m, 2) start_half<STEPS>(m, x, codes + first * kind.bits(), first, c, q, a[m], sums[m]);
#else
          multiply_both<STEPS>(x, codes + first * kind.bits(), first, c, q, a, sums);
#endif
        }
      }
      EACH(m, 2) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        if (m == 0) wait_half<1>(sums[0]);
        else wait_half<0>(sums[1]);
#endif
        if (whole) join<true>(m, facts, 0, scale, shift, sums[m]);
        else join<false>(m, facts, first / STEPS, scale, shift, sums[m]);
      }
    }
  }

  // Term c of 16 columns, a step, of numbers of 32 bits; those of 16 as they are.
  __device__ void numbers(const uint* codes, int c, uint (&a)[2][1][4]) const {
    EACH(r, 8) {
      const uint* from = codes + r % 4 * 2 * line() + r / 4 * (kind.bits() / 4);
      const uint t = lane_index() % 4;
      uint& to = a[r % 4 / 2][0][r % 2 + r / 4 * 2];
      if (kind.bits() == 16) {
        to = from[t];
        continue;
      }
      uint two = 0;
      EACH(i, 2) {
        float v = __uint_as_float(from[2 * t + i]), b = 0.0f;
        EACH(p, PLANES) {
          if (p > c) break;
          v -= b;
          b = __bfloat162float(__float2bfloat16_rn(v));
        }
        two |= __float_as_uint(b) >> 16 << 16 * i;
      }
      to = two;
    }
  }

  // 64 columns of plain numbers; terms: that a record has.
  template <class F>
  __device__ void plain(int block, int terms, F mma) {
    const char* x = stage(block);
    const uint* codes = reinterpret_cast<const uint*>(x + X + FACTS + (32 * warp_index() + lane_index() / 4) * line());
    float sums[2][TILES][4];
    EACH(m, 2) EACH(j, TILES) EACH(i, 4) sums[m][j][i] = 0.0f;
    auto all = [&](int m, int j) { return sums[m][j]; };
    HM_NO_UNROLL for (int s = 0; s < 4; s++, codes += kind.bits() / 2) {
      EACH(c, PLANES) {
        if (c && kind.bits() == 16) break;
        uint a[2][1][4];
        numbers(codes, c, a);
        EACH(q, PLANES - c) if (q < terms) multiply<1>(x + q * TOKENS * 128, s, a, all, mma);
      }
    }
    EACH(m, 2) {
      auto sum = [&](int j, int i) { return sums[m][j][i]; };
      join<true>(m, reinterpret_cast<const float*>(x + X), 0, nullptr, nullptr, sum);
    }
  }

  __device__ void run(int terms) {
    const int blocks = kind.plain() ? (columns + 63) / 64 : (columns + 127) / 128, at_once = steps();
    EACH(m, 2) EACH(j, TILES) EACH(i, 4) y[m][j][i] = 0.0f;
    load(0);
    for (int block = 0; block < blocks; block++) {
      copies_wait();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
      group_copies_fence();
#endif
      __syncthreads();
      if (block + 1 < blocks) load(block + 1);
      if (!kind.plain()) {
        if (at_once == 4) integers<4>(block);
        else if (at_once == 2) integers<2>(block);
        else integers<1>(block);
      } else if (kind.form() == HALVES) {
        plain(block, terms, multiply_halves);
      } else {
        plain(block, terms, multiply_bfloats);
      }
    }
    if (kind.plain() || groups > 1 || kind.biased()) return;
    float scale[4], shift[4];
    factors(0, scale, shift);
    EACH(m, 2) EACH(j, TILES) EACH(i, 4) y[m][j][i] *= scale[2 * m + i / 2];
  }

  __device__ void store(const void* residual, void* to, int rows, int above, int dtype) const {
    EACH(m, 2) {
      EACH(i, 4) {
        const uint n = row + 32 * warp_index() + 16 * m + i / 2 * 8 + lane_index() / 4;
        EACH(j, TILES) {
          const int target = head->target[8 * j + lane_index() % 4 * 2 + i % 2];
          if (target < 0 || n >= part.rows) continue;
          const size_t at = size_t(target) * rows + above + n;
          store_number(to, at, dtype, residual ? load_number(residual, at, dtype) + y[m][j][i] : y[m][j][i]);
        }
      }
    }
  }
};

// y[t, n] = residual[t, n] + x[t] . W[n], or, of pairs p = order[i]: y[p, n] = ... x[p / slots] . W[expert][n]
//   records: of qmatmul_tokens   parts: u32 [experts, parts_each, 8]   rows: of an expert
//   in, columns: of parts that read x as it is, and of those that read it rotated
//   tiles: of qmatmul_schedule, or null without experts
//   variants, rotated: 4 bits for each form, where the records for parts that read x as it is, or rotated, are
// Blocks: (rows / threads, tiles), of one or two warpgroups. Shared: 2 KB and two stages.
template <int PLANES, int TOKENS>
struct qmatmul {
  static constexpr int THREADS = 256;
  static __device__ void run(const void* records, const uint* words, const uint* parts, const int* order,
                             const int* tiles, const void* residual, void* y, int in, int columns, int rows,
                             int parts_each, int pairs, int slots, int per_token, int variants, int rotated, int terms,
                             int y_dtype) {
    using Tile = Prompt<PLANES, TOKENS>;
    auto* head = shared_memory<typename Tile::Head>();
    int first = blockIdx.y * TOKENS, end = min(first + TOKENS, pairs), expert = 0;
    wait_for_previous();
    if (tiles) {
      if (int(blockIdx.y) >= tiles[0]) return;
      const int* tile = tiles + 4 * (blockIdx.y + 1);
      expert = tile[0], first = tile[1], end = tile[2];
    }
    const Part* table = reinterpret_cast<const Part*>(parts) + size_t(expert) * parts_each;
    const int height = blockDim.x;
    int block = blockIdx.x, above = 0, p = 0;
    for (; p < parts_each; p++) {
      const int blocks = (int(table[p].rows) + height - 1) / height;
      if (block < blocks) break;
      block -= blocks, above += table[p].rows;
    }
    if (p == parts_each) return;
    const Part part = table[p];
    const TileKind kind{part.kind};
    for (int i = threadIdx.x; i < TOKENS; i += height) {
      const int pair = min(first + i, end - 1), place = order ? order[pair] : pair;
      head->source[i] = place / slots;
      head->target[i] = first + i < end ? place : -1;
    }
    if (warp_index() == 0) {
      make_table<PLANES>(kind, reinterpret_cast<const float*>(piece(words, part.table)),
                         reinterpret_cast<unsigned char*>(head->table), &head->factor);
    }
    __syncthreads();
    const int variant = (is_rotated(part.kind) ? rotated : variants) >> 4 * kind.form() & 15;
    const int width = is_rotated(part.kind) ? columns : in;
    const int groups = group_of(part.kind) ? (width + int(part.group) - 1) / int(part.group) : 1;
    const int pieces = kind.plain() ? kind.bits() / 2 : kind.bits();
    const int stage = (Tile::X + Tile::FACTS + height * (pieces | 1) * 16 + 1023) / 1024 * 1024;
    const uint behind = -static_cast<uint>(__cvta_generic_to_shared(head + 1)) % 1024;  // warpgroups want multiples
    const size_t before = size_t(variant) * (pairs / slots) * per_token * Tile::RECORD;
    Tile tile{static_cast<const char*>(records) + before, words, part, kind, head, reinterpret_cast<char*>(head + 1) + behind,
              width, per_token, block * height, groups, pieces, stage, {}};
    tile.run(terms);
    tile.store(residual, y, rows, above, y_dtype);
  }
};

}  // namespace hm
