#include "ops.h"

static const hm_op kOps[] = {
    {"read_bytes", hm::op_read_bytes},
    {"hadamard", hm::op_hadamard},
    {"dequantize", hm::op_dequantize},
    {"attention", hm::op_attention},
    {"gated_delta", hm::op_gated_delta},
    {"kv_attend", hm::op_kv_attend},
    {"kv_decode", hm::op_kv_decode},
    {"kv_encode", hm::op_kv_encode},
    {"kv_scores", hm::op_kv_scores},
    {"qmatmul", hm::op_qmatmul},
    hm::moe_decode_op,
    hm::moe_block_op,
    hm::attention_block_op,
    hm::kv_attention_block_op,
    hm::gated_delta_block_op,
    hm::qmatmul_top_op,
};

extern "C" const hm_op* hm_op_table(int32_t* count) {
  *count = int32_t(sizeof(kOps) / sizeof(kOps[0]));
  return kOps;
}
