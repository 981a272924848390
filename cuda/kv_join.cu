#include "kv_join.cuh"
#include "launch.cuh"

HM_KERNELS(kv_join, HM_KERNEL(kv_join<32>), HM_KERNEL(kv_join<64>), HM_KERNEL(kv_join<128>), HM_KERNEL(kv_join<256>));
