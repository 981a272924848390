// The body of each isa_*.cpp but isa_amx.cpp: all kernels over one vector layer, in an unnamed namespace so that no
// symbol built with this ISA's flags can be picked by the linker for another (no weak symbols, no
// C++ standard headers; tests/test_architecture.py checks both).
#include "kernels.h"
#include "vec.h"

#include "norm.h"

#include "attention.h"
#include "dequantize.h"
#include "gated_delta.h"
#include "hadamard.h"

#include "kv_tiles.h"
#include "kv_peers.h"
#include "kv_encode.h"
#include "kv_attend.h"
#include "kv_scores.h"

#include "moe_decode.h"
#include "qmatmul.h"
#include "read_bytes.h"

#if HM_ISA_GENERIC
#define HM_TABLE kernels_generic
#define HM_NAME "generic"
#elif HM_ISA_AVX2
#define HM_TABLE kernels_avx2
#define HM_NAME "avx2"
#elif HM_ISA_AVX512
#define HM_TABLE kernels_avx512
#define HM_NAME "avx512"
#elif HM_ISA_NEON
#define HM_TABLE kernels_neon
#define HM_NAME "neon"
#endif

namespace hm {
extern const Kernels HM_TABLE = {
    HM_NAME,
    read_bytes,
    hadamard,
    dequantize,
    norm_rows,
    attention_prepare,
    attention_tiles,
    attention_parts,
    attention_join,
    kv_encode,
    kv_decode,
    kv_scores,
    kv_take,
    kv_query,
    kv_seal,
    kv_run,
    kv_finish,
    gated_delta_conv,
    gated_delta_rule,
    qmatmul_prepare,
    qmatmul,
    moe_route,
    moe_swiglu,
    moe_combine,
};
}  // namespace hm
