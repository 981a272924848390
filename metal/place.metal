// Where a thread stands.

namespace hm {
using namespace metal;

// Passed by value to every kernel.
struct Place {
  uint3 group;
  uint index, simd, lane;
};

}  // namespace hm
