#include "launch.cuh"
#include "qmatmul_prepare.cuh"

HM_KERNELS(qmatmul_prepare, HM_KERNEL(qmatmul_tokens<2>), HM_KERNEL(qmatmul_tokens<3>), HM_KERNEL(qmatmul_schedule));
