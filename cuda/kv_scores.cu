#include "kv_scores.cuh"
#include "launch.cuh"

HM_KERNELS(kv_scores, HM_KERNEL(kv_scores<32>), HM_KERNEL(kv_scores<64>), HM_KERNEL(kv_scores<128>), HM_KERNEL(kv_scores<256>));
