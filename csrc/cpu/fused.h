// What ops made of several products share: checked weights by role, an input that is normalised, rotated
// and prepared once for all weights that read it, and binding (checking weights once for many calls).
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "../core/parts.h"
#include "../core/scratch.h"
#include "qmatmul_plan.h"
#include "rotation.h"

namespace hm {

// The weight of one role. Its table is its own copy where `keep`: a bound op must not see it change.
struct RoleWeight {
  const char* name = nullptr;
  bool rotated = false;
  Parts parts, kinds;  // kinds: one part of each sort, all that Tokens needs to know
  std::vector<hm_part> table, sorts;

  RoleWeight(Contract& c, const char* role, bool turned, const DLTensor& t, int64_t columns, const Buffers& buffers,
             bool keep);
  // Fails unless there are `experts` of `rows` rows.
  void needs(Contract& c, int64_t rows, int64_t experts) const;
};

// RMSNorm in front of a block; absent: gamma is nullptr.
struct BlockNorm {
  const float* gamma = nullptr;
  float eps = 0;
};

// An input of a fused op, as it is and rotated.
class BlockInput {
 public:
  // block -1: nothing reads it rotated.
  BlockInput(Contract& c, const RotationNames& names, int64_t k, int64_t block, const DLTensor& pre,
             const DLTensor& post);
  int64_t k() const { return k_; }
  int64_t columns(bool rotated) const { return rotated ? turned_ : k_; }
  const RowRotation* rotation() const { return rotation_ ? &*rotation_ : nullptr; }

 private:
  int64_t k_, turned_;
  std::optional<RowRotation> rotation_;
};

// Tokens of one call. Readers are added, then rows are prepared.
class BlockTokens {
 public:
  explicit BlockTokens(const BlockInput& input) : input_(input), plain_(input.k()), turned_(input.columns(true)) {}
  void add_reader(const Contract& c, const RoleWeight& weight);
  Tokens& of(const RoleWeight& weight) { return weight.rotated ? turned_ : plain_; }
  // x [count, k]; a row whose byte in `mask` is 0 counts as zeros.
  void prepare(const void* x, hm_scale type, int64_t count, const BlockNorm& norm, const uint8_t* mask);
  // The same in two steps, for an x that appears piece by piece: memory, then rows [begin, end). `normed` and
  // `rotated` have room for all rows where there is a norm and a rotation.
  void allocate(int64_t count);
  void prepare_rows(const void* x, hm_scale type, float* normed, float* rotated, const BlockNorm& norm,
                    const uint8_t* mask, int64_t begin, int64_t end);
  // out + i * stride <- all rows of the weight times token i, as f32.
  void add_products(Products& products, const RoleWeight& weight, const Buffers& buffers, float* out, int64_t stride,
                    int64_t count);

 private:
  const BlockInput& input_;
  Tokens plain_, turned_;
  bool plain_read_ = false, turned_read_ = false;
};

// Tokens first.. of every sequence of an array [batch, tokens, k].
struct BlockRows {
  int64_t batch, tokens, k, first, count;

  int64_t all() const { return batch * count; }
  // The rows side by side: a view where they are, else a copy.
  const float* gather(const float* x, Scratch& scratch) const;
  const uint8_t* gather_mask(const uint8_t* mask, Scratch& scratch) const;  // [batch, tokens]
  // y's rows <- x[i] + by[i]; y may be the array x was gathered from.
  void add_to(const float* x, const float* by, float* y) const;
};

// Fails unless `rotated` names roles whose input has a rotation.
void check_rotated(Contract& c, int64_t rotated, int roles, int64_t hidden_block, int64_t hidden_readers,
                   int64_t inner_block, int64_t inner_readers);

// The entries of hm_op for an op whose Plan checks the arguments that stay (constructor; `keep` when it will
// outlive its arrays' lists) and runs on the others (call). run() does both.
template <class Plan>
struct Bindable {
  static const char* run(const hm_args* args) {
    return guarded([&] { Plan(*args, false).call(*args); });
  }
  static const char* bind(const hm_args* args, void** bound) {
    return guarded([&] { *bound = new Plan(*args, true); });
  }
  static const char* call(const void* bound, const hm_args* args) {
    return guarded([&] { static_cast<const Plan*>(bound)->call(*args); });
  }
  static void release(void* bound) { delete static_cast<Plan*>(bound); }
};

template <class Plan>
constexpr hm_op bindable(const char* name) {
  return {name, Bindable<Plan>::run, Bindable<Plan>::bind, Bindable<Plan>::call, Bindable<Plan>::release};
}

}  // namespace hm
