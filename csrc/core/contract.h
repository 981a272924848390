// Named-dimension checks: the one place that knows how a bad argument is reported.
//
//   Contract c("qmatmul", args);
//   c.shape("x", x, "rk").dtype("x", x, "f32 f16 bf16");
//   c.require(c['k'] % 32 == 0, "x", "k a multiple of 32");
//
// A letter is bound to the first size it meets and compared on every later one; a failure throws
// ContractError with the op, the argument, the numbers and the dimensions known so far.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "abi.h"

namespace hm {

struct ContractError : std::invalid_argument {
  using invalid_argument::invalid_argument;
};

inline std::string dtype_name(DLDataType d) {
  if (d.lanes != 1) return "vector";
  switch (d.code) {
    case kDLFloat: return "f" + std::to_string(d.bits);
    case kDLBfloat: return "bf" + std::to_string(d.bits);
    case kDLInt: return "i" + std::to_string(d.bits);
    case kDLUInt: return "u" + std::to_string(d.bits);
    case kDLBool: return "bool";
    default: return "dtype " + std::to_string(d.code);
  }
}

inline char* data(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }
inline bool present(const DLTensor& t) { return t.ndim > 0 || t.data != nullptr; }

// The hm_scale of an array of f32, f16 or bf16 numbers (its dtype already checked).
inline hm_scale storage(const DLTensor& t) {
  return t.dtype.code == kDLBfloat ? hm_bf16 : t.dtype.bits == 16 ? hm_f16 : hm_f32;
}

class Contract {
 public:
  explicit Contract(std::string_view op) : op_(op) {
    for (int64_t& d : dim_) d = -1;
  }

  // Needs `count` inputs (or at least, when `more`), `outputs` outputs, `ints` and `floats`.
  Contract& arity(const hm_args& a, int count, bool more, int outputs, int ints, int floats) {
    if (a.n_in < count || (!more && a.n_in > count)) fail_count("inputs", a.n_in, count);
    if (a.n_out != outputs) fail_count("outputs", a.n_out, outputs);
    if (a.n_ints != ints) fail_count("ints", a.n_ints, ints);
    if (a.n_floats != floats) fail_count("floats", a.n_floats, floats);
    return *this;
  }

  // `letters` names the dimensions in order. The array must be compact, row-major and on the CPU.
  Contract& shape(std::string_view arg, const DLTensor& t, std::string_view letters) {
    if (t.ndim != int(letters.size()))
      fail(arg, "has " + std::to_string(t.ndim) + " dimensions, needs " + std::to_string(letters.size()));
    if (t.device.device_type != kDLCPU) fail(arg, "is not on the CPU");
    for (size_t i = 0; i < letters.size(); ++i) bind(arg, letters[i], t.shape[i]);
    int64_t stride = 1;
    bool empty = false;  // has no order to get wrong
    for (int i = 0; i < t.ndim; ++i) empty |= t.shape[i] == 0;
    for (int i = t.ndim - 1; i >= 0 && !empty; --i) {
      if (t.strides && t.shape[i] > 1 && t.strides[i] != stride) fail(arg, "is not contiguous, needs row-major");
      stride *= t.shape[i];
    }
    return *this;
  }

  // `allowed` is a list of names, "f32 f16 bf16".
  Contract& dtype(std::string_view arg, const DLTensor& t, std::string_view allowed) {
    std::string name = dtype_name(t.dtype), padded = " " + std::string(allowed) + " ";
    if (padded.find(" " + name + " ") == std::string::npos) fail(arg, "is " + name + ", needs " + std::string(allowed));
    return *this;
  }

  Contract& bind(std::string_view arg, char letter, int64_t size) {
    int64_t& bound = dim_[letter - 'a'];
    if (bound < 0) bound = size;
    if (bound != size)
      fail(arg, std::string("has ") + letter + "=" + std::to_string(size) + ", needs " + std::to_string(bound));
    return *this;
  }

  const Contract& require(bool ok, std::string_view arg, const std::string& problem) const {
    if (!ok) fail(arg, problem);
    return *this;
  }

  int64_t operator[](char letter) const { return dim_[letter - 'a']; }

  [[noreturn]] void fail(std::string_view arg, const std::string& problem) const {
    std::string dims;
    for (int i = 0; i < 26; ++i)
      if (dim_[i] >= 0) dims += (dims.empty() ? "" : " ") + std::string(1, char('a' + i)) + "=" + std::to_string(dim_[i]);
    throw ContractError(op_ + ": " + std::string(arg) + " " + problem + (dims.empty() ? "" : " [" + dims + "]"));
  }

 private:
  [[noreturn]] void fail_count(const char* what, int has, int needs) const {
    throw ContractError(op_ + ": has " + std::to_string(has) + " " + what + ", needs " + std::to_string(needs));
  }

  std::string op_;
  int64_t dim_[26];
};

// Runs an op's body and turns what it throws into the text of the C ABI.
template <class Body>
const char* guarded(Body&& body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

}  // namespace hm
