// cooperative_groups::reduce over a tile, as a butterfly of shuffles.
#pragma once
#include "../cooperative_groups.h"

namespace cooperative_groups {
template <class T> struct plus {
  T operator()(T a, T b) const { return a + b; }
};
template <class T> struct less {
  T operator()(T a, T b) const { return b < a ? b : a; }
};
template <class T> struct greater {
  T operator()(T a, T b) const { return a < b ? b : a; }
};
template <class Group, class T, class F> T reduce(Group group, T value, F join, SIMT_SITE) {
  for (unsigned step = Group::size() / 2; step; step /= 2)
    value = join(value, group.shfl_xor(value, step, file, line));
  return value;
}
}  // namespace cooperative_groups
