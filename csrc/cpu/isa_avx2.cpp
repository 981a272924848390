// Every op's kernel, compiled for avx2.
#define HM_ISA_AVX2 1
#include "isa_kernels.h"
