// The one C ABI every front end speaks: ops over DLTensor arrays, and the wire format of a weight.
#pragma once
#if !defined(__METAL_VERSION__)
#include <stdint.h>
#endif

enum hm_table { hm_linear, hm_linear_signed, hm_e2m1, hm_e2m1_gguf, hm_codebook, hm_plain };
enum hm_scale { hm_f32, hm_f16, hm_bf16, hm_e8m0 };

// A block of rows stored with one instance. A weight is int64[experts, parts, HM_PART_FIELDS] of
// these plus a list of u8 buffers (whole mapped files, usually); offsets count bytes in a buffer.
// Every field is 8 bytes so that the table travels as one int64 tensor.
struct hm_part {
  int64_t rows;       // n of this block
  int64_t instance;   // position in HM_INSTANCES
  int64_t group;      // columns that share one scale; == columns: one scale per row
  int64_t row_bytes;  // from one row of codes to the next
  int64_t codes_buffer, codes_offset;
  int64_t scale_buffer, scale_offset;        // -1, 0 when plain or stored with the codes
  int64_t bias_buffer, bias_offset;          // -1, 0 without bias; laid out like the scales
  int64_t codebook_buffer, codebook_offset;  // f32[2^bits]; -1, 0 unless codebook
};
#define HM_PART_FIELDS 12

#if !defined(__METAL_VERSION__)
static_assert(sizeof(hm_part) == HM_PART_FIELDS * 8, "hm_part is the wire format of a weight");

#include "dlpack.h"

// Arguments of an op: arrays in, arrays out (allocated by the caller), integers and numbers in the
// order the op's file names. An absent optional array has data == nullptr and ndim == 0.
struct hm_args {
  const DLTensor* in;
  int32_t n_in;
  DLTensor* out;
  int32_t n_out;
  const int64_t* ints;
  int32_t n_ints;
  const double* floats;
  int32_t n_floats;
  // Not 0: stop behind what shapes, dtypes, weights and numbers say; other arrays may have ndim without data.
  int32_t check = 0;
};

// Runs the contract first (nothing is written when it fails), then, unless `check`, the kernel.
// Returns nullptr, or the reason as text owned by the calling thread until its next call.
typedef const char* (*hm_op_fn)(const hm_args*);

// Ops whose arguments are mostly weights can check those once: bind() reads the arguments that stay (those
// that change are absent, ints zero) and answers with a handle; call() gets all of them and checks the others;
// release() ends the handle. Calls may run side by side. The arrays must outlive the handle.
struct hm_op {
  const char* name;
  hm_op_fn run;
  const char* (*bind)(const hm_args*, void** bound) = nullptr;  // nullptr: the op cannot be bound
  const char* (*call)(const void* bound, const hm_args*) = nullptr;
  void (*release)(void* bound) = nullptr;
};

extern "C" const hm_op* hm_op_table(int32_t* count);
#endif
