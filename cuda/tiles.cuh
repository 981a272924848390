// 16 rows of a part times T tokens, by warps that share the columns: the loop of every product of decoding.
//
// Tensor cores multiply bytes: 16 rows of codes (A) by 8 columns (B), which are two spans of a token with four columns
// each: h, m, nothing, l. In k, whose order is free, lane t of four has WIDE columns of its own:
//
//   columns of a step    | lane 0, WIDE columns | lane 1 | lane 2 | lane 3 |      4 multiplications for each 32 of them
//   SIDE spans, 2 or 4   |        0        |      1       |  ...                  span j: zeros in B but for its lanes
//
// Sums of a span are exact integers; f32 joins spans, lanes and warps in an order that depends on the columns alone:
// a token's results have the same bits however many tokens share the codes.
#pragma once
#include "planes.cuh"

namespace hm {

template <int T, class C, int WIDE, int SIDE>
struct Tiles {
  static constexpr int STEP = 4 * WIDE, WORDS = WIDE * C::WIDTH / 32;
  static constexpr int SCALES = SIDE / 2;  // spans of a step whose sums a lane has, and B of a token
  static constexpr int LOADED = 2 * WORDS + 2 * SCALES * (C::SHIFTS ? 2 : 1);  // registers of a step
  // What registers are there for: tokens whose codes are made bytes together, steps that are loaded at once.
  static constexpr int TOGETHER = T == 1 || SIDE == 4 ? 1 : 2;
  static constexpr int AHEAD = T == 4 ? 1 : min_of(T == 1 ? 4 : 2, (C::PLANES > 1 ? 24 : T == 1 ? 40 : 32) / LOADED);
  static constexpr bool BYTES = C::PLANES == 1 && !C::SHIFTS;  // E2M1: scales are E8M0

  // What a lane loads for a step: codes of rows lane / 4 and 8 more, scales of its spans.
  struct Piece {
    uint codes[2][WORDS], scale[2][SCALES], bias[2][SCALES];
  };
  // 16 rows, and a step of theirs.
  struct Place {
    uint row, step;
  };

  const uint *codes_of, *scale_of_rows, *bias_of_rows;  // bias: or null
  uint stride, groups, per_group, last, end;            // per_group: 2^16 / spans of a group, rounded up; 0: one group
  int dtype;                                            // of scales
  uint bytes, planes[SCALES];                           // where a lane's columns of B lie: behind `bytes`, or in zeros
  uint sums;                                            // where what it needs of its spans lies
  uint lane;
  C codes;
  float sum[T][2];

  __device__ __forceinline__ Tiles(const uint* words, const Part& part, const Places& at, uint columns, uint end_row) {
    lane = lane_index();
    keep_here(lane);  // or what all kinds make of it would be made ahead of them, and kept in registers
    codes.open(words, part);
    codes_of = piece(words, part.codes), scale_of_rows = piece(words, part.scale);
    bias_of_rows = part.bias == NONE ? nullptr : piece(words, part.bias);
    stride = part.stride, end = end_row, dtype = scale_of(part.kind);
    constexpr uint span = STEP / SIDE;
    const uint group = group_of(part.kind);
    groups = group ? (columns + group - 1) / group : 1;
    per_group = group ? (65536 * span + group - 1) / group : 0;
    last = (columns - 1) / span;
    const uint n = lane / 4, t = lane % 4, plane = n % 4 == 3 ? 2 : n % 4;
    EACH(i, SCALES) {
      const bool live = n % 4 != 2 && 2 * i + n / 4 == t * SIDE / 4;
      planes[i] = (live ? at.bytes + 128 * plane : at.zeros) + 32 * t + (plane ? 16 : 0);
    }
    bytes = at.bytes, sums = at.sums + (own_span() * T * 2 + t % 2) * 16;
    clear();
  }
  __device__ __forceinline__ void clear() {
    EACH(i, T) sum[i][0] = sum[i][1] = 0.0f;
  }
  // Of a step's spans, the first whose sums a lane has.
  __device__ __forceinline__ uint own_span() const { return lane % 4 / 2; }

  // Of a place's rows, the lane's r-th; rows behind the last are the last.
  __device__ __forceinline__ uint row_of(const Place& at, int r) const { return min_of(at.row + lane / 4 + 8 * r, end - 1); }

  __device__ __forceinline__ void load(const Place& at, Piece& p) const {
    const uint from = (4 * at.step + lane % 4) * WORDS;
    EACH(r, 2) load_words<WORDS>(codes_of + (row_of(at, r) * stride + from), p.codes[r]);
    if constexpr (BYTES) load_scales<unsigned char>(at, p);
    else if (dtype == F32) load_scales<uint>(at, p);
    else load_scales<unsigned short>(at, p);
  }
  template <class A>
  __device__ __forceinline__ void load_scales(const Place& at, Piece& p) const {
    EACH(i, SCALES) {
      const uint span = min_of(at.step * SIDE + own_span() + 2 * i, last), group = span * per_group >> 16;
      EACH(r, 2) {
        const uint from = row_of(at, r) * groups + group;
        p.scale[r][i] = reinterpret_cast<const A*>(scale_of_rows)[from];
        if constexpr (C::SHIFTS) p.bias[r][i] = bias_of_rows ? reinterpret_cast<const A*>(bias_of_rows)[from] : 0;
      }
    }
  }
  // A loaded scale or bias: selections, no branches.
  __device__ __forceinline__ float number(uint bits) const {
    if constexpr (BYTES) return scale_number(bits, E8M0);
    const float half = from_f16(bits & 0xffffu);
    return dtype == F16 ? half : __uint_as_float(dtype == BF16 ? bits << 16 : bits);
  }

