// Rows of an expert, whose parts may be cut anywhere, on their way to the L2 and times a row by one warp.
#pragma once
#include "rows.cuh"

namespace hm {

// Goes through the parts that have some of an expert's rows first .. end - 1: rows lo .. hi - 1 of a part are its rows
// first + at ..
struct Parts {
  const uint* next_one;
  uint ahead;     // rows in front of the first that is wanted, from `next_one` on
  uint wanted;    // rows that are left
  const uint* here;  // the part's numbers in the table
  uint kind, lo, hi, at;

  __device__ __forceinline__ Parts(const uint* table, uint expert, int part_count, uint first, uint rows)
      : next_one(table + size_t(expert) * part_count * 8), ahead(first), wanted(rows), at(0), lo(0), hi(0) {}
  __device__ __forceinline__ bool next() {
    at += hi - lo, lo = hi = 0;
    if (wanted == 0) return false;
    uint rows = next_one[0];
    HM_NO_UNROLL while (rows <= ahead) ahead -= rows, next_one += 8, rows = next_one[0];
    here = next_one, kind = here[1], next_one += 8;
    lo = ahead, hi = min_of(rows, ahead + wanted), ahead = 0, wanted -= hi - lo;
    return true;
  }
};

// The lines of an array, dealt to `step` threads.
__device__ inline void fetch_lines(const void* array, size_t begin, size_t end, uint index, uint step) {
  const unsigned char* p = static_cast<const unsigned char*>(array);
  for (size_t at = begin + 128 * index; at < end + 127; at += 128 * step) fetch_line(p + (at < end ? at : end - 1));
}
// All that rows lo .. hi - 1 of a part are made of: these bytes are needed at once, some hundred cycles later.
__device__ inline void fetch_part(const uint* words, const uint* part_of, uint columns, uint lo, uint hi, uint index,
                                  uint step) {
  const Part part = part_at(part_of, 0);
  fetch_lines(piece(words, part.codes), size_t(lo) * part.stride * 4, size_t(hi) * part.stride * 4, index, step);
  if (table_of(part.kind) == PLAIN) return;
  const uint group = group_of(part.kind), groups = group ? (columns + group - 1) / group : 1;
  const int scale = scale_of(part.kind), bytes = scale == F32 ? 4 : scale == E8M0 ? 1 : 2;
  const size_t row = size_t(groups) * bytes;
  fetch_lines(piece(words, part.scale), lo * row, hi * row, index, step);
  if (part.bias != NONE) fetch_lines(piece(words, part.bias), lo * row, hi * row, index, step);
}

// A rotation taken as new here: what every row has in common would otherwise be made ahead of all loops, and kept.
__device__ __forceinline__ Rotation taken_here(Rotation r) {
  uint v[4] = {uint(r.wide), uint(r.block), uint(r.pres), uint(r.posts)};
  EACH(i, 4) keep_here(v[i]);
  r.wide = int(v[0]), r.block = int(v[1]), r.pres = int(v[2]), r.posts = int(v[3]);
  return r;
}

// A row of r.columns numbers, turned if r.wide is not 0, to y[slot(i)] for i < `columns` rounded up to 256, by one warp.
// A row that is turned has 256 * COUNT numbers at most.
template <int COUNT>
__device__ __forceinline__ void lay_row(const Rotation& r, const float* x, uint columns, float* y) {
  for (uint begin = 0; begin < columns; begin += 256 * COUNT) {
    float v[COUNT][8], s[8];
    EACH(m, COUNT) load_eight(x, 0, int(begin + 256 * m + 8 * lane_index()), r.columns, F32, v[m]);
    if (r.wide) {
      const uint first = 8 * lane_index(), wide = r.wide;
      EACH(m, COUNT) {
        if (r.pre && 256 * m + first < wide) {
          load_eight(r.pre, 0, int((256 * m + first) % r.pres), r.pres, F32, s);
          EACH(e, 8) v[m][e] *= s[e];
        }
        near_stages(r, v[m], 256 * m + first);
      }
      EACH(e, 8) {
        float far[COUNT];
        EACH(m, COUNT) far[m] = v[m][e];
        far_stages<COUNT>(r, far, first + e, 256);
        EACH(m, COUNT) {
          const uint i = 256 * m + first + e;
          v[m][e] = i < wide ? orthonormal(r, far[m], i) : 0.0f;
        }
      }
      EACH(m, COUNT) {
        if (!r.post || 256 * m + first >= wide) continue;
        load_eight(r.post, 0, int((256 * m + first) % r.posts), r.posts, F32, s);
        EACH(e, 8) v[m][e] *= s[e];
      }
    }
    EACH(m, COUNT) {
      const uint i = begin + 256 * m + 8 * lane_index();
      if (i >= (columns + 255) / 256 * 256) continue;
      EACH(q, 2)
        *reinterpret_cast<float4*>(y + slot(i + 4 * q)) =
            make_float4(v[m][4 * q], v[m][4 * q + 1], v[m][4 * q + 2], v[m][4 * q + 3]);
    }
  }
}

// to[i]: row first + i of a part times the token that is laid at `at`, i < 16, by one warp.
struct WarpRows {
  const uint *words, *part_of;
  uint columns, first, end;
  Places at;
  float* to;

  template <class Tiles>
  __device__ __forceinline__ void run() {
    Tiles tiles(words, part_at(part_of, 0), at, columns, end);
    tiles.run(first, 0, 0, (columns + Tiles::STEP - 1) / Tiles::STEP, to);
  }
  // A lane has 8 columns of 256, four rows at a time.
  template <int DTYPE>
  __device__ __forceinline__ void plain() {
    constexpr int EACH_WORDS = DTYPE == F32 ? 8 : 4;
    const Part part = part_at(part_of, 0);
    HM_NO_UNROLL for (uint n = first; n < first + 16; n += 4) {
      float sum[4] = {};
      HM_NO_UNROLL for (uint k = 8 * lane_index(); k < columns; k += 256) {
        uint w[4][EACH_WORDS];
        EACH(r, 4) {
          const uint* row = piece(words, part.codes) + size_t(min_of(n + r, end - 1)) * part.stride;
          load_words<EACH_WORDS>(row + k / 8 * EACH_WORDS, w[r]);
        }
        const float* x = shared_at<float>(at.bytes);
        const float4 a = *reinterpret_cast<const float4*>(x + slot(k)), b = *reinterpret_cast<const float4*>(x + slot(k + 4));
        const float y[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        EACH(r, 4) EACH(j, 8) {
          const uint bits = DTYPE == F32 ? w[r][j % EACH_WORDS] : w[r][j / 2] >> 16 * (j % 2) & 0xffffu;
          sum[r] = fmaf(scale_number(bits, DTYPE), y[j], sum[r]);
        }
      }
      EACH(r, 4) {
        sum[r] = warp_sum(sum[r]);
        if (lane_index() == 0) to[n - first + r] = sum[r];
      }
    }
  }
};

}  // namespace hm
