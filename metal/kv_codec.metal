// Codecs of pages: csrc/core/kv_codecs.h for a GPU. A page is words; a head has D columns.
#include "kv_page.metal"

namespace hm {

enum Codec {
  kv_bf16, kv_h2, kv_h3, kv_h4, kv_h8, kv_turbo2, kv_turbo3, kv_turbo4, kv_fp8, kv_affine4, kv_affine8, kv_kivi2, kv_kivi4
};

constexpr bool is_ours(int codec) { return codec >= kv_h2 && codec <= kv_h8; }
constexpr bool is_turbo(int codec) { return codec >= kv_turbo2 && codec <= kv_turbo4; }
constexpr bool is_affine(int codec) { return codec == kv_affine4 || codec == kv_affine8; }
constexpr bool is_kivi(int codec) { return codec == kv_kivi2 || codec == kv_kivi4; }
constexpr int code_bits(int codec) {
  if (codec == kv_bf16) return 16;
  if (codec <= kv_h4) return codec + 1;
  if (is_turbo(codec)) return codec - 3;
  return codec == kv_kivi2 ? 2 : codec == kv_affine4 || codec == kv_kivi4 ? 4 : 8;
}
// Words of the codes of a page, where the scales begin; words of a page.
constexpr uint code_words(int codec, uint d) { return PAGE * d * code_bits(codec) / 32; }
constexpr uint page_words(int codec, uint d) {
  const uint scales = is_ours(codec) ? 32 : is_turbo(codec) ? 64 : is_affine(codec) ? d : is_kivi(codec) ? 2 * d : 0;
  return code_words(codec, d) + scales;
}

METAL_FUNC float bfloat_at(const device uint* scales, uint i) {
  return as_type<float>(uint(((const device ushort*)scales)[i]) << 16);
}

}  // namespace hm
