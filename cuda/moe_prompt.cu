#include "launch.cuh"
#include "moe_prompt.cuh"

HM_KERNELS(moe_prompt, HM_KERNEL(moe_route), HM_KERNEL(moe_order), HM_KERNEL(moe_swiglu), HM_KERNEL(moe_join));
