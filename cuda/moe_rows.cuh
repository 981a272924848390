// Rows of an expert, whose parts may be cut anywhere, times a row by one warp.
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
        float y[8];
        eight_of(shared_at<float>(at.bytes), k, y);
        EACH(r, 4) EACH(j, 8) sum[r] = fmaf(plain_number<DTYPE>(w[r], j), y[j], sum[r]);
      }
      EACH(r, 4) {
        sum[r] = warp_sum(sum[r]);
        if (lane_index() == 0) to[n - first + r] = sum[r];
      }
    }
  }
};

}  // namespace hm
