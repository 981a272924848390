// Full pages of keys or values to codes: a simdgroup has a few tokens of one page. Meaning: kv_ops.kv_encode,
// bit for bit. No product is added where it is made: a compiler that contracts would round once instead of twice.
#include "kv_codec.metal"
#include "kv_level.metal"
#include "kv_row.metal"

namespace hm {

// Term `term` of 32 of a tile, ORed into the tile's words of one lane.
template <int BITS, int WORDS>
METAL_FUNC void put_term(uint code, uint term, thread uint* words) {
  const uint quad = term / 4, byte = 8 * (term % 4);
  for (uint j = 0; j < WORDS; j++) {
    uint bits = 0;
    if (BITS == 3) bits = j == 2 ? code >> 2 << (byte + quad) : j == quad / 4 ? (code & 3u) << (byte + 2 * (quad % 4)) : 0;
    else if (j == quad * BITS / 8) bits = code << (byte + BITS * (quad % (8 / BITS)));
    words[j] |= bits;
  }
}

// One of our rows to codes; returns its scale.
template <int BITS, int D>
METAL_FUNC float encode_row(thread float* x, const thread float* signs, float root, thread uint* codes, uint lane) {
  constexpr int N = D / 32;
  float t[N];
  for (int i = 0; i < N; i++) t[i] = x[i] * x[i];
  for (int i = 0; i < N; i++) x[i] *= signs[i];
  walsh_hadamard<N>(x, lane);
  if constexpr (BITS == 8) {
    for (int i = 0; i < N; i++) x[i] *= root;
    const float scale = row_most<N>(x) / 127.0f, stored = float(half(scale > 65504.0f ? 65504.0f : scale));
    for (int i = 0; i < N; i++) codes[i] = uint(to_level(stored == 0.0f ? 0.0f : x[i] / stored) + 128);
    return stored;
  }
  const float n = precise::sqrt(row_sum<N>(t)), inverse = n > 0.0f ? 1.0f / n : 0.0f;
  for (int i = 0; i < N; i++) {
    x[i] = x[i] * inverse * kappa(BITS);
    codes[i] = 0;
    for (uint m = 0; m + 1 < 1 << BITS; m++) codes[i] += (level<BITS>(m) + level<BITS>(m + 1)) * 0.5f < x[i];
    t[i] = x[i] * level<BITS>(codes[i]);
  }
  const float dot = row_sum<N>(t), all = float(D) * kappa(BITS) * kappa(BITS);
  const float scale = n == 0.0f ? 0.0f : n * all / (dot > 0.0f ? dot : 1.0f);  // NaN stays
  return scale > 65504.0f ? 65504.0f : scale;
}

// Pages [p, 64, D] to [p, bytes]. Values: a simdgroup has as many tokens as a word of their columns holds.
template <int CODEC, int VALUES, int PAGES, int D, int ROOT, int THREADS, class T>
METAL_FUNC void kv_encode(const device T* rows, const device float* signs, device uchar* pages, Place at) {
  constexpr int BITS = code_bits(CODEC), N = D / 32, TOKENS = BITS == 3 ? 32 : 32 / BITS;
  constexpr int WORDS = VALUES ? TOKENS * BITS / 32 : BITS;
  const uint unit = at.group.x * (THREADS / 32) + at.simd, p = unit / (PAGE / TOKENS), first = unit % (PAGE / TOKENS) * TOKENS;
  if (p >= PAGES) return;
  device uint* page = (device uint*)pages + ulong(p) * page_words(CODEC, D);
  device half* scales = (device half*)(page + code_words(CODEC, D));
  float sign[N];
  uint words[N][WORDS];
  for (int i = 0; i < N; i++) {
    sign[i] = signs[at.lane + 32 * i];
    for (int j = 0; j < WORDS; j++) words[i][j] = 0;
  }
  for (uint t = 0; t < TOKENS; t++) {
    const uint token = first + t;
    float x[N];
    uint codes[N];
    for (int i = 0; i < N; i++) x[i] = float(rows[(ulong(p) * PAGE + token) * D + at.lane + 32 * i]);
    const float scale = encode_row<BITS, D>(x, sign, as_type<float>(ROOT), codes, at.lane);
    if (at.lane == 0) scales[token] = half(scale);
    for (int i = 0; i < N; i++) {
      if (VALUES) {
        put_term<BITS, WORDS>(codes[i], t, words[i]);
        continue;
      }
      for (int j = 0; j < WORDS; j++) words[i][j] = 0;
      put_term<BITS, WORDS>(codes[i], at.lane, words[i]);
      for (int j = 0; j < WORDS; j++) {
        const uint word = simd_or(words[i][j]);
        if (at.lane == 0) page[((token / 16 * N + i) * BITS + j) * 16 + token % 16] = word;
      }
    }
  }
  for (int i = 0; VALUES && i < N; i++) {
    const uint column = at.lane + 32 * i, tile = column / 16 * 2 + first / 32, word = BITS == 3 ? 0 : first % 32 / TOKENS;
    for (int j = 0; j < WORDS; j++) page[(tile * BITS + word + j) * 16 + column % 16] = words[i][j];
  }
}

}  // namespace hm
