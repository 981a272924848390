// Pages as other software stores keys and values: between f32 rows [HM_KV_PAGE, d] and bytes. Attention
// over them is on f32 rows, so what counts here is few operations a number.
#pragma once

namespace hm {
namespace {

// x f32[HM_KV_PAGE, d] -> page.
inline void kv_peer_store(const KvSide& s, const float* x, uint8_t* page) {
  narrow(x, page, HM_KV_PAGE * s.d, kBf16);
}

// page -> x f32[tokens, width], the columns from d on zero; turbo: in the rotated basis, y = H(signs * x) / sqrt(d).
inline void kv_peer_load(const KvSide& s, const uint8_t* page, int64_t tokens, float* x, int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
    widen(page + t * s.d * 2, x + t * width, s.d, kBf16);
    for (int64_t c = s.d; c < width; ++c) x[t * width + c] = 0;
  }
}

}  // namespace
}  // namespace hm
