// _mlx: the ops of _cpu as lazy functions on MLX's CPU streams. One primitive runs them all; _cpu hands it an op's
// address, it links no kernel. Arrays of the graph are mx.array; what stays (weights in mapped files, signs) is
// numpy's memory, which MLX would copy, and which the primitive borrows and keeps alive instead.
#include <mlx/backend/common/utils.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>
#include <mlx/transforms.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "../core/abi.h"
#include "array.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace hm {
namespace {

// Becomes hadamoe.errors.<type>, wherever MLX lets it out.
struct Refused : std::runtime_error {
  const char* type;
  Refused(const char* type, const std::string& text) : runtime_error(text), type(type) {}
};

// What an op said on a stream's thread: MLX passes on the text alone.
class Problem {
 public:
  static void set(const char* text) {
    std::lock_guard<std::mutex> lock(mutex());
    last() = text;
  }
  static bool is(const char* text) {
    std::lock_guard<std::mutex> lock(mutex());
    return last() == text;
  }

 private:
  static std::mutex& mutex() {
    static auto* m = new std::mutex;  // outlives every stream
    return *m;
  }
  static std::string& last() {
    static auto* text = new std::string;
    return *text;
  }
};

// References to Python objects. The last holder may be a stream's thread; were that to wait for the GIL, it could wait
// for a thread that waits for the stream. So they are dropped later, by Python's main thread or the next call.
class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  void add(nb::handle object) { objects_.push_back(object.inc_ref().ptr()); }
  ~Kept() {
    if (objects_.empty()) return;
    Dropped& d = dropped();
    std::lock_guard<std::mutex> lock(d.mutex);
    d.objects.insert(d.objects.end(), objects_.begin(), objects_.end());
    if (Py_IsInitialized()) Py_AddPendingCall([](void*) { return drop(), 0; }, nullptr);
  }

  // Needs the GIL.
  static void drop() {
    std::vector<PyObject*> objects;
    {
      std::lock_guard<std::mutex> lock(dropped().mutex);
      objects.swap(dropped().objects);
    }
    for (PyObject* o : objects) Py_DECREF(o);
  }

 private:
  struct Dropped {
    std::mutex mutex;
    std::vector<PyObject*> objects;
  };
  static Dropped& dropped() {
    static Dropped* d = new Dropped;  // outlives every stream
    return *d;
  }
  std::vector<PyObject*> objects_;
};

DLDataType dtype_of(mx::Dtype dtype) {
  const uint8_t bits = uint8_t(mx::size_of(dtype) * 8);
  if (dtype == mx::bfloat16) return {kDLBfloat, bits, 1};
  switch (mx::kindof(dtype)) {
    case mx::Dtype::Kind::b: return {kDLBool, bits, 1};
    case mx::Dtype::Kind::u: return {kDLUInt, bits, 1};
    case mx::Dtype::Kind::i: return {kDLInt, bits, 1};
    case mx::Dtype::Kind::f: return {kDLFloat, bits, 1};
    default: return {kDLComplex, bits, 1};
  }
}

// A row-major array as an op sees it: the first `lead` dimensions are one. lead < 0: as it is.
struct View {
  std::vector<int64_t> shape, strides;
  DLTensor tensor{};

  View() = default;
  View(const mx::Shape& full, mx::Dtype dtype, int lead) {
    int64_t rows = 1;
    for (int i = 0; i < lead; ++i) rows *= full[i];
    if (lead >= 0) shape.push_back(rows);
    shape.insert(shape.end(), full.begin() + std::max(lead, 0), full.end());
    tensor.device = {kDLCPU, 0};
    tensor.dtype = dtype_of(dtype);
  }
  // Numpy's memory, which somebody keeps.
  explicit View(const Array& lent) : tensor(lent.tensor) {
    shape.assign(tensor.shape, tensor.shape + tensor.ndim);
    if (tensor.strides) strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  }
  View& at(void* data) {
    tensor.data = data;
    return *this;
  }
  // Valid while the view is.
  DLTensor lend() {
    tensor.ndim = int32_t(shape.size());
    tensor.shape = shape.data();
    tensor.strides = strides.empty() ? nullptr : strides.data();
    return tensor;
  }
  bool operator==(const View& o) const {
    return tensor.data == o.tensor.data && shape == o.shape && strides == o.strides &&
           tensor.dtype.code == o.tensor.dtype.code && tensor.dtype.bits == o.tensor.dtype.bits;
  }
};

// An input of the op.
struct Input {
  int graph;  // which array of the graph; -1: `constant`, absent where it has no data
  int lead;   // dimensions of its batch, -1: it has none
  View constant;
  bool operator==(const Input&) const = default;
};

// An output of the op: the first `kept` dimensions of an array of the graph, then `tail`.
struct Output {
  int graph, kept, lead;
  mx::Shape tail;
  mx::Dtype dtype;

