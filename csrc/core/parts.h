// Reads the wire format of a weight (hm_part, abi.h) and checks every span against its buffer, so
// that no kernel can be sent outside the memory it was lent.
#pragma once
#include <vector>

#include "contract.h"
#include "instances.h"

namespace hm {

struct InstanceInfo {
  hm_table table;
  int bits;
  hm_scale scale;
};

inline constexpr InstanceInfo kInstances[] = {
#define X(table, bits, scale) {hm_##table, bits, hm_##scale},
    HM_INSTANCES(X)
#undef X
};
inline constexpr int64_t kInstanceCount = sizeof(kInstances) / sizeof(kInstances[0]);

inline constexpr int64_t scale_bytes(hm_scale s) { return s == hm_f32 ? 4 : s == hm_e8m0 ? 1 : 2; }

// Bytes of codes a row of `columns` needs at least.
inline int64_t code_bytes(const InstanceInfo& i, int64_t columns) {
  return i.table == hm_e2m1_gguf ? (columns + 31) / 32 * 17 : (columns * i.bits + 7) / 8;
}

// The u8 arrays args.in[first..] as base pointers and sizes.
struct Buffers {
  std::vector<const uint8_t*> base;
  std::vector<int64_t> size;

  Buffers(Contract& c, const hm_args& args, int first) {
    for (int i = first; i < args.n_in; ++i) {
      const DLTensor& t = args.in[i];
      const std::string name = "buffers[" + std::to_string(i - first) + "]";
      c.require(t.ndim == 1, name, "has " + std::to_string(t.ndim) + " dimensions, needs 1");
      c.dtype(name, t, "u8");
      base.push_back(reinterpret_cast<const uint8_t*>(data(t)));
      size.push_back(t.shape[0]);
    }
  }
};

// A checked weight: parts[expert * per_expert + i], every expert of `rows` rows.
struct Parts {
  const hm_part* parts = nullptr;
  int64_t experts = 0, per_expert = 0, rows = 0;

  Parts(Contract& c, const std::string& name, const DLTensor& t, int64_t columns, const Buffers& buffers) {
    c.require(t.ndim == 3 && t.shape[2] == HM_PART_FIELDS && t.shape[0] > 0 && t.shape[1] > 0, name,
              "is not [experts, parts, " + std::to_string(HM_PART_FIELDS) + "]");
    c.dtype(name, t, "i64");
    parts = reinterpret_cast<const hm_part*>(data(t));
    experts = t.shape[0];
    per_expert = t.shape[1];
    Sizes known;
    for (int64_t e = 0; e < experts; ++e) {
      int64_t sum = 0;
      for (int64_t i = 0; i < per_expert; ++i) {
        const hm_part& p = parts[e * per_expert + i];
        if (!known.cover(p, buffers)) {
          if (auto problem = check(p, columns, buffers); !problem.empty())
            c.fail(name + "[" + std::to_string(e) + "," + std::to_string(i) + "]", problem);
          if (p.rows) known = Sizes(p, columns);
        }
        sum += p.rows;
      }
      if (e == 0) rows = sum;
      if (sum != rows || sum == 0)
        c.fail(name + "[" + std::to_string(e) + "]",
               "has " + std::to_string(sum) + " rows, needs " + (rows ? std::to_string(rows) : "at least 1"));
    }
  }

 private:
  // Bytes that a checked part needs. A mixture of experts has hundreds of parts of a few shapes, and one of
  // a known shape only has to lie inside its buffers.
  struct Sizes {
    hm_part part{};
    int64_t codes = 0, scales = 0, codebook = 0;

    Sizes() = default;
    Sizes(const hm_part& p, int64_t columns) : part(p) {
      const InstanceInfo& instance = kInstances[p.instance];
      codes = (p.rows - 1) * p.row_bytes + code_bytes(instance, columns);
      if (instance.table == hm_plain || instance.table == hm_e2m1_gguf) return;
      scales = p.rows * ((columns - 1) / p.group + 1) * scale_bytes(instance.scale);
      if (instance.table == hm_codebook) codebook = 4 << instance.bits;
    }
    bool cover(const hm_part& p, const Buffers& b) const {
      auto inside = [&](int64_t buffer, int64_t offset, int64_t bytes) {
        return uint64_t(buffer) < b.size.size() && offset >= 0 && offset <= b.size[size_t(buffer)] - bytes;
      };
      return p.rows > 0 && p.rows == part.rows && p.instance == part.instance && p.group == part.group &&
             p.row_bytes == part.row_bytes && inside(p.codes_buffer, p.codes_offset, codes) &&
             (!scales || (inside(p.scale_buffer, p.scale_offset, scales) &&
                          (p.bias_buffer < 0 || inside(p.bias_buffer, p.bias_offset, scales)))) &&
             (!codebook || inside(p.codebook_buffer, p.codebook_offset, codebook));
    }
  };

  static std::string check(const hm_part& p, int64_t columns, const Buffers& buffers) {
    constexpr int64_t kMost = int64_t(1) << 40;
    auto number = [](int64_t n) { return std::to_string(n); };
    if (p.rows == 0) return {};  // filler where experts have fewer parts than others
    if (p.instance < 0 || p.instance >= kInstanceCount)
      return "has instance " + number(p.instance) + ", needs 0.." + number(kInstanceCount - 1);
    if (p.rows < 0 || p.rows >= kMost) return "has rows=" + number(p.rows) + ", needs a positive number";
    if (p.group <= 0) return "has group=" + number(p.group) + ", needs a positive number";
    const InstanceInfo& instance = kInstances[p.instance];
    if (instance.table == hm_e2m1_gguf && columns % 32)
      return "has columns=" + number(columns) + ", needs a multiple of 32";
    const int64_t row = code_bytes(instance, columns);
    if (p.row_bytes < row || p.row_bytes >= kMost)
      return "has row_bytes=" + number(p.row_bytes) + ", needs at least " + number(row);
    // Sizes as double: no product of hostile numbers overflows, and real ones are exact.
    const double codes = double(p.rows - 1) * double(p.row_bytes) + double(row);
    std::string problem = span("codes", p.codes_buffer, p.codes_offset, codes, buffers);
    if (!problem.empty() || instance.table == hm_plain || instance.table == hm_e2m1_gguf) return problem;
    const double groups = double((columns - 1) / p.group + 1);
    const double scales = double(p.rows) * groups * double(scale_bytes(instance.scale));
    problem = span("scale", p.scale_buffer, p.scale_offset, scales, buffers);
    if (problem.empty() && p.bias_buffer >= 0) problem = span("bias", p.bias_buffer, p.bias_offset, scales, buffers);
    if (problem.empty() && instance.table == hm_codebook)
      problem = span("codebook", p.codebook_buffer, p.codebook_offset, double(4 << instance.bits), buffers);
    return problem;
  }

  static std::string span(const char* what, int64_t buffer, int64_t offset, double bytes, const Buffers& buffers) {
    const int64_t count = int64_t(buffers.size.size());
    if (buffer < 0 || buffer >= count)
      return std::string("has ") + what + " in buffer " + std::to_string(buffer) + ", needs 0.." +
             std::to_string(count - 1);
    const int64_t size = buffers.size[size_t(buffer)];
    if (offset >= 0 && double(offset) + bytes <= double(size)) return {};
    return std::string("has ") + what + " at byte " + std::to_string(offset) + ", needs " +
           std::to_string(int64_t(bytes)) + " bytes from there, the buffer has " + std::to_string(size);
  }
};

}  // namespace hm
