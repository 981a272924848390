#include "kv_runs.cuh"
#include "launch.cuh"

// Of the model's heads, our presets and bf16: hadamoe.cuda_kv.COMPILED.
HM_KERNELS(kv_runs, HM_KERNEL(kv_runs<32, 99, 99>), HM_KERNEL(kv_runs<64, 99, 99>), HM_KERNEL(kv_runs<128, 99, 99>),
           HM_KERNEL(kv_runs<256, 99, 99>), HM_KERNEL(kv_runs<256, 0, 0>), HM_KERNEL(kv_runs<256, 4, 4>),
           HM_KERNEL(kv_runs<256, 4, 3>), HM_KERNEL(kv_runs<256, 3, 3>), HM_KERNEL(kv_runs<256, 3, 2>),
           HM_KERNEL(kv_runs<256, 3, 1>));
