// Rows of a part times T tokens, by one block of WARPS warps: what every product of decoding is made of.
//
//   fetch_rows(words, part, columns, first, end)   some rows on the way to the L2, before wait_for_previous()
//   clear_zeros<T>(), lay_token<T>(...)   for each of T tokens, then a barrier; columns: of the part, which are the
//                                         padded ones only where it reads x rotated
//   part_rows<T>(words, part, columns, first, end)
//       rows first .. end - 1 of a part, CHUNK<T> at most, by all threads: row n times token t is then
//       results<T>()[(n - first) * T + t], in shared memory. Begins and ends with a barrier.
#pragma once
#include "tiles.cuh"

namespace hm {

// Lays one token into shared memory in the form that a part's rows want, by `warps` warps, of which this is number
// `warp`. No barriers.
template <int T, class Get>
__device__ __forceinline__ void lay_token(const Places& at, uint kind, uint columns, int token, Get get,
                                          uint warp = warp_index(), uint warps = WARPS) {
  if (table_of(kind) == PLAIN) make_numbers<T>(at, columns, token, get, warp, warps);
  else make_planes<T>(at, form_of(kind), columns, token, get, warp, warps);
}

// Bytes begin .. end - 1 of an array on their way to the L2, where they need no registers: by `step` threads, of which
// this is number `index`.
__device__ __forceinline__ void fetch_lines(const void* array, size_t begin, size_t end, uint index, uint step) {
  const unsigned char* p = static_cast<const unsigned char*>(array);
  HM_NO_UNROLL for (size_t at = begin + 128 * index; at < end + 127; at += 128 * step) fetch_line(p + (at < end ? at : end - 1));
}
// Codes, scales and biases of rows first .. end - 1 of a part.
__device__ __forceinline__ void fetch_rows(const uint* words, const Part& part, uint columns, uint first, uint end,
                                           uint index = threadIdx.x, uint step = 32 * WARPS) {
  if (first >= end) return;
  fetch_lines(piece(words, part.codes), size_t(first) * part.stride * 4, size_t(end) * part.stride * 4, index, step);
  if (table_of(part.kind) == PLAIN) return;
  const uint group = group_of(part.kind), groups = group ? (columns + group - 1) / group : 1;
  const size_t line = size_t(groups) << scale_log(scale_of(part.kind));
  fetch_lines(piece(words, part.scale), first * line, end * line, index, step);
  if (part.bias != NONE) fetch_lines(piece(words, part.bias), first * line, end * line, index, step);
}

template <int T>
__device__ __forceinline__ float* results() {
  return shared_at<float>(places_for<T>(0).results);
}

// 2^split of a block's warps share rows of a kind.
__host__ __device__ constexpr uint split_of(uint steps) { return steps >= 8 ? 3 : steps >= 4 ? 2 : steps >= 2 ? 1 : 0; }

// Columns k .. k + 7 of what make_numbers lays.
__device__ __forceinline__ void eight_of(const float* x, uint k, float* y) {
  const float4 a = *reinterpret_cast<const float4*>(x + slot(k)), b = *reinterpret_cast<const float4*>(x + slot(k + 4));
  y[0] = a.x, y[1] = a.y, y[2] = a.z, y[3] = a.w, y[4] = b.x, y[5] = b.y, y[6] = b.z, y[7] = b.w;
}
// Number j of words of plain ones.
template <int DTYPE>
__device__ __forceinline__ float plain_number(const uint* w, int j) {
  return scale_number(DTYPE == F32 ? w[j] : w[j / 2] >> 16 * (j % 2) & 0xffffu, DTYPE);
}
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
          float y[8];
          eight_of(shared_at<float>(at.bytes) + t * wide, k, y);
          EACH(j, 8) sum[t] = fmaf(plain_number<DTYPE>(w[i], j), y[j], sum[t]);
        }
      }
    }
    EACH(t, T) {
      sum[t] = warp_sum(sum[t]);
      if (int(lane) == t) results<T>()[(n - first) * T + t] = sum[t];
    }
  }
}

