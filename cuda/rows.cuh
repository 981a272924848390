// Rows of a part times T tokens, by one block of WARPS warps: what every product of decoding is made of.
//
//   fetch_rows(words, part, columns, first, end)   some rows on the way to the L2, before wait_for_previous()
//   clear_zeros(), lay_token<T>(...)      for each of T tokens, then a barrier; columns: of the part, which are the
//                                         padded ones only where it reads x rotated
//   part_rows<T>(words, part, columns, first, end)
//       rows first .. end - 1 of a part, CHUNK at most, by all threads: row n times token t is then
//       results<T>()[(n - first) * T + t], in shared memory. Begins and ends with a barrier.
//
// Tensor cores multiply bytes: 16 rows of codes (A) by 8 columns (B), which are pairs of (token, span) with four
// columns each: h, m, nothing, l. In k, whose order is free, lane t of four has WIDE columns of its own:
//
//   columns of a step    | lane 0, WIDE columns | lane 1 | lane 2 | lane 3 |      4 multiplications for each 32 of them
//   spans                |        0        |      1       |  ...                  span j: zeros in B but for its lanes
//
// Sums of a span are exact integers; f32 joins spans, lanes and warps in an order that depends on the columns alone:
// a token's results have the same bits however many tokens share the codes.
#pragma once
#include "planes.cuh"

namespace hm {

// Lays one token into shared memory in the form that a part's rows want, by `warps` warps, of which this is number
// `warp`. No barriers.
template <int T, class Get>
__device__ __forceinline__ void lay_token(const Places& at, uint kind, uint columns, int token, Get get,
                                          uint warp = warp_index(), uint warps = WARPS) {
  if (table_of(kind) == PLAIN) make_numbers<T>(at, columns, token, get, warp, warps);
  else make_planes<T>(at, form_of(kind), columns, token, get, warp, warps);
}

// Bytes first .. end - 1 on their way to the L2, where they need no registers.
__device__ __forceinline__ void fetch_bytes(const uint* from, size_t first, size_t end) {
  HM_NO_UNROLL for (size_t at = first + threadIdx.x * 128; at < end; at += 32 * WARPS * 128)
    fetch_line(reinterpret_cast<const unsigned char*>(from) + at);
}
// Codes, scales and biases of rows first .. end - 1.
__device__ __forceinline__ void fetch_rows(const uint* words, const Part& part, uint columns, uint first, uint end) {
  if (first >= end) return;
  fetch_bytes(piece(words, part.codes), size_t(first) * part.stride * 4, size_t(end) * part.stride * 4);
  if (table_of(part.kind) == PLAIN || group_of(part.kind) == 0) return;
  const uint dtype = scale_of(part.kind), size = dtype == F32 ? 4 : dtype == E8M0 ? 1 : 2;
  const size_t line = size_t(columns + part.group - 1) / part.group * size;
  fetch_bytes(piece(words, part.scale), first * line, end * line);
  if (part.bias != NONE) fetch_bytes(piece(words, part.bias), first * line, end * line);
}

constexpr uint CHUNK = 128;  // rows of a block at once, at most
template <int T>
__device__ __forceinline__ float* results() {
  return shared_at<float>(RESULTS);
}

// How a block's warps share rows of a kind: `split` of them a tile of 16 rows.
__host__ __device__ constexpr uint split_of(uint columns, uint kind) {
  const uint step = 4 * wide_of(table_of(kind), bits_of(kind), group_of(kind)), steps = (columns + step - 1) / step;
  return steps >= 8 ? 8 : steps >= 4 ? 4 : steps >= 2 ? 2 : 1;
}

template <int T, class C, int WIDE>
struct Tiles {
  static constexpr int STEP = 4 * WIDE, WORDS = WIDE * C::WIDTH / 32;
  static constexpr int TILES = C::PLANES == 1 && T == 1 ? 2 : 1;      // at once: sums of more leave no registers
  static constexpr bool LOOPS = T > 1 || (TILES == 1 && WIDE == 32);  // there may be more tiles than that

  // What a lane loads for a step: codes of rows lane / 4 and 8 more; scales of its columns in two tiles.
  struct Piece {
    uint codes[2][WORDS];
  };
  struct Scales {
    uint scale[2][2], bias[2][2];
  };

  const uint* words;
  Part part;
  uint columns, end;
  Places at;
  uint groups, per_group;  // per_group: 2^16 / spans of a group, rounded up; 0: one group
  uint span_log, side_log;  // of a span's columns, and of the spans of four lanes side by side
  C codes;
  float sum[2 * T][2];  // of tiles, both rows