  mx::Shape shape(const std::vector<mx::array>& arrays) const {
    const mx::Shape& from = arrays[size_t(graph)].shape();
    mx::Shape s(from.begin(), from.begin() + kept);
    s.insert(s.end(), tail.begin(), tail.end());
    return s;
  }
  bool operator==(const Output& o) const {
    return graph == o.graph && kept == o.kept && lead == o.lead && tail == o.tail && dtype == o.dtype;
  }
};

// All of a call but its arrays. The last `states` arrays of the graph become the last outputs, read and replaced.
struct Recipe {
  const hm_op* op;
  std::vector<Input> inputs;
  std::vector<Output> outputs;
  int states;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::shared_ptr<Kept> kept;

  bool operator==(const Recipe& o) const {
    return op == o.op && inputs == o.inputs && outputs == o.outputs && states == o.states && ints == o.ints &&
           floats == o.floats;
  }
  size_t new_outputs() const { return outputs.size() - size_t(states); }
};

// The op's arguments, from shapes alone or with memory.
struct Arguments {
  std::vector<View> views;  // inputs, then outputs
  struct Copy {
    const void* from;
    void* to;
    size_t bytes;
  };
  std::vector<Copy> copies;  // states somebody else still reads

  Arguments(const Recipe& r, const std::vector<mx::array>& arrays) {
    views.reserve(r.inputs.size() + r.outputs.size());
    for (const Input& i : r.inputs) views.push_back(i.graph < 0 ? i.constant : view(arrays[size_t(i.graph)], i.lead));
    for (const Output& o : r.outputs) views.emplace_back(o.shape(arrays), o.dtype, o.lead);
  }
  static View view(const mx::array& a, int lead) { return View(a.shape(), a.dtype(), lead); }

  const char* run(const Recipe& r, bool check) {
    for (const Copy& c : copies) memcpy(c.to, c.from, c.bytes);
    std::vector<DLTensor> tensors;
    tensors.reserve(views.size());
    for (View& v : views) tensors.push_back(v.lend());
    const size_t inputs = r.inputs.size();
    const hm_args args{tensors.data(), int32_t(inputs),        tensors.data() + inputs, int32_t(r.outputs.size()),
                       r.ints.data(),  int32_t(r.ints.size()), r.floats.data(),         int32_t(r.floats.size()),
                       check};
    return r.op->run(&args);
  }
};

class HostCall : public mx::Primitive {
 public:
  HostCall(mx::Stream stream, std::shared_ptr<const Recipe> recipe) : Primitive(stream), recipe_(std::move(recipe)) {}

  // The outputs, not yet computed. `arrays` must be row-major by the time they are.
  static std::vector<mx::array> outputs(mx::Stream stream, std::shared_ptr<const Recipe> recipe,
                                        const std::vector<mx::array>& arrays) {
    if (const char* problem = Arguments(*recipe, arrays).run(*recipe, true)) throw Refused("ContractError", problem);
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (const Output& o : recipe->outputs) {
      shapes.push_back(o.shape(arrays));
      dtypes.push_back(o.dtype);
    }
    return mx::array::make_arrays(std::move(shapes), dtypes, std::make_shared<HostCall>(stream, std::move(recipe)),
                                  arrays);
  }

  // The array, or a copy of it when it is computed and not row-major.
  static mx::array row_major(const mx::array& a, mx::Stream stream) {
    const bool ours = a.has_primitive() && dynamic_cast<HostCall*>(&a.primitive());
    const bool known = !a.is_tracer() && a.status() != mx::array::Status::unscheduled;
    return ours || (known && a.flags().row_contiguous) ? a : mx::contiguous(a, false, stream);
  }

  void eval_cpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override {
    release_inputs(in, out);
    auto call = std::make_shared<Arguments>(*recipe_, in);
    for (const mx::array& a : in)
      if (!a.flags().row_contiguous) throw std::runtime_error(std::string(name()) + ": an input is not row-major");
    for (size_t i = 0; i < recipe_->inputs.size(); ++i)
      if (int graph = recipe_->inputs[i].graph; graph >= 0)
        call->views[i].at(const_cast<char*>(in[size_t(graph)].data<char>()));
    for (size_t i = 0; i < out.size(); ++i) {
      if (i < recipe_->new_outputs())
        out[i].set_data(mx::allocator::malloc(out[i].nbytes()));
      else
        take_state(in[size_t(recipe_->outputs[i].graph)], out[i], *call);
      call->views[recipe_->inputs.size() + i].at(out[i].data<char>());
    }
    mx::cpu::get_command_encoder(stream()).dispatch([call, recipe = recipe_] {
      const char* problem = call->run(*recipe, false);
      if (!problem) return;
      Problem::set(problem);
      throw std::runtime_error(problem);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string(name()) + ": runs on MLX's CPU device");
  }

  std::vector<mx::array> jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                             const std::vector<int>&) override {
    throw Refused("UnsupportedError", std::string(name()) + ": has no derivative");
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override {
    throw Refused("UnsupportedError", std::string(name()) + ": has no derivative");
  }

  // The new axis joins the batch: it goes in front of it, in every array that has one.
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& in,
                                                           const std::vector<int>& axes) override {
    auto wider = std::make_shared<Recipe>(*recipe_);
    std::vector<int> lead(in.size(), -1);
    for (Input& i : wider->inputs)
      if (i.graph >= 0 && i.lead >= 0) lead[size_t(i.graph)] = i.lead++;
    for (size_t o = 0; o < wider->outputs.size(); ++o) {
      Output& output = wider->outputs[o];
      if (o >= wider->new_outputs()) lead[size_t(output.graph)] = output.lead;
      ++output.kept;
      ++output.lead;
    }
    int size = 0;
    for (size_t i = 0; i < in.size(); ++i)
      if (axes[i] >= 0) size = in[i].shape(axes[i]);
    std::vector<mx::array> arrays;
    for (size_t i = 0; i < in.size(); ++i) {
      if (lead[i] < 0 && axes[i] >= 0)
        throw Refused("UnsupportedError", std::string(name()) + ": an argument without a batch has one under mx.vmap");
      mx::array a = in[i];
      if (axes[i] >= 0) {
        a = mx::moveaxis(a, axes[i], 0, stream());
      } else if (lead[i] >= 0) {
        mx::Shape shape = a.shape();
        shape.insert(shape.begin(), size);
        a = mx::broadcast_to(a, shape, stream());
      }
      arrays.push_back(row_major(a, stream()));
    }
    return {outputs(stream(), std::move(wider), arrays), std::vector<int>(recipe_->outputs.size(), 0)};
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& in) override {
    std::vector<mx::Shape> shapes;
    for (const Output& o : recipe_->outputs) shapes.push_back(o.shape(in));
    return shapes;
  }

