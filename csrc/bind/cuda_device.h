// CUDA devices and launches, without Python: the runtime's errors become messages with the figures.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../cuda/table.h"

namespace hm {

// Becomes hadamoe.errors.<type>.
struct Refused : std::runtime_error {
  const char* type;
  Refused(const char* type, const std::string& text) : runtime_error(text), type(type) {}
};

constexpr int MAX_DEVICES = 64;

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors, l2_bytes, shared_bytes;  // shared memory of a block, at most
  size_t memory, memory_free;
};

// Names of all; there is at least one, or DeviceError says why not.
std::vector<std::string> device_names();
Device device_facts(int index);

struct Version {
  int major, minor;
};
// The newest CUDA the driver runs; 0.0 where there is none.
Version driver_version();
Version runtime_version();

// All of a launch but its kernel and arguments.
struct Shape {
  unsigned groups[3];
  int threads, shared_bytes;
  bool overlap;  // may begin before its predecessors in the stream end: the kernel waits itself
};

class Kernel {
 public:
  explicit Kernel(const Entry& entry) : entry(entry) {}

  // device < 0: the current one.
  void launch(const Shape& shape, const Arguments& arguments, int device, cudaStream_t stream);
  // Brings the code to a device, which a stream that is being captured may forbid.
  void load(int device) { ready(device, 0); }

  const Entry& entry;

 private:
  void ready(int device, int shared_bytes);
  std::atomic<int> limit_[MAX_DEVICES] = {};  // 1 + bytes of shared memory it may ask for; 0: not yet there
  // Whether the code there waits for its predecessors (wait_for_previous in cuda/ptx.cuh), so that it may overlap.
  // Code for 8.0 that a newer device runs does not.
  std::atomic<bool> waits_[MAX_DEVICES] = {};
};

}  // namespace hm
