// Rows of an expert, whose parts may be cut anywhere.
#include "rows.metal"

namespace hm {

// to[i] = factor * row + i of a part . x, i < HEIGHT, where the part has such a row, by one simdgroup. Rows have K
// columns where they read x rotated, else IN. input.read<KIND>(lane) is what `rows` wants.
template <int IN, int K, int HEIGHT, class Input>
struct PartRows {
  const device uint* words;
  Input input;
  float factor;
  threadgroup float* to;
  uint lane;
  Part part;
  uint row;  // a first row in front of the part counts as far behind it

  template <int KIND>
  METAL_FUNC void run() {
    constexpr int k = Kind<KIND>::rotated ? K : IN, lanes = lanes_of(k, Kind<KIND>::columns), step = 32 / lanes;
    constexpr int each = HEIGHT <= step ? 1 : HEIGHT <= 4 * step ? HEIGHT / step : 4;
    auto x = input.template read<KIND>(lane);
    for (uint begin = 0; begin < HEIGHT; begin += each * step) {
      const uint i = begin + lane / lanes;
      float sums[each];
      rows<KIND, k, each, 1>(words, part, row + i, x, sums, lane);
      EACH(r, each)
        if (lane % lanes == 0 && i + r * step < HEIGHT && row + i + r * step < part.rows) to[i + r * step] = factor * sums[r];
    }
  }
};

// The same for rows first + i of an expert, wherever its parts are cut.
template <int PARTS, int HEIGHT, int... KINDS, class Rows>
METAL_FUNC void expert_rows(const device uint* parts, uint first, thread Rows& product) {
  uint begin = 0;
  for (int p = 0; p < PARTS; p++) {
    product.part = part_at(parts, p), product.row = first - begin;
    const uint end = begin + product.part.rows;
    if (begin < min(end, first + HEIGHT) && first < end) with_kind<KINDS...>(product.part.kind, product);
    begin = end;
  }
}

}  // namespace hm
