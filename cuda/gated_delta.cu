#include "gated_delta_prepare.cuh"
#include "gated_delta_scan.cuh"
#include "gated_delta_step.cuh"
#include "launch.cuh"

HM_KERNELS(gated_delta, HM_KERNEL(delta_prepare<4, 4>), HM_KERNEL(delta_prepare<8, 8>), HM_KERNEL(delta_step),
           HM_KERNEL(delta_scan<16>), HM_KERNEL(delta_scan<32>), HM_KERNEL(delta_norm));