// f.run<Tiles>(), or f.plain<DTYPE>(), for the kind that a part has; part_of: its 8 numbers in the table. Codebooks go
// token by token: what takes time is making bytes of them, and three bytes' sums of more tokens leave no registers.
template <int T, class C, class F>
__device__ __forceinline__ void with_spans(int span, F f) {
  if constexpr (may_come(C::KIND, C::WIDTH, 32)) {
    if (span == 32) return f.template run<Tiles<T, C, 32, 4>>();
  }
  if constexpr (may_come(C::KIND, C::WIDTH, 64) && C::KIND != E2M1) {
    if (span == 64) return f.template run<Tiles<T, C, 32, 2>>();
  }
  if constexpr (may_come(C::KIND, C::WIDTH, 128) && C::KIND == CODEBOOK && C::WIDTH == 2) {
    if (span == 128) return f.template run<Tiles<T, C, 64, 2>>();
  }
}
template <int T, class F>
__device__ __forceinline__ void with_kind(const uint* words, const uint* part_of, uint kind, F f) {
  const int table = table_of(kind), bits = bits_of(kind), span = span_of(kind);
  if (table == PLAIN) {
    if constexpr (may_come(PLAIN, 32)) {
      if (scale_of(kind) == F32) return f.template plain<F32>();
    }
    if constexpr (may_come(PLAIN, 16)) {
      if (scale_of(kind) == F16) return f.template plain<F16>();
      if (scale_of(kind) == BF16) return f.template plain<BF16>();
    }
  } else if (table == CODEBOOK) {
    if constexpr (T == 1) {
      if constexpr (may_come(CODEBOOK, 2, 128)) {
        const bool mirrored = bits == 2 && span == 128 && TwoBits<true>::fits(words, part_at(part_of, 0));
        if (mirrored) return f.template run<Tiles<T, TwoBits<true>, 64, 2>>();
      }
      if (bits == 2) return with_spans<T, TwoBits<false>>(span, f);
      if (bits == 3) return with_spans<T, Codes<CODEBOOK, 3>>(span, f);
      if (bits == 4) return with_spans<T, Codes<CODEBOOK, 4>>(span, f);
    }
  } else if (table == E2M1 || table == E2M1_GGUF) {
    with_spans<T, Codes<E2M1, 4>>(span, f);
  } else {
    switch (bits) {
      case 2: return with_spans<T, Codes<LINEAR, 2>>(span, f);
      case 3: return with_spans<T, Codes<LINEAR, 3>>(span, f);
      case 4: return with_spans<T, Codes<LINEAR, 4>>(span, f);
      case 5: return with_spans<T, Codes<LINEAR, 5>>(span, f);
      case 6: return with_spans<T, Codes<LINEAR, 6>>(span, f);
      default: return with_spans<T, Codes<LINEAR, 8>>(span, f);
    }
  }
}

template <int T>
struct BlockRows {
  const uint *words, *part_of;
  uint columns, first, end;

  template <class Tiles>
  __device__ __forceinline__ void run() {
    const Part part = part_at(part_of, 0);
    const Places at = places_for<T>(columns);
    const uint steps = (columns + Tiles::STEP - 1) / Tiles::STEP, split = split_of(steps), tile = 16 * T;
    float* join = shared_at<float>(at.join);
    Tiles tiles(words, part, at, columns, end);
    tiles.run(first, warp_index(), split, steps, join);
    __syncthreads();
    for (uint k = threadIdx.x; k < (end - first) * T; k += 32 * WARPS) {
      const float* parts = join + (k / tile << split) * tile + k % tile;
      float y = parts[0];
      for (uint w = 1; w < 1u << split; w++) y += parts[w * tile];
      results<T>()[k] = y;
    }
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
