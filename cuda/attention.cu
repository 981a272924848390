#include "attention.cuh"
#include "launch.cuh"

HM_KERNELS(attention, HM_KERNEL(attention<32>), HM_KERNEL(attention<64>), HM_KERNEL(attention<128>), HM_KERNEL(attention<256>));
