// Every op's kernel, compiled for neon.
#define HM_ISA_NEON 1
#include "isa_kernels.h"
