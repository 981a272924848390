#include "kv_encode.cuh"
#include "launch.cuh"

HM_KERNELS(kv_encode, HM_KERNEL(kv_encode<32>), HM_KERNEL(kv_encode<64>), HM_KERNEL(kv_encode<128>), HM_KERNEL(kv_encode<256>),
           HM_KERNEL(kv_decode<32>), HM_KERNEL(kv_decode<64>), HM_KERNEL(kv_decode<128>), HM_KERNEL(kv_decode<256>),
           HM_KERNEL(kv_append<32>), HM_KERNEL(kv_append<64>), HM_KERNEL(kv_append<128>), HM_KERNEL(kv_append<256>));
