// The CPU's ops: one function per op file, listed once in ops.cpp.
#pragma once
#include "../core/abi.h"

namespace hm {

const char* op_read_bytes(const hm_args*);
const char* op_hadamard(const hm_args*);
const char* op_dequantize(const hm_args*);
const char* op_attention(const hm_args*);
const char* op_gated_delta(const hm_args*);
const char* op_kv_attend(const hm_args*);
const char* op_kv_decode(const hm_args*);
const char* op_kv_encode(const hm_args*);
const char* op_kv_scores(const hm_args*);
const char* op_qmatmul(const hm_args*);

// Ops that can be bound.
extern const hm_op moe_decode_op, moe_block_op, attention_block_op, kv_attention_block_op, gated_delta_block_op,
    qmatmul_top_op;

}  // namespace hm
