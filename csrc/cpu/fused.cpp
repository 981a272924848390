#include "fused.h"

#include <string.h>

#include "../core/pool.h"

namespace hm {

RoleWeight::RoleWeight(Contract& c, const char* role, bool turned, const DLTensor& t, int64_t columns,
                       const Buffers& buffers, bool keep)
    : name(role), rotated(turned), parts(c, role, t, columns, buffers), kinds(parts) {
  Tokens(columns).add_reader(c, name, parts);
  const int64_t count = parts.experts * parts.per_expert;
  for (int64_t i = 0; i < count; ++i) {
    const hm_part& p = parts.parts[i];
    bool known = p.rows == 0;
    for (const hm_part& s : sorts) known |= s.instance == p.instance && s.group == p.group;
    if (!known) sorts.push_back(p);
  }
  kinds.parts = sorts.data();
  kinds.experts = 1;
  kinds.per_expert = int64_t(sorts.size());
  if (!keep) return;
  table.assign(parts.parts, parts.parts + count);
  parts.parts = table.data();
}

void RoleWeight::needs(Contract& c, int64_t rows, int64_t experts) const {
  auto must = [&](int64_t has, int64_t wanted, const char* what) {
    c.require(has == wanted, name,
              "has " + std::to_string(has) + what + ", needs " + std::to_string(wanted));
  };
  must(parts.rows, rows, " rows");
  must(parts.experts, experts, " experts");
}

BlockInput::BlockInput(Contract& c, const RotationNames& names, int64_t k, int64_t block, const DLTensor& pre,
                       const DLTensor& post)
    : k_(k), turned_(k) {
  if (block < 0) return;
  turned_ = RowRotation::checked_columns(c, names, k, block);
  RowRotation::check_signs(c, names, turned_, pre, post);
  rotation_.emplace(k, turned_, block, pre, post);
}

void BlockTokens::add_reader(const Contract& c, const RoleWeight& weight) {
  (weight.rotated ? turned_read_ : plain_read_) = true;
  of(weight).add_reader(c, weight.name, weight.kinds);
}

void BlockTokens::prepare_rows(const void* x, hm_scale type, float* normed, float* rotated, const BlockNorm& norm,
                               const uint8_t* mask, int64_t begin, int64_t end) {
  const Kernels& kernel = kernels();
  const int64_t k = input_.k();
  for (int64_t r = begin; r < end; ++r) {  // one by one: a row stays in the first-level cache
    const void* from = x;
    hm_scale from_type = type;
    if (normed) {
      if (norm.gamma) kernel.norm({x, type, norm.gamma, normed, k, norm.eps}, r, r + 1);
      if (mask && !mask[r]) memset(normed + r * k, 0, size_t(k) * 4);
      from = normed;
      from_type = hm_f32;
    }
    if (plain_read_) plain_.prepare(from, from_type, r, r + 1);
    if (!turned_read_) continue;
    const RowRotation& turn = *input_.rotation();
    kernel.hadamard(turn.task(from, from_type, rotated, hm_f32), r * turn.units_per_row(),
                    (r + 1) * turn.units_per_row());
    turned_.prepare(rotated, hm_f32, r, r + 1);
  }
}

void BlockTokens::allocate(int64_t count) {
  if (plain_read_) plain_.allocate(count);
  if (turned_read_) turned_.allocate(count);
}

void BlockTokens::prepare(const void* x, hm_scale type, int64_t count, const BlockNorm& norm, const uint8_t* mask) {
  constexpr int64_t kGrain = 16384;  // numbers a chunk: about 10 us
  Scratch scratch;
  float *normed = norm.gamma ? scratch.floats(count * input_.k()) : nullptr;
  float *rotated = turned_read_ ? scratch.floats(count * input_.columns(true)) : nullptr;
  allocate(count);
  parallel_range(count, (kGrain + input_.k() - 1) / input_.k(), [&](int64_t begin, int64_t end) {
    prepare_rows(x, type, normed, rotated, norm, mask, begin, end);
  });
}

void BlockTokens::add_products(Products& products, const RoleWeight& weight, const Buffers& buffers, float* out,
                               int64_t stride, int64_t count) {
  std::vector<const QmatmulInput*> token;
  std::vector<char*> to;
  for (int64_t i = 0; i < count; ++i) {
    token.push_back(of(weight)[i]);
    to.push_back(reinterpret_cast<char*>(out + i * stride));
  }
  products.add(weight.parts, 0, buffers, of(weight), token, to);
}

namespace {

template <class T>
const T* gathered(const BlockRows& r, int64_t k, const T* x, Scratch& scratch) {
  if (r.batch == 1 || r.count == r.tokens) return x + r.first * k;
  T* rows = scratch.take<T>(r.all() * k);
  for (int64_t b = 0; b < r.batch; ++b)
    memcpy(rows + b * r.count * k, x + (b * r.tokens + r.first) * k, size_t(r.count * k) * sizeof(T));
  return rows;
}

}  // namespace

const float* BlockRows::gather(const float* x, Scratch& scratch) const { return gathered(*this, k, x, scratch); }

const uint8_t* BlockRows::gather_mask(const uint8_t* mask, Scratch& scratch) const {
  return gathered(*this, 1, mask, scratch);
}

void BlockRows::add_to(const float* x, const float* by, float* y) const {
  const int64_t n = count * k;
  for (int64_t b = 0; b < batch; ++b) {
    float* to = y + (b * tokens + first) * k;
    for (int64_t i = 0; i < n; ++i) to[i] = x[b * n + i] + by[b * n + i];
  }
}

void check_rotated(Contract& c, int64_t rotated, int roles, int64_t hidden_block, int64_t hidden_readers,
                   int64_t inner_block, int64_t inner_readers) {
  c.require(rotated >= 0 && rotated < 1 << roles, "rotated",
            "is " + std::to_string(rotated) + ", needs 0.." + std::to_string((1 << roles) - 1));
  c.require(hidden_block >= 0 || !(rotated & hidden_readers), "rotated", "names readers of x, but hidden_block is -1");
  c.require(inner_block >= 0 || !(rotated & inner_readers), "rotated",
            "names readers of the inner state, but inner_block is -1");
}

}  // namespace hm
