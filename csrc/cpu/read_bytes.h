// sums[b] = sum of the 64-bit words of block b: what reading alone costs.
#pragma once

namespace hm {
namespace {

void read_bytes(const ReadTask& task, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* p = task.bytes + b * task.block;
    int64_t size = task.size - b * task.block < task.block ? task.size - b * task.block : task.block;
    // Four independent sums: one addition chain would be slower than the bus.
    uint64_t s[4] = {0, 0, 0, 0};
    int64_t i = 0;
#if HM_ISA_AVX512
    __m512i v[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; i + 256 <= size; i += 256)
      for (int j = 0; j < 4; ++j) {
        _mm_prefetch(reinterpret_cast<const char*>(p + i + 64 * j + 4096), _MM_HINT_T1);
        v[j] = _mm512_add_epi64(v[j], _mm512_loadu_si512(p + i + 64 * j));
      }
    for (int j = 0; j < 4; ++j) {  // not _mm512_reduce_add_epi64: gcc writes it with signed adds, which overflow
      uint64_t w[8];
      _mm512_storeu_si512(w, v[j]);
      for (int l = 0; l < 8; ++l) s[j] += w[l];
    }
#endif
    for (; i + 32 <= size; i += 32)
      for (int j = 0; j < 4; ++j) {
        uint64_t w;
        memcpy(&w, p + i + 8 * j, 8);
        s[j] += w;
      }
    for (; i < size; ++i) s[0] += p[i];
    task.sums[b] = s[0] + s[1] + s[2] + s[3];
  }
}

}  // namespace
}  // namespace hm
