// _cuda: the table of compiled CUDA kernels for Python. A launch neither waits nor allocates, so a graph may capture
// it. It knows no framework, and needs a driver only when it is called.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <deque>
#include <unordered_map>

#include "array.h"
#include "cuda_device.h"
#include "cuda_files.h"  // made by CMake: HM_CUDA_FILES, a HM_FILE(stem) for each cuda/<stem>.cu

namespace nb = nanobind;
using namespace nb::literals;

#define HM_FILE(stem) extern const hm::Table hm_##stem##_kernels;
HM_CUDA_FILES
#undef HM_FILE

namespace hm {
namespace {

[[noreturn]] void refuse(const std::string& problem) { throw Refused("ContractError", problem); }

using Kernels = std::deque<Kernel>;  // none ever moves

Kernels& kernels() {
  static auto* all = [] {
    auto* list = new Kernels;
#define HM_FILE(stem) \
  for (int i = 0; i < hm_##stem##_kernels.count; ++i) list->emplace_back(hm_##stem##_kernels.entries[i]);
    HM_CUDA_FILES
#undef HM_FILE
    return list;
  }();
  return *all;
}

Kernel& find(const std::string& name) {
  static auto* by_name = [] {
    auto* map = new std::unordered_map<std::string, Kernel*>;
    for (Kernel& k : kernels()) map->emplace(k.entry.name, &k);
    return map;
  }();
  const auto found = by_name->find(name);
  if (found == by_name->end()) throw nb::key_error(("no CUDA kernel named " + name).c_str());
  return *found->second;
}

int bits_of(const std::string& kernel, nb::handle number) {
  int bits;
  if (PyFloat_Check(number.ptr())) {
    const float value = float(PyFloat_AsDouble(number.ptr()));
    memcpy(&bits, &value, sizeof bits);
  } else if (!nb::try_cast(number, bits, false)) {
    refuse(kernel + ": size " + nb::cast<std::string>(nb::repr(number)) + " is neither an int32 nor a float");
  }
  return bits;
}

bool compact(const DLTensor& t) {
  int64_t stride = 1;
  bool is = true;
  for (int i = t.ndim - 1; t.strides && i >= 0; --i) {
    if (t.shape[i] == 0) return true;
    is = is && (t.shape[i] == 1 || t.strides[i] == stride);
    stride *= t.shape[i];
  }
  return is;
}

// Takes the arrays of a launch, and learns their device and the stream of their framework.
class Lender {
 public:
  explicit Lender(const char* kernel) : kernel_(kernel) {}

  const void* take(nb::handle source, int index) {
    if (source.is_none()) return nullptr;
    const Array lent = borrow(source, index);
    const DLTensor& t = lent.tensor;
    if (t.device.device_type != kDLCUDA) problem(index, "is not on a CUDA device");
    if (!compact(t)) problem(index, "is not contiguous");
    if (device < 0) {
      device = t.device.device_id;
      api_ = exchange_api(Py_TYPE(source.ptr()));
    }
    if (device != t.device.device_id)
      problem(index, "is on device " + std::to_string(t.device.device_id) + ", those before it are on " + std::to_string(device));
    return static_cast<const char*>(t.data) + t.byte_offset;
  }

  // The framework's current stream; the default one of a framework that does not say.
  cudaStream_t stream() const {
    void* current = nullptr;
    if (api_ && api_->current_work_stream && api_->current_work_stream(kDLCUDA, device, &current)) throw nb::python_error();
    return static_cast<cudaStream_t>(current);
  }

  int device = -1;

 private:
  Array borrow(nb::handle source, int index) const {
    try {
      return Array(source);
    } catch (const nb::cast_error&) {
      problem(index, "is " + nb::cast<std::string>(nb::str(source.type().attr("__name__"))) + ", needs a CUDA array");
    }
  }
  [[noreturn]] void problem(int index, const std::string& text) const {
    refuse(std::string(kernel_) + ": array " + std::to_string(index) + " " + text);
  }

  const char* kernel_;
  const DLPackExchangeAPI* api_ = nullptr;
};

void check_count(const char* kernel, const char* what, size_t found, int expected) {
  if (found != size_t(expected))
    refuse(std::string(kernel) + ": has " + std::to_string(found) + " " + what + ", needs " + std::to_string(expected));
}

// A launch but for its arrays.
class Launch {
 public:
  Launch(const std::string& name, nb::sequence sizes, std::tuple<unsigned, unsigned, unsigned> groups, int threads,
         int shared_bytes, bool overlap)
      : kernel_(find(name)) {
    const Entry& entry = kernel_.entry;
    check_count(entry.name, "sizes", nb::len(sizes), entry.sizes);
    int* size = arguments_.size;
    for (nb::handle number : sizes) *size++ = bits_of(name, number);
    if (threads < 1 || threads > entry.threads)
      refuse(name + ": has " + std::to_string(threads) + " threads, needs 1 to " + std::to_string(entry.threads));
    if (shared_bytes < 0) refuse(name + ": shared_bytes is " + std::to_string(shared_bytes));
    const auto [x, y, z] = groups;
    shape_ = {{x, y, z}, threads, shared_bytes, overlap};
  }

  void call(nb::sequence arrays, std::optional<uintptr_t> stream) const {
    const Entry& entry = kernel_.entry;
    check_count(entry.name, "arrays", nb::len(arrays), entry.arrays);
    Arguments arguments = arguments_;
    Lender lender(entry.name);
    int count = 0;
    for (nb::handle array : arrays) {
      arguments.array[count] = lender.take(array, count);
      ++count;
    }
    const auto on = stream ? reinterpret_cast<cudaStream_t>(*stream) : lender.stream();
    nb::gil_scoped_release release;  // a full queue of launches waits
    kernel_.launch(shape_, arguments, lender.device, on);
  }

 private:
  Kernel& kernel_;
  Shape shape_{};
  Arguments arguments_{};
};

void launch(const std::string& name, nb::sequence arrays, nb::sequence sizes,
            std::tuple<unsigned, unsigned, unsigned> groups, int threads, int shared_bytes,
            std::optional<uintptr_t> stream, bool overlap) {
  Launch(name, sizes, groups, threads, shared_bytes, overlap).call(arrays, stream);
}

nb::dict device(int index) {
  const Device d = device_facts(index);
  const Version driver = driver_version(), runtime = runtime_version();
  nb::dict facts;
  facts["name"] = d.name;
  facts["capability"] = nb::make_tuple(d.major, d.minor);
  facts["multiprocessors"] = d.multiprocessors;
  facts["memory"] = d.memory;
  facts["memory_free"] = d.memory_free;
  facts["l2_bytes"] = d.l2_bytes;
  facts["shared_bytes"] = d.shared_bytes;
  facts["driver"] = nb::make_tuple(driver.major, driver.minor);
  facts["runtime"] = nb::make_tuple(runtime.major, runtime.minor);
  return facts;
}

void load(int device) {
  device_facts(device);
  for (Kernel& k : kernels()) k.load(device);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernel& k : kernels()) names.emplace_back(k.entry.name);
  return names;
}

}  // namespace
}  // namespace hm

NB_MODULE(_cuda, m) {
  nb::set_leak_warnings(false);  // a model may live until the interpreter ends
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const hm::Refused& e) {
      PyErr_SetString(nb::module_::import_("hadamoe.errors").attr(e.type).ptr(), e.what());
    }
  });
  m.def("kernels", &hm::kernel_names);
  m.def("architectures", [] { return std::string(HM_CUDA_ARCHITECTURES); });
  m.def("devices", &hm::device_names);
  m.def("device", &hm::device, "index"_a);
  m.def("load", &hm::load, "device"_a);
  m.def("launch", &hm::launch, "name"_a, "arrays"_a, "sizes"_a, "groups"_a, "threads"_a, "shared_bytes"_a,
        "stream"_a = nb::none(), "overlap"_a = true);
  nb::class_<hm::Launch>(m, "Launch")
      .def(nb::init<const std::string&, nb::sequence, std::tuple<unsigned, unsigned, unsigned>, int, int, bool>(), "name"_a,
           "sizes"_a, "groups"_a, "threads"_a, "shared_bytes"_a, "overlap"_a = true)
      .def("__call__", &hm::Launch::call, "arrays"_a, "stream"_a = nb::none());
}
