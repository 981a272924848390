// Every op's kernel, compiled for avx512.
#define HM_ISA_AVX512 1
#include "isa_kernels.h"
