#include "launch.cuh"
#include "qmatmul.cuh"

HM_KERNELS(qmatmul, HM_KERNEL(qmatmul<2, 64>), HM_KERNEL(qmatmul<3, 32>));