  // Adds a step's products to `sum`.
  __device__ __forceinline__ void multiply(const Piece& p, uint step) {
    if constexpr (TOGETHER == T) {
      multiply(p, step, 0);
    } else {
      HM_NO_UNROLL for (uint token = 0; token < T; token += TOGETHER) {
        multiply(p, step, token);
        // sums go round: those of the tokens in work are the first
        EACH(r, 2) {
          float first[TOGETHER];
          EACH(i, TOGETHER) first[i] = sum[i][r];
          EACH(i, T - TOGETHER) sum[i][r] = sum[i + TOGETHER][r];
          EACH(i, TOGETHER) sum[T - TOGETHER + i][r] = first[i];
        }
      }
    }
  }
  __device__ __forceinline__ void multiply(const Piece& p, uint step, uint token) {
    constexpr int TILES = TOGETHER * SCALES;
    int d[TILES][C::PLANES][4];
    float2 span[TILES];
    EACH(i, TILES) {
      const int4 start = *shared_at<int4>(sums + ((step * SIDE + i % SCALES * 2) * T + token + i / SCALES) * 32);
      span[i] = make_float2(__int_as_float(start.z), __int_as_float(start.w));
      EACH(q, C::PLANES) {
        const bool centred = C::PLANES == 1 || q == 1;
        d[i][q][0] = d[i][q][2] = centred ? start.x : MAGIC, d[i][q][1] = d[i][q][3] = centred ? start.y : MAGIC;
      }
    }
    EACH(h, WIDE / 16) {
      uint4 b[TILES];
      EACH(i, TILES) {
        // where a lane has no columns, zeros lie behind one another as tokens do
        const uint first = planes[i % SCALES], behind = first < bytes ? 0 : step * (WIDE / 32 * T * 384);
        b[i] = *shared_at<uint4>(((first + behind) ^ h % 2 * 16) + (h / 2 * T + token + i / SCALES) * 384);
      }
      EACH(m, 2) {
        uint a[C::PLANES][4];
        EACH(r, 2) EACH(k, 2) {
          uint bytes[C::PLANES];
          codes.four(p.codes[r] + h / 2 * C::WIDTH, 4 * (h % 2) + 2 * m + k, bytes);
          EACH(q, C::PLANES) a[q][2 * k + r] = bytes[q];
        }
        EACH(i, TILES) EACH(q, C::PLANES) {
          const uint half[2] = {m ? b[i].z : b[i].x, m ? b[i].w : b[i].y};
          if constexpr (C::SIGNED) multiply_bytes(d[i][q], a[q], half);
          else multiply_unsigned(d[i][q], a[q], half);
        }
      }
    }
    EACH(i, TILES) add(p, i, d[i], span[i]);
  }

  // Adds the integers of a B to its token's sums. span: the power of two of x, for the planes that this lane has, and sum(x).
  __device__ __forceinline__ void add(const Piece& p, int tile, const int (*d)[4], float2 span) {
    const int i = tile % SCALES, to = tile / SCALES;
    EACH(r, 2) {
      float f[C::PLANES][2];
      EACH(q, C::PLANES) EACH(c, 2) f[q][c] = __int_as_float(d[q][2 * r + c]) - __int_as_float(MAGIC);
      const float v = fmaf(codes.value(&f[0][0], 2), 256.0f, codes.value(&f[0][1], 2)) * span.x;
      const float scale = number(p.scale[r][i]);
      sum[to][r] = fmaf(v, scale, sum[to][r]);
      if constexpr (C::SHIFTS) {
        if (C::KIND == CODEBOOK || bias_of_rows)
          sum[to][r] = fmaf(fmaf(codes.base, scale, number(p.bias[r][i])), span.y, sum[to][r]);
      }
    }
  }

  // A warp's sums of 16 rows to shared memory, [row][token].
  __device__ __forceinline__ void leave(float* to) {
    const uint n = lane / 4, t = lane % 4;
    EACH(r, 2) EACH(token, T) {
      float v = sum[token][r] * codes.unit;
      v += __shfl_xor_sync(FULL, v, 1);
      v += __shfl_xor_sync(FULL, v, 2);
      if (t == 0) to[(n + 8 * r) * T + token] = v;
    }
    clear();
  }

  // 16 rows of every 128 >> split from first + own / 2^split * 16 on, in steps own % 2^split, + 2^split ..: 2^split warps
  // share rows. to[row - first][warp of these][16][T]: the warp's sums.
  __device__ __forceinline__ void run(uint first, uint own, uint split, uint steps, float* to) {
    const uint begin = own & ((1u << split) - 1);
    Place next{first + 16 * (own >> split), begin}, at = next;
    HM_NO_UNROLL while (at.row < end) {
      Piece pieces[AHEAD];
      EACH(j, AHEAD) {
        load(next, pieces[j]);  // behind the last row too: what is not always written takes registers all the time
        next.step += 1u << split;
        if (next.step >= steps) next.step = begin, next.row += 16 * WARPS >> split;
      }
      EACH(j, AHEAD) {
        if (at.row >= end) break;
        multiply(pieces[j], at.step);
        at.step += 1u << split;
        if (at.step < steps) continue;
        leave(to + (((at.row - first) << split) + 16 * begin) * T);
        at.step = begin, at.row += 16 * WARPS >> split;
      }
    }
  }
};

}  // namespace hm
