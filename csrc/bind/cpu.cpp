// _cpu: the op table for Python. It knows no framework and holds no state of its own.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "../core/abi.h"
#include "../core/instances.h"
#include "../core/kv_codecs.h"
#include "../core/pool.h"
#include "../core/profile.h"
#include "../cpu/isa.h"
#include "array.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hm {
namespace {

const hm_op& find(const std::string& name) {
  int32_t count;
  const hm_op* table = hm_op_table(&count);
  for (int32_t i = 0; i < count; ++i)
    if (name == table[i].name) return table[i];
  throw nb::key_error(("no op named " + name).c_str());
}

[[noreturn]] void refuse(const std::string& problem) {
  nb::object error = nb::module_::import_("hadamoe.errors").attr("ContractError");
  PyErr_SetString(error.ptr(), problem.c_str());
  throw nb::python_error();
}

// Lends arrays (None for an absent one) to an op.
void lend(const char* op, const char* what, const std::vector<nb::object>& arrays, std::vector<Array>& held) {
  for (const nb::object& o : arrays) {
    try {
      held.emplace_back(o);
    } catch (const nb::cast_error&) {  // no array, or one DLPack cannot describe (byte-swapped numbers)
      const std::string which = std::string(what) + " " + std::to_string(&o - arrays.data());
      const std::string type = nb::cast<std::string>(nb::str(o.type().attr("__name__")));
      refuse(std::string(op) + ": " + which + " is " + type + ", needs an array of this machine's own numbers");
    }
  }
}

template <class Run>
void finish(Run&& run) {
  const char* problem;
  {
    nb::gil_scoped_release release;
    problem = run();
  }
  if (problem) refuse(problem);
}

// Runs one op: arrays in and out (None for an absent one), then its integers and numbers.
void call(const std::string& name, const std::vector<nb::object>& in, const std::vector<nb::object>& out,
          const std::vector<int64_t>& ints, const std::vector<double>& floats) {
  const hm_op& op = find(name);
  std::vector<Array> held;
  held.reserve(in.size() + out.size());
  lend(op.name, "input", in, held);
  lend(op.name, "output", out, held);
  std::vector<DLTensor> tensors;
  tensors.reserve(held.size());
  for (const Array& a : held) tensors.push_back(a.tensor);
  const hm_args args{tensors.data(), int32_t(in.size()),   tensors.data() + in.size(), int32_t(out.size()),
                     ints.data(),    int32_t(ints.size()), floats.data(),              int32_t(floats.size())};
  finish([&] { return op.run(&args); });
}

// The contract of an op alone, on arrays that another device computes: (shape, DLPack's type code, bits) stands for
// one of those, the others are lent.
void check(const std::string& name, const std::vector<nb::object>& in, const std::vector<nb::object>& out,
           const std::vector<int64_t>& ints, const std::vector<double>& floats) {
  const hm_op& op = find(name);
  std::vector<Array> held;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<DLTensor> tensors;
  held.reserve(in.size());
  shapes.reserve(in.size() + out.size());
  for (const auto* arrays : {&in, &out})
    for (const nb::object& o : *arrays) {
      if (!nb::isinstance<nb::tuple>(o)) {
        lend(op.name, "input", {o}, held);
        tensors.push_back(held.back().tensor);
        continue;
      }
      const auto [shape, code, bits] = nb::cast<std::tuple<std::vector<int64_t>, uint8_t, uint8_t>>(o);
      shapes.push_back(shape);
      tensors.push_back({nullptr, {kDLCPU, 0}, int32_t(shape.size()), {code, bits, 1}, shapes.back().data(), nullptr, 0});
    }
  const hm_args args{tensors.data(), int32_t(in.size()),   tensors.data() + in.size(), int32_t(out.size()),
                     ints.data(),    int32_t(ints.size()), floats.data(),              int32_t(floats.size()),
                     true};
  finish([&] { return op.run(&args); });
}

// An op whose weights are checked once. `...` stands for the inputs and integers that every call brings.
class Bound {
 public:
  Bound(const std::string& name, const std::vector<nb::object>& in, int outputs, const std::vector<nb::object>& ints,
        const std::vector<double>& floats)
      : op_(find(name)), kept_(in), outputs_(outputs), floats_(floats) {
    if (!op_.bind) throw nb::value_error((name + " cannot be bound").c_str());
    const nb::handle open(Py_Ellipsis);
    for (size_t i = 0; i < in.size(); ++i)
      if (in[i].is(open)) {
        open_inputs_.push_back(i);
        kept_[i] = nb::none();
      }
    for (size_t i = 0; i < ints.size(); ++i)
      if (ints[i].is(open)) {
        open_ints_.push_back(i);
        ints_.push_back(0);
      } else {
        ints_.push_back(nb::cast<int64_t>(ints[i]));
      }
    held_.reserve(in.size());
    lend(op_.name, "input", kept_, held_);
    for (const Array& a : held_) tensors_.push_back(a.tensor);
    tensors_.resize(in.size() + size_t(outputs), DLTensor{});
    const hm_args args = arguments(tensors_, ints_);
    finish([&] { return op_.bind(&args, &handle_); });
  }
  Bound(const Bound&) = delete;
  ~Bound() {
    if (handle_) op_.release(handle_);
  }

