// Lends any framework's array to an op as a DLTensor. Frameworks with the DLPack C exchange API
// (torch >= 2.10) cost a pointer call; the rest (numpy, mlx) go through nanobind's ndarray.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>

#include "../core/dlpack.h"

namespace hm {

namespace nb = nanobind;

// The exchange API of a Python type, or nullptr. Types are few, so a small table remembers them.
inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const DLPackExchangeAPI* api;
  };
  static Known known[8];
  static unsigned next = 0;
  for (const Known& k : known)
    if (k.type == type) return k.api;
  const DLPackExchangeAPI* api = nullptr;
  nb::object capsule = nb::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule.is_valid()) PyErr_Clear();
  if (capsule.is_valid() && PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->prev_api;
  if (api && !api->dltensor_from_py_object_no_sync) api = nullptr;
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  known[next++ % 8] = {type, api};
  return api;
}

// A borrowed array; `keep` holds what the borrowing needs until the call returns.
struct Array {
  DLTensor tensor{};
  nb::ndarray<nb::ro> keep;

  explicit Array(nb::handle source) {
    if (source.is_none()) return;  // absent: data == nullptr, ndim == 0
    if (const DLPackExchangeAPI* api = exchange_api(Py_TYPE(source.ptr()))) {
      if (api->dltensor_from_py_object_no_sync(source.ptr(), &tensor)) throw nb::python_error();
      return;
    }
    keep = nb::cast<nb::ndarray<nb::ro>>(source);
    tensor = {const_cast<void*>(keep.data()),
              {DLDeviceType(keep.device_type()), int32_t(keep.device_id())},
              int32_t(keep.ndim()),
              {keep.dtype().code, keep.dtype().bits, keep.dtype().lanes},
              const_cast<int64_t*>(keep.shape_ptr()),
              const_cast<int64_t*>(keep.stride_ptr()),
              0};
  }
};

}  // namespace hm
