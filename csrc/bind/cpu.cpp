// _cpu: the op table for Python. It knows no framework and holds no state of its own.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "../core/abi.h"
#include "../core/instances.h"
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

// Runs one op: arrays in and out (None for an absent one), then its integers and numbers.
void call(const std::string& name, const std::vector<nb::object>& in, const std::vector<nb::object>& out,
          const std::vector<int64_t>& ints, const std::vector<double>& floats) {
  const hm_op& op = find(name);
  std::vector<Array> held;
  held.reserve(in.size() + out.size());
  for (const auto* list : {&in, &out})
    for (const nb::object& o : *list) {
      try {
        held.emplace_back(o);
      } catch (const nb::cast_error&) {  // no array, or one DLPack cannot describe (byte-swapped numbers)
        const std::string which = (list == &in ? "input " : "output ") + std::to_string(&o - list->data());
        const std::string type = nb::cast<std::string>(nb::str(o.type().attr("__name__")));
        refuse(name + ": " + which + " is " + type + ", needs an array of this machine's own numbers");
      }
    }
  std::vector<DLTensor> tensors;
  tensors.reserve(held.size());
  for (const Array& a : held) tensors.push_back(a.tensor);
  hm_args args{tensors.data(),         int32_t(in.size()),  tensors.data() + in.size(), int32_t(out.size()),
               ints.data(),            int32_t(ints.size()), floats.data(),             int32_t(floats.size())};
  const char* problem;
  {
    nb::gil_scoped_release release;
    problem = op.run(&args);
  }
  if (problem) refuse(problem);
}

std::vector<std::tuple<std::string, int, std::string>> instances() {
  std::vector<std::tuple<std::string, int, std::string>> list;
#define X(table, bits, scale) list.emplace_back(#table, bits, #scale);
  HM_INSTANCES(X)
#undef X
  return list;
}

}  // namespace
}  // namespace hm

NB_MODULE(_cpu, m) {
  m.def("call", &hm::call, "op"_a, "inputs"_a, "outputs"_a, "ints"_a, "floats"_a);
  m.def("ops", [] {
    int32_t count;
    const hm_op* table = hm_op_table(&count);
    std::vector<std::string> names;
    for (int32_t i = 0; i < count; ++i) names.emplace_back(table[i].name);
    return names;
  });
  m.def("instances", &hm::instances);
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
