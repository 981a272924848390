// Runs ops of the C ABI without Python, so that kernels of another CPU (under qemu) and kernels built
// with sanitizers prove the same claims. Reads requests from stdin and answers on stdout.
//
//   request   u32 name length, name, u32 counts of inputs, outputs, ints, floats; i64 ints; f64 floats;
//             per array: u8 code, u8 bits, u16 ndim, i64 shape[ndim], u64 bytes, the bytes
//   answer    u32 length of a message, the message; when it is empty, every output's bytes
//
// Every array is mapped so that its last byte is followed by an unmapped page; with `@guard 1` its
// first byte follows one instead. `@isas` lists the instruction sets, `@isa NAME` chooses one and
// `@threads n` sets the pool's size.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "../../csrc/core/abi.h"
#include "../../csrc/core/pool.h"
#include "../../csrc/cpu/isa.h"

namespace {

bool guard_before = false;

// One array between two unmapped pages. A bounds bug is a SIGSEGV (or a sanitizer's report) here.
class Array {
 public:
  explicit Array(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
    mapped_ = room + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (room && mprotect(base_ + page, room, PROT_READ | PROT_WRITE))) abort();
    data = guard_before ? base_ + page : base_ + page + room - bytes;
  }
  Array(const Array&) = delete;
  ~Array() { munmap(base_, mapped_); }
  char* data;

 private:
  char* base_;
  size_t mapped_;
};

void take(void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, stdin) != bytes) exit(feof(stdin) ? 0 : 2);
}
template <class T>
T take() {
  T value;
  take(&value, sizeof(T));
  return value;
}
void give(const void* from, size_t bytes) {
  if (bytes && fwrite(from, 1, bytes, stdout) != bytes) exit(2);
}
void give_text(const std::string& text) {
  uint32_t size = uint32_t(text.size());
  give(&size, 4);
  give(text.data(), size);
  fflush(stdout);
}

struct Request {
  std::string name;
  uint32_t inputs, outputs;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<DLTensor> tensors;
  std::vector<Array*> arrays;
  std::vector<size_t> sizes;

  void read() {
    name.resize(take<uint32_t>());
    take(&name[0], name.size());
    inputs = take<uint32_t>();
    outputs = take<uint32_t>();
    ints.resize(take<uint32_t>());
    floats.resize(take<uint32_t>());
    take(ints.data(), ints.size() * 8);
    take(floats.data(), floats.size() * 8);
    shapes.resize(inputs + outputs);
    tensors.resize(inputs + outputs);
    for (size_t i = 0; i < tensors.size(); ++i) read_array(tensors[i], shapes[i]);
  }
  void read_array(DLTensor& t, std::vector<int64_t>& shape) {
    uint8_t code = take<uint8_t>(), bits = take<uint8_t>();
    uint16_t ndim = take<uint16_t>();
    shape.resize(ndim);
    take(shape.data(), ndim * 8u);
    uint64_t bytes = take<uint64_t>();
    bool absent = ndim == 0 && bytes == 0;
    Array* array = new Array(bytes);
    take(array->data, bytes);
    arrays.push_back(array);
    sizes.push_back(bytes);
    t = DLTensor{absent ? nullptr : array->data, {kDLCPU, 0}, ndim, {code, bits, 1}, shape.data(), nullptr, 0};
  }
  ~Request() {
    for (Array* a : arrays) delete a;
  }
};

void run(Request& r) {
  int32_t count = 0;
  const hm_op* table = hm_op_table(&count);
  for (int32_t i = 0; i < count; ++i) {
    if (r.name != table[i].name) continue;
    hm_args args{r.tensors.data(),  int32_t(r.inputs),      r.tensors.data() + r.inputs, int32_t(r.outputs),
                 r.ints.data(),     int32_t(r.ints.size()), r.floats.data(),             int32_t(r.floats.size())};
    const char* error = table[i].run(&args);
    if (error) return give_text(error);
    give_text("");
    for (size_t k = r.inputs; k < r.tensors.size(); ++k) give(r.arrays[k]->data, r.sizes[k]);
    fflush(stdout);
    return;
  }
  give_text("no op " + r.name);
}

}  // namespace

int main() {
  for (;;) {
    Request r;
    r.read();
    if (r.name[0] != '@') run(r);
    else if (r.name == "@guard") guard_before = r.ints[0] != 0, give_text("ok");
    else if (r.name == "@isas") {
      std::string names;
      for (const std::string& n : hm::isa_names()) names += (names.empty() ? "" : " ") + n;
      give_text(names);
    } else if (r.name.rfind("@isa ", 0) == 0) hm::set_isa(r.name.substr(5)), give_text(hm::isa_name());
    else if (r.name == "@threads") hm::set_thread_count(int(r.ints[0])), give_text("ok");
    else give_text("no command " + r.name);
  }
}
