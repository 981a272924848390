// Rows of a weight as numbers, a threadgroup for each. Meaning: reference.dequantize, bit for bit: scale * number and
// the sum with the bias are rounded one after the other.
#include "weight.metal"

#pragma METAL fp contract(off)

namespace hm {

template <int TABLE, int BITS, int SCALE>
METAL_FUNC float scaled(float v, Factor<TABLE, BITS, SCALE> by) {
  const float s = number<SCALE>(by.scale);
  if constexpr (SCALE == e8m0) return v * (by.scale == 0 ? 8192.0f : 16384.0f) * s;  // e2m1.metal's 2^14
  if constexpr (TABLE != linear) return v * s;
  const float product = (v + float(1 << (BITS - 1))) * s;
  return product + number<SCALE>(by.bias);
}

template <int K, int THREADS, class Y>
struct Numbers {
  const device uint* words;
  Part part;
  uint row, thread_index;
  device Y* y;

  template <int KIND>
  METAL_FUNC void run() {
    using Is = Kind<KIND>;
    Codes<Is::table, Is::bits, Is::scale> codes;
    codes.open(words, part, thread_index % 32);
    constexpr uint groups = Is::group ? (K + Is::group - 1) / Is::group : 1;
    for (uint p = thread_index; p < (K + Is::columns - 1) / Is::columns; p += THREADS) {
      uint w[Is::words];
      load_words<Is::words>(piece(words, part.codes) + ulong(row) * part.stride + p * Is::words, w);
      EACH(c, Is::columns / 8) {
        const uint i = p * Is::columns + 8 * c;
        if (i >= K) break;
        float v[8];
        codes.eight(w, c, v);
        Factor<Is::table, Is::bits, Is::scale> factor{0, 0};
        if (Is::table != plain) factor.load(words, part, ulong(row) * groups + (Is::group ? i / Is::group : 0));
        EACH(j, 8) {
          if (Is::table != plain) v[j] = scaled(v[j], factor);
          if (i + j < K) y[i + j] = Y(v[j]);
        }
      }
    }
  }
};

// y[i] = row index[i], counted over experts, of N rows each. KINDS: of the parts.
template <int K, int N, int EXPERTS, int PARTS, int THREADS, int... KINDS, class E, class Y>
METAL_FUNC void dequantize(E index, const device uint* words, const device uint* parts, device Y* y, Place at) {
  const uint flat = min(uint(index[at.group.x]), uint(EXPERTS * N - 1));
  uint p = flat / N * PARTS, row = flat % N;
  while (row >= parts[8 * p]) row -= parts[8 * p++];
  Numbers<K, THREADS, Y> numbers{words, part_at(parts, p), row, at.index, y + ulong(at.group.x) * K};
  with_kind<KINDS...>(numbers.part.kind, numbers);
}

}  // namespace hm
