#include "launch.cuh"
#include "moe_down.cuh"

HM_KERNELS(moe_down, HM_KERNEL(moe_down<2>), HM_KERNEL(moe_down<4>));