  __device__ __forceinline__ void open() {
    codes.open(words, part);
    const uint group = group_of(part.kind), span = span_of(table_of(part.kind), group);
    groups = group ? (columns + group - 1) / group : 1;
    per_group = group ? (65536 * span + group - 1) / group : 0;
    span_log = span == 128 ? 7 : span == 64 ? 6 : 5;
    side_log = (WIDE == 64 ? 8 : 7) - span_log;
    clear();
  }
  __device__ __forceinline__ void clear() {
    EACH(i, 2 * T) sum[i][0] = sum[i][1] = 0.0f;
  }
  __device__ __forceinline__ bool two_scales() const { return side_log == 2; }
  // The span that pair p has, counted from the row's first.
  __device__ __forceinline__ uint span_at(uint step, uint p) const {
    return (step << side_log) + (p & ((1u << side_log) - 1));
  }

  __device__ __forceinline__ void load(Piece& p, uint step, uint row) const {
    EACH(r, 2) {
      const uint n = row + lane_index() / 4 + 8 * r;
      const uint* from = piece(words, part.codes) + (n * part.stride + (4 * step + lane_index() % 4) * WORDS);
      if (n < end) load_words<WORDS>(from, p.codes[r]);
      else EACH(i, WORDS) p.codes[r][i] = 0;
    }
  }
  static constexpr bool BYTES = C::PLANES == 1 && !C::SHIFTS;  // E2M1: scales are E8M0

  __device__ __forceinline__ void load(Scales& p, uint step, uint row) const {
    if constexpr (BYTES) load_as<unsigned char>(p, step, row);
    else if (scale_of(part.kind) == F32) load_as<uint>(p, step, row);
    else load_as<unsigned short>(p, step, row);
  }
  template <class A>
  __device__ __forceinline__ void load_as(Scales& p, uint step, uint row) const {
    const bool biased = C::SHIFTS && part.bias != NONE;
    const uint last = (columns - 1) >> span_log;
    EACH(r, 2) {
      const uint n = row + lane_index() / 4 + 8 * r;
      EACH(i, 2) {
        const uint span = min_of(span_at(step, 2 * i + lane_index() % 4 / 2), last);
        const uint g = n * groups + (span * per_group >> 16);
        const bool wanted = n < end && (i == 0 || two_scales());
        p.scale[r][i] = wanted ? uint(reinterpret_cast<const A*>(piece(words, part.scale))[g]) : 0;
        if constexpr (C::SHIFTS) {
          p.bias[r][i] = wanted && biased ? uint(reinterpret_cast<const A*>(piece(words, part.bias))[g]) : 0;
        }
      }
    }
  }
  // A loaded scale or bias: selections, no branches.
  __device__ __forceinline__ float number(uint bits) const {
    const int dtype = scale_of(part.kind);
    if constexpr (BYTES) return scale_number(bits, E8M0);
    const float half = from_f16(bits & 0xffffu);
    return dtype == F16 ? half : __uint_as_float(dtype == BF16 ? bits << 16 : bits);
  }

  // Where a lane's sums of x lie, for a tile.
  __device__ __forceinline__ uint sums_at(uint step, uint tile) const {
    const uint own = 2 * tile + lane_index() % 4 / 2, token = min_of(own >> side_log, T - 1);
    return at.sums + ((span_at(step, own) * T + token) * 2 + lane_index() % 2) * 16;
  }

  // Adds a step's products to `sum`, two tiles at a time: 4 pairs, in the order (token, span).
  __device__ __forceinline__ void multiply(Piece& p, uint step, uint row) {
    Scales scales;
    load(scales, step, row);
    const uint tiles = ((T << side_log) + 1) / 2;
    uint first = 0;
    HM_NO_UNROLL do {
      // or bytes of all codes would be kept in registers from turn to turn
      if (LOOPS) EACH(r, 2) EACH(i, WORDS) keep_here(p.codes[r][i]);
      const bool two = T > 1 || two_scales();  // else the second has no pair
      int d[TILES][C::PLANES][4];
      uint plane[TILES], of_block[TILES];
      EACH(i, TILES) {
        const int2 start = *shared_at<int2>(sums_at(step, first + i));
        EACH(q, C::PLANES) {
          const bool centred = C::PLANES == 1 || q == 1;
          d[i][q][0] = d[i][q][2] = centred ? start.x : MAGIC, d[i][q][1] = d[i][q][3] = centred ? start.y : MAGIC;
        }
        const uint n = lane_index() / 4, t = lane_index() % 4, pair = 2 * (first + i) + n / 4, of = pair >> side_log;
        const bool live = n % 4 != 2 && of < T && (pair & ((1u << side_log) - 1)) == t << side_log >> 2;
        const uint q = n % 4 == 3 ? 2 : n % 4;
        plane[i] = (live ? at.bytes + of * 384 + 128 * q : at.zeros) + 32 * t + (q ? 16 : 0);
        of_block[i] = live ? T * 384 : 0;
      }
      EACH(h, WIDE / 16) {
        uint b[TILES][4];
        EACH(i, TILES) {
          if (i && !two) break;
          const uint from = plane[i] + (step * (WIDE / 32) + h / 2) * of_block[i];
          const uint4 four = *shared_at<uint4>(from ^ (h % 2 * 16));
          b[i][0] = four.x, b[i][1] = four.y, b[i][2] = four.z, b[i][3] = four.w;
        }
        EACH(m, 2) {
          uint a[C::PLANES][4];
          EACH(r, 2) EACH(q, 2) {
            uint bytes[C::PLANES];
            codes.four(p.codes[r] + h / 2 * C::WIDTH, 4 * (h % 2) + 2 * m + q, bytes);
            EACH(i, C::PLANES) a[i][2 * q + r] = bytes[i];
          }
          EACH(i, TILES) {
            if (i && !two) break;
            EACH(q, C::PLANES) multiply_bytes(d[i][q], a[q], b[i] + 2 * m);
          }
        }
      }
      EACH(i, TILES) {
        if (i && !two) break;
        add(scales, first + i, d[i], *shared_at<float2>(sums_at(step, first + i) + 8));
      }
      first += TILES;
    } while (LOOPS && first < tiles);
  }

