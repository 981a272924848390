// Every op's kernel, compiled for generic.
#define HM_ISA_GENERIC 1
#include "isa_kernels.h"
