// A checked rotation post . H(block) . pre of rows of k columns, for every op that applies one.
#pragma once
#include <vector>

#include "../core/contract.h"
#include "kernels.h"

namespace hm {

// Signs a kernel can index by column modulo period without crossing its end inside a block.
struct RepeatedSigns {
  std::vector<float> storage;
  const float* values = nullptr;
  int64_t period = 1;

  RepeatedSigns(const DLTensor& t, int64_t block, int64_t columns) {
    if (!present(t)) return;
    values = reinterpret_cast<const float*>(data(t));
    period = t.shape[0];
    if (!values || period == columns || (block && period % block == 0)) return;
    storage.resize(size_t(columns));
    for (int64_t i = 0; i < columns; ++i) storage[size_t(i)] = values[i % period];
    values = storage.data();
    period = columns;
  }
};

// `names` are what the op calls k's array, the block and the two sign vectors in a message; `letters`
// the dimensions of the signs.
struct RotationNames {
  const char *x, *block, *pre, *post, *letters;
};

class RowRotation {
 public:
  static constexpr int64_t kLargest = 16384;

  // Columns of the rotated row; fails when the block is no block or k is too large for it.
  static int64_t checked_columns(const Contract& c, const RotationNames& names, int64_t k, int64_t block) {
    if (block < 0 || block > kLargest || (block & (block - 1)))
      c.fail(names.block,
             "is " + std::to_string(block) + ", needs 0 or a power of two up to " + std::to_string(kLargest));
    if (!block && k >= 2 * kLargest)
      c.fail(names.x, "has k=" + std::to_string(k) + ", needs at most " + std::to_string(2 * kLargest - 1) +
                          " where block is 0");
    return block ? (k + block - 1) / block * block : k;
  }

  static void check_signs(Contract& c, const RotationNames& names, int64_t columns, const DLTensor& pre,
                          const DLTensor& post) {
    const DLTensor* signs[] = {&pre, &post};
    const char* called[] = {names.pre, names.post};
    for (int i = 0; i < 2; ++i) {
      const DLTensor& t = *signs[i];
      if (!present(t)) continue;
      const std::string_view letter(names.letters + i, 1);
      c.shape(called[i], t, letter).dtype(called[i], t, "f32");
      c.require(t.shape[0] > 0 && columns % t.shape[0] == 0, called[i],
                "has " + std::string(letter) + "=" + std::to_string(t.shape[0]) + ", needs a divisor of " +
                    std::to_string(columns));
    }
  }

  RowRotation(int64_t k, int64_t columns, int64_t block, const DLTensor& pre, const DLTensor& post)
      : k_(k), columns_(columns), block_(block), before_(pre, block, columns), after_(post, block, columns) {}

  int64_t columns() const { return columns_; }
  int64_t unit() const { return block_ ? block_ : k_; }  // columns a kernel takes at once
  int64_t units_per_row() const { return columns_ / unit(); }
  HadamardTask task(const void* x, hm_scale x_type, void* y, hm_scale y_type) const {
    return {x,
            y,
            x_type,
            y_type,
            k_,
            columns_,
            block_,
            before_.values,
            after_.values,
            before_.period,
            after_.period};
  }

 private:
  int64_t k_, columns_, block_;
  RepeatedSigns before_, after_;
};

}  // namespace hm
