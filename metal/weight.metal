// A packed weight as kernels see it: one array of 32-bit words and a table of parts that points into it.
// python/hadamoe/gpu_weight.py makes both; codes are a checkpoint's own bits.
#include "eight.metal"

namespace hm {

enum Table { linear, linear_signed, e2m1, e2m1_gguf, codebook, plain };
enum Scale { f32, f16, bf16, e8m0 };

// A block of rows of one kind. Places count 16-byte pieces of the words.
struct Part {
  uint rows, kind, group, stride, codes, scale, bias, table;  // stride: words from row to row
};
constexpr constant uint NONE = 0xffffffffu;

METAL_FUNC Part part_at(const device uint* parts, uint i) { return ((const device Part*)parts)[i]; }

METAL_FUNC const device uint* piece(const device uint* words, uint place) { return words + 4ul * place; }

// What a kind says. Kernels are compiled for kinds, so all of it is known then.
template <int KIND>
struct Kind {
  enum {
    table = KIND >> 16 & 255,
    bits = KIND >> 8 & 255,
    scale = KIND & 255,
    rotated = KIND >> 24 & 1,   // the part reads x rotated
    group = 32 * (KIND >> 25),  // 0: one scale for a whole row, or none
    // A lane takes this many columns at once: 16 bytes, or, where codes straddle words, 32 columns.
    columns = bits == 2 ? 64 : bits < 8 ? 32 : bits == 8 ? 16 : 8,
    words = columns * bits / 32,
  };
};

// Codes of one kind; a specialisation for each table has a file of its own.
//   open(words, part, lane)   whatever it keeps in registers
//   eight(w, i, v)            v[0..8): numbers 8 i .. 8 i + 7 of the piece with words w, before scale and bias
template <int TABLE, int BITS, int SCALE>
struct Codes;

template <int WORDS>
METAL_FUNC void load_words(const device uint* from, thread uint* to) {
  if constexpr (WORDS % 4 == 0) {
    EACH(i, WORDS / 4) {
      const uint4 w = ((const device uint4*)from)[i];
      EACH(j, 4) to[4 * i + j] = w[j];
    }
  } else {
    EACH(i, WORDS) to[i] = from[i];
  }
}

// Bits of a stored number, and the number.
template <int SCALE>
METAL_FUNC uint stored(const device uint* p, ulong i) {
  if constexpr (SCALE == f32) return p[i];
  else if constexpr (SCALE == e8m0) return ((const device uchar*)p)[i];
  else return ((const device ushort*)p)[i];
}
template <int SCALE>
METAL_FUNC float number(uint bits) {
  if constexpr (SCALE == f32) return as_type<float>(bits);
  else if constexpr (SCALE == f16) return float(as_type<half>(ushort(bits)));
  else if constexpr (SCALE == bf16) return as_type<float>(bits << 16);
  // 2^-127 is below what a flushing GPU holds: twice it here, see Factor
  else return as_type<float>(bits == 255u ? 0x7fc00000u : max(bits, 1u) << 23);
}

// Scale and bias of a group.
template <int TABLE, int BITS, int SCALE>
struct Factor {
  uint scale, bias;  // as stored

  METAL_FUNC void load(const device uint* words, Part part, ulong i) {
    scale = stored<SCALE>(piece(words, part.scale), i);
    if (TABLE == linear && part.bias != NONE) bias = stored<SCALE>(piece(words, part.bias), i);
  }
  // What lane `from` has loaded.
  METAL_FUNC void share(uint from) {
    if constexpr (SCALE == f32) {
      scale = simd_shuffle(scale, ushort(from));
      if (TABLE == linear) bias = simd_shuffle(bias, ushort(from));
    } else {
      const uint both = simd_shuffle(scale | bias << 16, ushort(from));
      scale = both & 0xffffu, bias = both >> 16;
    }
  }
  // Of a dot product with the codes' numbers, and the sum of what they were multiplied with.
  METAL_FUNC float times(float dot, float sum) const {
    const float s = number<SCALE>(scale);
    if constexpr (SCALE == e8m0) return dot * (scale == 0 ? 8192.0f : 16384.0f) * s;  // e2m1.metal's 2^14
    if constexpr (TABLE != linear) return dot * s;
    // codes count from their middle: code * x and bias * sum(x) would be large and cancel
    return dot * s + (number<SCALE>(bias) + float(1 << (BITS - 1)) * s) * sum;
  }
};

// f.run<KIND>() for the kind there is, which is one of KINDS.
template <int KIND0, int... KINDS, class F>
METAL_FUNC void with_kind(uint kind, thread F& f) {
  if (sizeof...(KINDS) == 0 || kind == uint(KIND0)) f.template run<KIND0>();
  else if constexpr (sizeof...(KINDS) > 0) with_kind<KINDS...>(kind, f);
}

}  // namespace hm
