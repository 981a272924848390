#include "dequantize.cuh"
#include "launch.cuh"

HM_KERNELS(dequantize, HM_KERNEL(dequantize));
