// Attention between its projections, for the op of that name and the block round it.
#pragma once
#include "../core/contract.h"
#include "kernels.h"

namespace hm {

// Notes q_norm f32[d], k_norm f32[d], cos f32[b,t,r], sin f32[b,t,r] in the task; d is bound by q_norm.
void check_projected(Contract& c, const DLTensor* norms, const DLTensor* angles, AttentionTask& task);

// Notes `heads` > 0, a multiple of g, and eps.
void check_heads(const Contract& c, int64_t heads, double eps, AttentionTask& task);

// Both, and mask? bool|u8[b,t,n], keys and values f32|bf16|f16[b,g,c,d]; g is bound by keys.
void check_attention(Contract& c, const DLTensor* norms, const DLTensor* angles, const DLTensor& mask,
                     const DLTensor* caches, int64_t heads, int64_t past, double eps, AttentionTask& task);

// Tokens first, first + 1, ... first + count - 1 of every sequence; the task's arrays hold all tokens, but
// for proj and y where `local`: those hold just these.
void run_attention(const AttentionTask& task, int64_t first, int64_t count, bool local);

// Tokens of one sequence that an op takes at once.
inline int64_t attention_chunk(int64_t batch, int64_t tokens) {
  constexpr int64_t kTokens = 512;
  const int64_t each = batch < kTokens ? kTokens / batch : 1;
  return tokens < each ? tokens : each;
}

}  // namespace hm
