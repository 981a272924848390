// Codes times many tokens, compiled for AMX; everything else is AVX-512's (amx.cpp).
#define HM_ISA_AVX512 1
#include "vec.h"

#include "qmatmul_amx.h"
