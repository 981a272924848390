#include "cuda_device.h"

#include <algorithm>
#include <mutex>

#include "cuda_files.h"  // made by CMake: HM_CUDA_ARCHITECTURES

namespace hm {
namespace {

std::string text(Version v) { return std::to_string(v.major) + "." + std::to_string(v.minor); }
Version version(int number) { return {number / 1000, number % 1000 / 10}; }

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// What an error means, for the current device.
std::string meaning(cudaError_t error) {
  cudaGetLastError();  // or the next launch would report it
  const Version driver = driver_version(), runtime = runtime_version();
  switch (error) {
    case cudaErrorInsufficientDriver:
      if (driver.major == 0) return "there is no NVIDIA driver on this machine";
      return "the NVIDIA driver runs CUDA up to " + text(driver) + ", this build needs " + text({runtime.major, 0}) +
             ": install a newer driver, or build hadamoe with CUDA " + std::to_string(driver.major);
    case cudaErrorNoDevice:
      return "the NVIDIA driver (CUDA " + text(driver) + ") sees no CUDA device";
    case cudaErrorNoKernelImageForDevice: {
      int device = 0;
      cudaGetDevice(&device);
      const Version capability{attribute(cudaDevAttrComputeCapabilityMajor, device),
                               attribute(cudaDevAttrComputeCapabilityMinor, device)};
      return "device " + std::to_string(device) + " has compute capability " + text(capability) +
             ", this build has code for " HM_CUDA_ARCHITECTURES;
    }
    default:
      return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
  }
}

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw Refused("DeviceError", what + ": " + meaning(error));
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "CUDA");
  return count;
}

// The device of a launch, for as long as it takes.
class OnDevice {
 public:
  explicit OnDevice(int wanted) {
    check(cudaGetDevice(&before_), "CUDA");
    index = wanted < 0 ? before_ : wanted;
    if (index != before_) check(cudaSetDevice(index), "CUDA device " + std::to_string(index));
  }
  ~OnDevice() {
    if (index != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  int index;

 private:
  int before_ = 0;
};

}  // namespace

Version driver_version() {
  int number = 0;
  cudaDriverGetVersion(&number);
  return version(number);
}

Version runtime_version() { return version(CUDART_VERSION); }

std::vector<std::string> device_names() {
  const int count = device_count();
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp facts;
    check(cudaGetDeviceProperties(&facts, i), "CUDA device " + std::to_string(i));
    names.emplace_back(facts.name);
  }
  return names;
}

Device device_facts(int index) {
  const std::string what = "CUDA device " + std::to_string(index);
  const int count = device_count();
  if (index < 0 || index >= count)
    throw Refused("DeviceError", what + ": there are " + std::to_string(count) + " devices");
  cudaDeviceProp facts;
  check(cudaGetDeviceProperties(&facts, index), what);
  Device d{facts.name,         facts.major, facts.minor, facts.multiProcessorCount, facts.l2CacheSize,
           int(facts.sharedMemPerBlockOptin), 0, 0};
  const OnDevice on(index);
  check(cudaMemGetInfo(&d.memory_free, &d.memory), what);
  return d;
}

void Kernel::launch(const Shape& shape, const Arguments& arguments, int device, cudaStream_t stream) {
  const OnDevice on(device);
  ready(on.index, shape.shared_bytes);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.groups[0], shape.groups[1], shape.groups[2]);
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = shape.overlap && waits_[on.index].load(std::memory_order_relaxed);
  void* parameters[] = {const_cast<Arguments*>(&arguments)};
  const cudaError_t error = cudaLaunchKernelExC(&config, entry.kernel, parameters);
  if (error == cudaSuccess) return;
  std::string groups = std::to_string(shape.groups[0]);
  for (int i : {1, 2}) groups += " x " + std::to_string(shape.groups[i]);
  check(error, std::string(entry.name) + ": " + groups + " groups of " + std::to_string(shape.threads) + " threads, " +
                   std::to_string(shape.shared_bytes) + " bytes of shared memory");
}

void Kernel::ready(int device, int shared_bytes) {
  if (device >= MAX_DEVICES) throw Refused("DeviceError", "CUDA device " + std::to_string(device) + ": too many devices");
  if (shared_bytes < limit_[device].load(std::memory_order_acquire)) return;
  static std::mutex mutex;  // or one thread could lower what another just raised
  std::lock_guard<std::mutex> lock(mutex);
  const OnDevice on(device);
  cudaFuncAttributes now;
  check(cudaFuncGetAttributes(&now, entry.kernel), entry.name);
  if (shared_bytes > now.maxDynamicSharedSizeBytes) {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int(now.sharedSizeBytes);
    if (shared_bytes > most)
      throw Refused("DeviceError", std::string(entry.name) + ": needs " + std::to_string(shared_bytes) +
                                       " bytes of shared memory, device " + std::to_string(device) + " has " +
                                       std::to_string(most));
    check(cudaFuncSetAttribute(entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), entry.name);
  }
  waits_[device].store(now.ptxVersion >= 90, std::memory_order_relaxed);
  limit_[device] = 1 + std::max(shared_bytes, now.maxDynamicSharedSizeBytes);
}

}  // namespace hm
