#include "launch.cuh"
#include "moe_gate_up.cuh"

HM_KERNELS(moe_gate_up, HM_KERNEL(moe_gate_up));