  // Adds a tile's integers to its sums. span: the power of two of x, for the planes that this lane has, and sum(x).
  __device__ __forceinline__ void add(const Scales& p, uint tile, const int (*d)[4], float2 span) {
    const bool biased = table_of(part.kind) == CODEBOOK || part.bias != NONE;
    EACH(r, 2) {
      float f[C::PLANES][2];
      EACH(q, C::PLANES) EACH(c, 2) f[q][c] = __int_as_float(d[q][2 * r + c]) - __int_as_float(MAGIC);
      const float v = fmaf(codes.value(&f[0][0], 2), 256.0f, codes.value(&f[0][1], 2)) * span.x;
      const bool other = tile % 2 && two_scales();
      const float scale = number(other ? p.scale[r][1] : p.scale[r][0]);
      float shift = 0.0f;
      if constexpr (C::SHIFTS) {
        const float bias = number(other ? p.bias[r][1] : p.bias[r][0]);
        if (biased) shift = fmaf(codes.base, scale, bias);
      }
      EACH(j, 2 * T) {
        if (uint(j) != tile) continue;
        sum[j][r] = fmaf(v, codes.unit * scale, sum[j][r]);
        if constexpr (C::SHIFTS) {
          if (biased) sum[j][r] = fmaf(shift, span.y, sum[j][r]);
        }
      }
    }
  }

  // A warp's sums of 16 rows to shared memory, [row][token].
  __device__ __forceinline__ void leave(float* to) {
    const uint n = lane_index() / 4, t = lane_index() % 4;
    EACH(r, 2) EACH(token, T) {
      float v = side_log == 0 ? sum[token / 2][r] : side_log == 1 ? sum[token][r] : sum[2 * token][r] + sum[2 * token + 1][r];
      v += __shfl_xor_sync(FULL, v, 1);
      const float other = __shfl_xor_sync(FULL, v, 2);
      if (side_log) v += other;
      if (t == (side_log ? 0 : token % 2 * 2)) to[(n + 8 * r) * T + token] = v;
    }
    clear();
  }

