#include "launch.cuh"
#include "qmatmul_top.cuh"

HM_KERNELS(qmatmul_top, HM_KERNEL(largest));
