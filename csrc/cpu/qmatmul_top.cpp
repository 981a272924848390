// qmatmul_top: in x[t,k] f32|bf16|f16, norm? f32[k], pre?, post? f32, parts i64[1,p,12], buffers u8...; out value
// f32[t,a], index i32[t,a]; ints block (-1: no rotation); floats eps (of the norm).
//
// The a largest of the rows times rotate(rmsnorm(x)), largest first, equal ones by index. NaN counts as -inf.
// Products stay in memory of the thread's own: what a caller would have to allocate, copy and search.
#include <algorithm>
#include <functional>

#include "../core/pool.h"
#include "fused.h"
#include "ops.h"

namespace hm {
namespace {

enum Input { kX, kNorm, kPre, kPost, kParts, kBuffers };
constexpr RotationNames kNames{"x", "block", "pre", "post", "pq"};
constexpr int64_t kTokens = 8;     // at once: 1 MB of products each for a large vocabulary
constexpr int64_t kSpan = 256;     // rows
constexpr int64_t kMostTop = 4096;

struct Entry {
  float value;
  int32_t index;
};
bool better(const Entry& a, const Entry& b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

// The largest of y[begin, end), -inf where all are NaN.
float largest(const float* y, int64_t begin, int64_t end) {
  constexpr int kLanes = 16;
  float lane[kLanes], most = -__builtin_inff();
  for (float& m : lane) m = most;
  for (; begin + kLanes <= end; begin += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = y[begin + l] > lane[l] ? y[begin + l] : lane[l];
  for (float m : lane) most = m > most ? m : most;
  for (; begin < end; ++begin) most = y[begin] > most ? y[begin] : most;
  return most;
}

// The best `top` of y[rows], in order, given the largest of every kSpan rows. The top-th largest of those is
// no more than the top-th largest of all, so few spans hold anything else.
void select(const float* y, int64_t rows, const float* most, int64_t top, float* value, int32_t* index) {
  std::vector<float> spans(most, most + (rows + kSpan - 1) / kSpan);
  float floor = -__builtin_inff();
  if (top <= int64_t(spans.size())) {
    std::nth_element(spans.begin(), spans.begin() + (top - 1), spans.end(), std::greater<float>());
    floor = spans[size_t(top - 1)];
  }
  std::vector<Entry> found;
  for (int64_t first = 0; first < rows; first += kSpan) {
    if (most[first / kSpan] < floor) continue;
    for (int64_t i = first; i < std::min(first + kSpan, rows); ++i) {
      const float v = y[i] == y[i] ? y[i] : -__builtin_inff();
      if (v >= floor) found.push_back({v, int32_t(i)});
    }
  }
  std::partial_sort(found.begin(), found.begin() + top, found.end(), better);
  for (int64_t i = 0; i < top; ++i) {
    value[i] = found[size_t(i)].value;
    index[i] = found[size_t(i)].index;
  }
}

class Top {
 public:
  Top(const hm_args& a, bool keep) {
    c_.arity(a, kBuffers, true, 2, 1, 1);
    if (present(a.in[kX])) check_x(c_, a);
    if (present(a.in[kNorm])) {
      c_.shape("norm", a.in[kNorm], "k").dtype("norm", a.in[kNorm], "f32");
      const double eps = a.floats[0];
      c_.require(eps >= 0 && eps < 1, "eps", "is " + std::to_string(eps) + ", needs 0 <= eps < 1");
      norm_ = {reinterpret_cast<const float*>(data(a.in[kNorm])), float(eps)};
    }
    const int64_t k = c_['k'], block = a.ints[0];
    c_.require(k > 0, "x", k < 0 ? "and norm are absent, needs a norm when bound" : "has k=0, needs at least 1");
    c_.require(block >= -1, "block", "is " + std::to_string(block) + ", needs -1 or more");
    buffers_.emplace(c_, a, kBuffers);
    input_.emplace(c_, kNames, k, block, a.in[kPre], a.in[kPost]);
    weight_.emplace(c_, "parts", block >= 0, a.in[kParts], input_->columns(block >= 0), *buffers_, keep);
    weight_->needs(c_, weight_->parts.rows, 1);
    c_.require(weight_->parts.rows <= INT32_MAX, "parts", "has more rows than an i32 counts");
  }

  void call(const hm_args& a) const {
    Contract c = c_;
    check_x(c, a);
    const DLTensor *value = a.out, *index = a.out + 1;
    c.shape("value", value[0], "ta").dtype("value", value[0], "f32");
    c.shape("index", index[0], "ta").dtype("index", index[0], "i32");
    const int64_t top = c['a'], rows = weight_->parts.rows, most = std::min(rows, kMostTop);
    c.require(top > 0 && top <= most, "value",
              "has a=" + std::to_string(top) + ", needs 1.." + std::to_string(most));
    if (a.check) return;
    const int64_t item = scale_bytes(storage(a.in[kX]));
    for (int64_t t = 0; t < c['t']; t += kTokens)
      batch(data(a.in[kX]) + t * input_->k() * item, storage(a.in[kX]), std::min(kTokens, c['t'] - t), top,
            reinterpret_cast<float*>(data(value[0])) + t * top, reinterpret_cast<int32_t*>(data(index[0])) + t * top);
  }

 private:
  static void check_x(Contract& c, const hm_args& a) { c.shape("x", a.in[kX], "tk").dtype("x", a.in[kX], "f32 bf16 f16"); }

  void batch(const char* x, hm_scale type, int64_t count, int64_t top, float* value, int32_t* index) const {
    Scratch scratch;
    const int64_t rows = weight_->parts.rows;
    float* y = scratch.floats(count * rows);
    BlockTokens tokens(*input_);
    tokens.add_reader(c_, *weight_);
    tokens.prepare(x, type, count, norm_, nullptr);
    Products products(hm_f32);
    tokens.add_products(products, *weight_, *buffers_, y, rows, count);
    products.run();

    const int64_t spans = (rows + kSpan - 1) / kSpan;
    float* most = scratch.floats(count * spans);
    parallel_range(count * spans, 64, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u % spans * kSpan;
        most[u] = largest(y + u / spans * rows, first, std::min(first + kSpan, rows));
      }
    });
    for (int64_t t = 0; t < count; ++t)
      select(y + t * rows, rows, most + t * spans, top, value + t * top, index + t * top);
  }

  Contract c_{"qmatmul_top"};
  BlockNorm norm_;
  std::optional<Buffers> buffers_;
  std::optional<BlockInput> input_;
  std::optional<RoleWeight> weight_;
};

}  // namespace

const hm_op qmatmul_top_op = bindable<Top>("qmatmul_top");

}  // namespace hm