  __device__ __forceinline__ void run(uint first) {
    const uint split = split_of(columns, part.kind), steps = (columns + STEP - 1) / STEP;
    const uint own = warp_index() % split, height = 16 * WARPS / split;
    open();
    uint row = first + 16 * (warp_index() / split);
    for (uint begin = first, turn = 0; begin < end; begin += height, turn++) {
      if (T == 1) fetch_rows(words, part, columns, begin + height, min_of(begin + 2 * height, end));
      for (uint step = own; step < steps; step += split) {
        if (row >= end) break;
        Piece piece;
        load(piece, step, row);
        multiply(piece, step, row);
      }
      row += height;
      float* join = shared_at<float>(at.join) + turn % 2 * (WARPS * 16 * T);
      leave(join + warp_index() * 16 * T);
      __syncthreads();
      for (uint k = threadIdx.x; k < height * T; k += 32 * WARPS) {
        const float* parts = join + k / (16 * T) * split * 16 * T + k % (16 * T);
        float y = parts[0];
        for (uint w = 1; w < split; w++) y += parts[w * 16 * T];
        results<T>()[(begin - first) * T + k] = y;
      }
    }
  }
};

// Plain numbers: a warp has a row, its lanes 8 columns each of 256.
template <int T, int DTYPE>
__device__ __forceinline__ void plain_rows(const uint* words, const uint* part_of, uint columns, uint first, uint end) {
  const Part part = part_at(part_of, 0);
  const Places at = places_for<T>(columns);
  constexpr int EACH_WORDS = DTYPE == F32 ? 8 : 4, AHEAD = 4;
  const uint lane = lane_index(), wide = (columns + 255) / 256 * 256;
  for (uint n = first + warp_index(); n < end; n += WARPS) {
    float sum[T];
    EACH(t, T) sum[t] = 0.0f;
    const uint* row = piece(words, part.codes) + size_t(n) * part.stride;
    for (uint k0 = 0; k0 < wide; k0 += 256 * AHEAD) {
      uint w[AHEAD][EACH_WORDS];
      EACH(i, AHEAD) {
        const uint k = k0 + 256 * i + 8 * lane;
        if (k < columns) load_words<EACH_WORDS>(row + k / 8 * EACH_WORDS, w[i]);
        else EACH(j, EACH_WORDS) w[i][j] = 0;
      }
      EACH(i, AHEAD) {
        const uint k = k0 + 256 * i + 8 * lane;
        if (k0 + 256 * i >= wide) break;
        EACH(t, T) {
          const float* x = shared_at<float>(at.bytes) + t * wide;
          const float4 a = *reinterpret_cast<const float4*>(x + slot(k)), b = *reinterpret_cast<const float4*>(x + slot(k + 4));
          const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
          EACH(j, 8) {
            const uint bits = DTYPE == F32 ? w[i][j % EACH_WORDS] : w[i][j / 2] >> 16 * (j % 2) & 0xffffu;
            sum[t] = fmaf(scale_number(bits, DTYPE), y[j], sum[t]);
          }
        }
      }
    }
    EACH(t, T) {
      sum[t] = warp_sum(sum[t]);
      if (int(lane) == t) results<T>()[(n - first) * T + t] = sum[t];
    }
  }
}

// f.run<Tiles>(), or f.plain<DTYPE>(), for the kind that a part has; part_of: its 8 numbers in the table.
template <int T, class F>
__device__ __forceinline__ void with_kind(const uint* words, const uint* part_of, uint kind, F f) {
#define HM_RUN(WIDE, ...)                                                                                           \
  {                                                                                                                 \
    if constexpr (may_come(__VA_ARGS__::KIND, __VA_ARGS__::WIDTH)) f.template run<Tiles<T, __VA_ARGS__, WIDE>>(); \
    return;                                                                                                         \
  }
  const int table = table_of(kind), bits = bits_of(kind);
  if (table == PLAIN) {
    if constexpr (may_come(PLAIN, 32)) {
      if (scale_of(kind) == F32) return f.template plain<F32>();
    }
    if constexpr (may_come(PLAIN, 16)) {
      if (scale_of(kind) == F16) return f.template plain<F16>();
      if (scale_of(kind) == BF16) return f.template plain<BF16>();
    }
    return;
  }
  if (table == CODEBOOK) {
    if (bits == 4) HM_RUN(32, Codes<CODEBOOK, 4>);
    if (bits == 3) HM_RUN(32, Codes<CODEBOOK, 3>);
    if (wide_of(table, bits, group_of(kind)) == 32) HM_RUN(32, TwoBits<false>);
    if (TwoBits<true>::fits(words, part_at(part_of, 0))) HM_RUN(64, TwoBits<true>);
    HM_RUN(64, TwoBits<false>);
  }
  if (table == E2M1 || table == E2M1_GGUF) HM_RUN(32, Codes<E2M1, 4>);
  switch (bits) {
    case 2: HM_RUN(32, Codes<LINEAR, 2>);
    case 3: HM_RUN(32, Codes<LINEAR, 3>);
    case 4: HM_RUN(32, Codes<LINEAR, 4>);
    case 5: HM_RUN(32, Codes<LINEAR, 5>);
    case 6: HM_RUN(32, Codes<LINEAR, 6>);
    default: HM_RUN(32, Codes<LINEAR, 8>);
  }
#undef HM_RUN
}

template <int T>
struct BlockRows {
  const uint *words, *part_of;
  uint columns, first, end;

  template <class Tiles>
  __device__ __forceinline__ void run() {
    Tiles tiles{words, part_at(part_of, 0), columns, end, places_for<T>(columns)};
    tiles.run(first);
  }
  template <int DTYPE>
  __device__ __forceinline__ void plain() {
    plain_rows<T, DTYPE>(words, part_of, columns, first, end);
  }
};
// part_of: a part's 8 numbers in the table, of this kind.
template <int T>
__device__ __forceinline__ void part_rows(const uint* words, const uint* part_of, uint kind, uint columns, uint first, uint end) {
  __syncthreads();
  with_kind<T>(words, part_of, kind, BlockRows<T>{words, part_of, columns, first, end});
  __syncthreads();
}

}  // namespace hm
