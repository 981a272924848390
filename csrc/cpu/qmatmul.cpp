// qmatmul: in x[r,k] f32|bf16|f16, parts i64[e,p,12], expert i32|i64[r,a]?, buffers u8...;
// out y[r,n], or y[r,a,n] with expert, f32|bf16|f16. No rotation: x comes rotated.
#include "../core/contract.h"
#include "ops.h"
#include "qmatmul_plan.h"

namespace hm {
namespace {

std::vector<int64_t> expert_numbers(const Contract& c, const DLTensor& t, int64_t experts) {
  int64_t columns = t.shape[1], count = t.shape[0] * columns;
  std::vector<int64_t> e(size_t(count), 0);
  for (int64_t i = 0; i < count; ++i) {
    e[size_t(i)] = t.dtype.bits == 32 ? reinterpret_cast<const int32_t*>(data(t))[i]
                                      : reinterpret_cast<const int64_t*>(data(t))[i];
    if (e[size_t(i)] < 0 || e[size_t(i)] >= experts)
      c.fail("expert[" + std::to_string(i / columns) + "," + std::to_string(i % columns) + "]",
             "is " + std::to_string(e[size_t(i)]) + ", needs 0.." + std::to_string(experts - 1));
  }
  return e;
}

}  // namespace

const char* op_qmatmul(const hm_args* args) {
  return guarded([&] {
    Contract c("qmatmul");
    c.arity(*args, 3, true, 1, 0, 0);
    const DLTensor &x = args->in[0], &expert = args->in[2], &y = args->out[0];
    c.shape("x", x, "rk").dtype("x", x, "f32 bf16 f16");
    c.require(c['k'] > 0, "x", "has k=0, needs at least 1");
    const bool gathers = present(expert);
    if (gathers) c.shape("expert", expert, "ra").dtype("expert", expert, "i32 i64");
    const Buffers buffers(c, *args, 3);
    const Parts weight(c, "parts", args->in[1], c['k'], buffers);
    c.bind("parts", 'n', weight.rows).shape("y", y, gathers ? "ran" : "rn").dtype("y", y, "f32 bf16 f16");
    if (!gathers)
      c.require(weight.experts == 1, "parts",
                "has " + std::to_string(weight.experts) + " experts, needs 1 without expert");
    if (args->check) return;
    Tokens tokens(c['k']);
    tokens.add_reader(c, "parts", weight);
    const int64_t each = gathers ? c['a'] : 1, count = c['r'] * each;
    const std::vector<int64_t> numbers =
        gathers ? expert_numbers(c, expert, weight.experts) : std::vector<int64_t>(size_t(count), 0);
    if (count == 0) return;

    tokens.prepare(data(x), storage(x), c['r']);
    const ByExpert by(numbers.data(), count, weight.experts);
    const int64_t row_bytes = c['n'] * scale_bytes(storage(y));
    Products products(storage(y));
    std::vector<const QmatmulInput*> token;
    std::vector<char*> out;
    for (int64_t e = 0; e < weight.experts; ++e) {
      token.clear();
      out.clear();
      for (int64_t i = by.first[size_t(e)]; i < by.first[size_t(e) + 1]; ++i) {
        token.push_back(tokens[by.order[size_t(i)] / each]);
        out.push_back(data(y) + by.order[size_t(i)] * row_bytes);
      }
      products.add(weight, e, buffers, tokens, token, out);
    }
    products.run();
  });
}

}  // namespace hm
