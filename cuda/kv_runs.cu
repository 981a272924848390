#include "kv_runs.cuh"
#include "launch.cuh"

HM_KERNELS(kv_runs, HM_KERNEL(kv_runs<64, 1>), HM_KERNEL(kv_runs<128, 1>), HM_KERNEL(kv_runs<256, 1>));