  void call(const std::vector<nb::object>& in, const std::vector<nb::object>& out,
            const std::vector<int64_t>& ints) const {
    if (in.size() != open_inputs_.size() || int(out.size()) != outputs_ || ints.size() != open_ints_.size())
      refuse(std::string(op_.name) + ": has " + std::to_string(in.size()) + " inputs, " + std::to_string(out.size()) +
             " outputs and " + std::to_string(ints.size()) + " ints left, needs " +
             std::to_string(open_inputs_.size()) + ", " + std::to_string(outputs_) + " and " +
             std::to_string(open_ints_.size()));
    std::vector<Array> held;
    held.reserve(in.size() + out.size());
    lend(op_.name, "input", in, held);
    lend(op_.name, "output", out, held);
    std::vector<DLTensor> tensors(tensors_);
    std::vector<int64_t> numbers(ints_);
    for (size_t i = 0; i < in.size(); ++i) tensors[open_inputs_[i]] = held[i].tensor;
    for (size_t i = 0; i < out.size(); ++i) tensors[kept_.size() + i] = held[in.size() + i].tensor;
    for (size_t i = 0; i < ints.size(); ++i) numbers[open_ints_[i]] = ints[i];
    const hm_args args = arguments(tensors, numbers);
    finish([&] { return op_.call(handle_, &args); });
  }

  const char* name() const { return op_.name; }

 private:
  hm_args arguments(std::vector<DLTensor>& tensors, const std::vector<int64_t>& ints) const {
    return {tensors.data(), int32_t(kept_.size()), tensors.data() + kept_.size(), int32_t(outputs_),
            ints.data(),    int32_t(ints.size()),  floats_.data(),                int32_t(floats_.size())};
  }

  const hm_op& op_;
  std::vector<nb::object> kept_;  // the arrays, alive
  std::vector<Array> held_;
  std::vector<DLTensor> tensors_;
  std::vector<size_t> open_inputs_, open_ints_;
  std::vector<int64_t> ints_;
  int outputs_;
  std::vector<double> floats_;
  void* handle_ = nullptr;
};

// What another extension needs to run an op: its entry of the table.
nb::capsule op(const std::string& name) { return nb::capsule(&find(name), "hm_op"); }

std::vector<std::tuple<std::string, int, std::string>> instances() {
  std::vector<std::tuple<std::string, int, std::string>> list;
#define X(table, bits, scale) list.emplace_back(#table, bits, #scale);
  HM_INSTANCES(X)
#undef X
  return list;
}

std::vector<std::tuple<std::string, int>> kv_codecs() {
  std::vector<std::tuple<std::string, int>> list;
#define X(name, bits) list.emplace_back(#name, bits);
  HM_KV_CODECS(X)
#undef X
  return list;
}

}  // namespace
}  // namespace hm

NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);  // a model may live until the interpreter ends
  m.def("call", &hm::call, "op"_a, "inputs"_a, "outputs"_a, "ints"_a, "floats"_a);
  m.def("check", &hm::check, "op"_a, "inputs"_a, "outputs"_a, "ints"_a, "floats"_a);
  nb::class_<hm::Bound>(m, "Bound")
      .def(nb::init<const std::string&, const std::vector<nb::object>&, int, const std::vector<nb::object>&,
                    const std::vector<double>&>(),
           "op"_a, "inputs"_a, "outputs"_a, "ints"_a, "floats"_a)
      .def_prop_ro("op", &hm::Bound::name)
      .def("__call__", &hm::Bound::call, "inputs"_a, "outputs"_a, "ints"_a);
  m.def("ops", [] {
    int32_t count;
    const hm_op* table = hm_op_table(&count);
    std::vector<std::string> names;
    for (int32_t i = 0; i < count; ++i) names.emplace_back(table[i].name);
    return names;
  });
  m.def("op", &hm::op, "name"_a);
  m.def("instances", &hm::instances);
  m.def("kv_codecs", &hm::kv_codecs);
  m.def("kv_page_bytes", &hm_kv_page_bytes, "codec"_a, "head_dim"_a);
  m.def("isas", &hm::isa_names);
  m.def("isa", &hm::isa_name);
  m.def("set_isa", &hm::set_isa, "name"_a);
  m.def("threads", &hm::thread_count);
  m.def("set_threads", &hm::set_thread_count, "count"_a);
  m.def("count_products", [](bool on) { hm::product_count.on = on; }, "on"_a);
  m.def("products", [] {
    return std::tuple<int64_t, int64_t>(hm::product_count.nanoseconds, hm::product_count.bytes);
  });
}
