#include "launch.cuh"
#include "qmatvec.cuh"

HM_KERNELS(qmatvec, HM_KERNEL(qmatvec<1>), HM_KERNEL(qmatvec<2>), HM_KERNEL(qmatvec<4>));