  const char* name() const override { return recipe_->op->name; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto* o = dynamic_cast<const HostCall*>(&other);
    return o && (recipe_ == o->recipe_ || *recipe_ == *o->recipe_);
  }

 private:
  // Every output lists the inputs, so that none seems unused by others. After this call MLX forgets all lists, unless
  // it traces.
  static void release_inputs(const std::vector<mx::array>& in, std::vector<mx::array>& out) {
    for (const mx::array& o : out)
      if (o.is_tracer()) return;
    for (mx::array& o : out)
      if (&o.inputs() != &in) o.inputs().clear();
  }

  // A state nobody else can see is replaced where it is, any other in a copy.
  static void take_state(const mx::array& from, mx::array& to, Arguments& call) {
    if (mx::is_donatable(from, to)) {
      to.copy_shared_buffer(from);
      return;
    }
    to.set_data(mx::allocator::malloc(to.nbytes()));
    call.copies.push_back({from.data<char>(), to.data<char>(), to.nbytes()});
  }

  std::shared_ptr<const Recipe> recipe_;
};

using OutputTuple = std::tuple<int, int, std::vector<int>, mx::Dtype>;

std::vector<mx::array> call(nb::capsule op, const std::vector<nb::object>& inputs, const std::vector<int>& leads,
                            const std::vector<OutputTuple>& outputs, const std::vector<mx::array>& states,
                            std::vector<int64_t> ints, std::vector<double> floats) {
  Kept::drop();
  const mx::Stream stream = mx::default_stream(mx::Device::cpu);
  auto recipe = std::make_shared<Recipe>();
  recipe->op = static_cast<const hm_op*>(op.data("hm_op"));
  recipe->kept = std::make_shared<Kept>();
  std::vector<mx::array> arrays;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const int lead = i < leads.size() ? leads[i] : -1;
    if (nb::isinstance<mx::array>(inputs[i])) {
      recipe->inputs.push_back({int(arrays.size()), lead, {}});
      arrays.push_back(HostCall::row_major(nb::cast<const mx::array&>(inputs[i]), stream));
    } else {
      const Array lent(inputs[i]);
      recipe->inputs.push_back({-1, -1, View(lent)});
      recipe->kept->add(inputs[i]);
    }
  }
  for (const auto& [input, kept, tail, dtype] : outputs) {
    const Input& like = recipe->inputs.at(size_t(input));
    recipe->outputs.push_back({like.graph, kept, like.lead, mx::Shape(tail.begin(), tail.end()), dtype});
  }
  for (const mx::array& state : states) {
    recipe->outputs.push_back({int(arrays.size()), int(state.ndim()), 1, {}, state.dtype()});
    arrays.push_back(HostCall::row_major(state, stream));
  }
  recipe->states = int(states.size());
  recipe->ints = std::move(ints);
  recipe->floats = std::move(floats);
  return HostCall::outputs(stream, std::move(recipe), arrays);
}

}  // namespace
}  // namespace hm

NB_MODULE(_mlx, m) {
  nb::module_::import_("mlx.core");
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const hm::Refused& e) {
      PyErr_SetString(nb::module_::import_("hadamoe.errors").attr(e.type).ptr(), e.what());
    } catch (const std::runtime_error& e) {
      if (!hm::Problem::is(e.what())) throw;
      PyErr_SetString(nb::module_::import_("hadamoe.errors").attr("ContractError").ptr(), e.what());
    }
  });
  m.def("call", &hm::call, "op"_a, "inputs"_a, "leads"_a, "outputs"_a, "states"_a, "ints"_a, "floats"_a);
}
