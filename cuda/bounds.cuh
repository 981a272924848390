// Bounds of a kernel's launches, for its registers: the struct's THREADS a block and, where it has them, BLOCKS that a
// multiprocessor should hold at once; 0 is no bound.
#pragma once

namespace hm {

template <class K, class = void>
struct Blocks {
  static constexpr int VALUE = 0;
};
template <class K>
struct Blocks<K, decltype(void(K::BLOCKS))> {
  static constexpr int VALUE = K::BLOCKS;
};

}  // namespace hm

#define HM_BOUNDS(...) __launch_bounds__((__VA_ARGS__::THREADS), (hm::Blocks<__VA_ARGS__>::VALUE))
