// Pages of a quantized cache as ops are given them: checked arguments, and attention over them.
#pragma once
#include "../core/contract.h"
#include "kernels.h"

namespace hm {

// How `codec` stores one side of heads of c['d'] columns; fails where it cannot.
KvSide kv_side(const Contract& c, int64_t codec, bool values);

// The arguments of a cache, in order. in: lengths i64[b], counts i64[b], table i32[b,m], key_signs? f32[d],
// value_signs? f32[d], vectors? f32[4,g,d], scales? f32[2]; out: raw_keys, raw_values f32|f16|bf16[b,g,3,64,d] (u16: bf16),
// key_pages u8[p,g,n], value_pages u8[p,g,o]; ints key_codec, value_codec, window.
struct KvArguments {
  static constexpr int kInputs = 7, kOutputs = 4, kInts = 3;
  KvArguments(Contract& c, const DLTensor* in, const DLTensor* out, const int64_t* ints);
  // Fails unless every page that `tokens` more tokens read or fill has a place. `append`: they are not in yet.
  void check_tables(const Contract& c, int64_t tokens, bool append) const;

  KvTask task{};  // without queries and rows
  const int64_t *lengths, *counts;
  char *raw_keys, *raw_values;
  uint8_t *key_pages, *value_pages;
  int64_t places;
};

// Where tokens of this call come from.
enum class KvSource { kProjected, kGiven, kCached };  // AttentionTask::proj; KvTask::q_in, k_in, v_in; q_in alone

// Appends and attends: tokens first .. first + count - 1 of the call's `tokens`. `local`: proj and y hold just these.
void run_kv_attention(const Contract& c, const KvArguments& cache, const KvTask& task, KvSource source, int64_t tokens,
                      int64_t first, int64_t count, bool local);

}  // namespace hm
