// Time in products with weights and the bytes they read, counted while someone asks.
#pragma once
#include <stdint.h>

#include <atomic>
#include <chrono>

namespace hm {

struct ProductCount {
  std::atomic<bool> on{false};
  std::atomic<int64_t> nanoseconds{0}, bytes{0};
};
inline ProductCount product_count;

inline int64_t profile_clock() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace hm
