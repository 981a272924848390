// The CUDA runtime with no GPU behind it: `_cuda` linked with this in place of NVIDIA's says what it was told, in
// lines of JSON. Tests only.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

namespace {
struct Kernel {
  std::string name;  // as the compiler mangles it
  int limit;         // of dynamic shared memory
};
std::map<const void*, Kernel> kernels;
std::string calls;
int current = 0;

// What the machine is: see Machine in fake_cuda.py.
struct Machine {
  int driver, devices, major, minor, shared, static_shared, ptx;
  int launch_error, attributes_error;  // of the next call, then 0
} machine;

std::string number(long long n) { return std::to_string(n); }
void log(const std::string& call, const std::string& fields = "") {
  calls += "{\"call\": \"" + call + "\"" + (fields.empty() ? "" : ", ") + fields + "}\n";
}
cudaError_t missing() {
  if (machine.driver / 1000 < CUDART_VERSION / 1000) return cudaErrorInsufficientDriver;
  return machine.devices ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t taken(int& error) {
  const auto e = cudaError_t(error);
  error = 0;
  return e;
}
}  // namespace

extern "C" {
__attribute__((visibility("default"))) void fake_reset(const Machine* m) {
  machine = *m;
  current = 0;
  calls.clear();
  for (auto& [_, kernel] : kernels) kernel.limit = 48 << 10;
}
__attribute__((visibility("default"))) const char* fake_calls() { return calls.c_str(); }

// What the compiler's own code calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[host] = {name, 48 << 10};
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine.driver;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = machine.devices;
  return missing();
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return missing();
}
cudaError_t cudaSetDevice(int device) {
  log("cudaSetDevice", "\"device\": " + number(device));
  current = device;
  return device < machine.devices ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* facts, int device) {
  *facts = {};
  strcpy(facts->name, ("Fake " + number(device)).c_str());
  facts->major = machine.major;
  facts->minor = machine.minor;
  facts->multiProcessorCount = 132;
  facts->l2CacheSize = 50 << 20;
  facts->sharedMemPerBlockOptin = size_t(machine.shared);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = machine.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = machine.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = machine.shared; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = 100u << 20;
  *total = 141u << 20;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void* kernel) {
  log("cudaFuncGetAttributes");
  if (machine.attributes_error) return taken(machine.attributes_error);
  *facts = {};
  facts->ptxVersion = machine.ptx;
  facts->sharedSizeBytes = size_t(machine.static_shared);
  facts->maxDynamicSharedSizeBytes = kernels.at(kernel).limit;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  log("cudaFuncSetAttribute", "\"value\": " + number(value));
  kernels.at(kernel).limit = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** parameters) {
  std::string fields = "\"kernel\": \"" + kernels.at(kernel).name + "\", \"grid\": [" + number(c->gridDim.x) + ", " +
                       number(c->gridDim.y) + ", " + number(c->gridDim.z) + "], \"block\": [" + number(c->blockDim.x) +
                       ", " + number(c->blockDim.y) + ", " + number(c->blockDim.z) + "], \"shared\": " +
                       number((long long)c->dynamicSmemBytes) + ", \"stream\": " + number((long long)c->stream) +
                       ", \"device\": " + number(current) + ", \"attributes\": {";
  for (unsigned i = 0; i < c->numAttrs; ++i)
    fields += (i ? ", \"" : "\"") + number(c->attrs[i].id) + "\": " +
              number(c->attrs[i].val.programmaticStreamSerializationAllowed);
  fields += "}, \"arrays\": [";
  const auto* arrays = static_cast<const long long*>(parameters[0]);
  for (int i = 0; i < 24; ++i) fields += (i ? ", " : "") + number(arrays[i]);
  fields += "], \"sizes\": [";
  const auto* sizes = reinterpret_cast<const int*>(arrays + 24);
  for (int i = 0; i < 32; ++i) fields += (i ? ", " : "") + number(sizes[i]);
  log("cudaLaunchKernelExC", fields + "]");
  return taken(machine.launch_error);
}
cudaError_t cudaGetLastError() {
  log("cudaGetLastError");
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "what went wrong"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorSome"; }
