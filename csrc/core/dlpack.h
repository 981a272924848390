// The parts of the DLPack 1.3 ABI we use (specification: github.com/dmlc/dlpack, Apache-2.0):
// a borrowed tensor, and the C exchange API through which a framework lends one without Python calls.
#pragma once
#include <stdint.h>

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLMetal = 8 };
enum DLDataTypeCode { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5, kDLBool = 6 };

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: compact and row-major
  uint64_t byte_offset;
};

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // 0 on success
  int (*current_work_stream)(DLDeviceType type, int32_t index, void** stream);  // 0 on success
};
