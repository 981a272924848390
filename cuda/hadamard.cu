#include "hadamard.cuh"
#include "launch.cuh"

HM_KERNELS(hadamard, HM_KERNEL(hadamard<1>), HM_KERNEL(hadamard<2>), HM_KERNEL(hadamard<4>), HM_KERNEL(hadamard<8>),
           HM_KERNEL(hadamard<16>), HM_KERNEL(hadamard_join<4>), HM_KERNEL(hadamard_join<16>));
