// Full pages of keys or values to bf16, fp8, affine and kivi codes: a simdgroup has a few tokens of one page.
// Meaning: kv_ops.kv_encode, bit for bit. A group with a NaN gets a bias of NaN.
#include "kv_stream.metal"

namespace hm {

METAL_FUNC bool is_nan(float x) { return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u; }
METAL_FUNC ushort to_half(float x) { return as_type<ushort>(half(x)); }
METAL_FUNC float as_half(float x) { return float(half(clamp(x, -65504.0f, 65504.0f))); }
METAL_FUNC ushort to_bfloat(float x) {
  const uint u = as_type<uint>(x);
  return is_nan(x) ? 0x7fc0 : ushort((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
METAL_FUNC uint to_e4m3(float x) {
  const uint u = as_type<uint>(x), sign = u >> 24 & 0x80u, size = u & 0x7fffffffu;
  if (is_nan(x)) return 0x7fu;
  if (as_type<float>(size) >= 448.0f) return sign | 0x7eu;
  // below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves them in the last bits
  if (as_type<float>(size) < 0.015625f) return sign | (as_type<uint>(as_type<float>(size) + 16384.0f) - 0x46800000u);
  return sign | (((size + 0x7ffffu + (u >> 20 & 1u)) >> 20) - 960u);
}

struct Line {  // code -> scale * code + bias
  float scale, bias;
};
template <int BITS>
METAL_FUNC uint line_code(Line line, float x) {
  const float from = x - line.bias, code = rint(from / line.scale), most = float((1 << BITS) - 1);
  return uint(code > 0.0f ? min(code, most) : 0.0f);
}
// As mx.quantize: the end farther from 0 is a multiple of the scale.
template <int BITS>
METAL_FUNC Line affine_line(float least, float most) {
  const bool below = fabs(least) > fabs(most);
  const float edge = below ? least : most, step = max((most - least) / float((1 << BITS) - 1), 1e-7f);
  Line line{below ? step : -step, 0.0f};
  const float steps = rint(edge / line.scale);
  if (steps != 0.0f) line.scale = edge / steps, line.bias = edge;
  return line;
}
template <int BITS>
METAL_FUNC Line kivi_line(float least, float most) {
  const float bias = as_half(least + 0.0f);
  return Line{as_half((most - bias) / float((1 << BITS) - 1)), bias};
}

// Stores a line as two 16-bit numbers, the bias behind all scales.
template <int CODEC>
METAL_FUNC void store_line(Line line, bool lost, device ushort* scales, uint i, uint biases) {
  const float bias = lost ? as_type<float>(0x7fc00000u) : line.bias;
  scales[i] = is_kivi(CODEC) ? to_half(line.scale) : to_bfloat(line.scale);
  scales[biases + i] = is_kivi(CODEC) ? to_half(bias) : to_bfloat(bias);
}

// Codes of one row. Groups: GROUP registers of all lanes.
template <int CODEC, int N>
METAL_FUNC void line_row(const thread float* x, thread uint* codes, device ushort* scales, uint token, uint lane) {
  constexpr int BITS = code_bits(CODEC), GROUP = is_kivi(CODEC) ? 1 : 2;
  for (int g = 0; g < N / GROUP; g++) {
    float least = x[g * GROUP], most = least;
    bool lost = is_nan(least);
    for (int i = 1; i < GROUP; i++) {
      least = min(least, x[g * GROUP + i]), most = max(most, x[g * GROUP + i]);
      lost = lost || is_nan(x[g * GROUP + i]);
    }
    least = simd_min(least), most = simd_max(most);
    lost = simd_or(uint(lost));
    Line line = is_kivi(CODEC) ? kivi_line<BITS>(least, most) : affine_line<BITS>(least, most);
    if (lane == 0) store_line<CODEC>(line, lost, scales, token * (N / GROUP) + g, PAGE * (N / GROUP));
    if (line.scale == 0.0f) line.scale = 1.0f;
    for (int i = 0; i < GROUP; i++) codes[g * GROUP + i] = line_code<BITS>(line, x[g * GROUP + i]);
  }
}

// Pages [p, 64, D] to [p, bytes]. SCALE: of fp8, a float's bits.
template <int CODEC, int VALUES, int PAGES, int D, int SCALE, int THREADS, class T>
METAL_FUNC void kv_encode_linear(const device T* rows, device uchar* pages, Place at) {
  constexpr int BITS = code_bits(CODEC), N = D / 32, TOKENS = is_kivi(CODEC) && !VALUES ? 32 : 4;
  const uint unit = at.group.x * (THREADS / 32) + at.simd, p = unit / (PAGE / TOKENS), first = unit % (PAGE / TOKENS) * TOKENS;
  if (p >= PAGES) return;
  device uint* page = (device uint*)pages + ulong(p) * page_words(CODEC, D);
  device ushort* scales = (device ushort*)(page + code_words(CODEC, D));
  const device T* from = rows + (ulong(p) * PAGE + first) * D + at.lane;
  Line lines[N];
  for (int i = 0; TOKENS == 32 && i < N; i++) {  // a line for each column
    float least = float(from[32 * i]), most = least;
    bool lost = is_nan(least);
    for (uint t = 1; t < TOKENS; t++) {
      const float x = float(from[t * D + 32 * i]);
      least = min(least, x), most = max(most, x), lost = lost || is_nan(x);
    }
    lines[i] = kivi_line<BITS>(least, most);
    store_line<CODEC>(lines[i], lost, scales, first / 32 * D + at.lane + 32 * i, 2 * D);
    if (lines[i].scale == 0.0f) lines[i].scale = 1.0f;
  }
  for (uint t = 0; t < TOKENS; t++) {
    float x[N];
    uint codes[N];
    const uint token = first + t;
    for (int i = 0; i < N; i++) {
      const uint to = token * D + at.lane + 32 * i;
      x[i] = float(from[t * D + 32 * i]);
      if (CODEC == kv_bf16) ((device ushort*)page)[to] = to_bfloat(x[i]);
      if (CODEC == kv_fp8) ((device uchar*)page)[to] = uchar(to_e4m3(x[i] / as_type<float>(SCALE)));
      if (TOKENS == 32) codes[i] = line_code<BITS>(lines[i], x[i]);
    }
    if constexpr (CODEC != kv_bf16 && CODEC != kv_fp8) {
      if constexpr (TOKENS != 32) line_row<CODEC, N>(x, codes, scales, token, at.lane);
      put_stream<BITS, N>(codes, page + token * N * BITS, at.lane);
    }
  }
}

}  // namespace hm
