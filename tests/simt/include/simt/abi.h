// simt ABI: what kernel translation units see of the engine. Minimal includes on purpose:
// no <math.h>/<stdlib.h>, so that MSL/CUDA overload sets are not polluted by libc names.
#pragma once
#include <stdint.h>
#include <stddef.h>
namespace simt {
struct U3 { uint32_t x, y, z; };
enum State : uint8_t { READY = 0, AT_COLL = 1, AT_BAR = 2, DONE = 3 };
struct Lane;
// Called once all lanes that take part have deposited their operand. lanes[] is sorted by lane id.
// by_lane[] has simd_width entries, null where the lane does not take part.
typedef void (*ResolveFn)(Lane** lanes, int n, Lane** by_lane, int width);
struct Lane {
  void* sp;              // saved stack pointer
  State st;
  uint8_t flags;         // barrier memory flags
  uint16_t lane;         // lane in simdgroup / warp
  uint32_t simd;         // simdgroup index in group
  uint32_t lin;          // linear thread index in group
  U3 tid;                // position in group
  void* val;             // operand / result slot on the fiber's stack
  uint64_t arg;          // per-lane argument (source lane, mask ...)
  uint64_t need;         // lanes that must take part (CUDA mask); 0 = whoever is active
  ResolveFn rf;
  const char* file; uint32_t line;
};
struct GroupInfo {
  U3 gid, ngroups, gsize, gsize_nominal, grid;   // gsize: this group's real size
  uint32_t width, nthreads, nsimd, group_lin;
  bool cuda;
  uint8_t order;         // of simd_sum and the like: 0 butterfly, 1 sequential, 2 reversed
};
struct Tls { Lane* cur; GroupInfo g; };
extern thread_local Tls tls __attribute__((tls_model("initial-exec")));
extern "C" {
void simt_block_coll(void* val, uint64_t arg, uint64_t need, ResolveFn rf, const char* file, uint32_t line);
void simt_barrier(uint32_t flags, const char* file, uint32_t line);       // threadgroup scope
void simt_simd_barrier(uint32_t flags, uint64_t need, const char* file, uint32_t line);
void* simt_shared(const void* key, size_t size, size_t align, const char* name);
void* simt_dyn_shared(uint32_t index);
void simt_fail(const char* kind, const char* msg, const char* file, uint32_t line);
void simt_note_atomic(const void* p, size_t n, int is_write, void* pc);
void simt_exit_thread();
void simt_note_range(const void* p, size_t n, int wr);
}
template <class F> struct FnBox { F* f; };
enum : uint32_t { MEM_NONE = 0, MEM_DEVICE = 1, MEM_TG = 2, MEM_TEX = 4 };

// dispatch: called from the generated entry point
struct Arg { void* p; };
struct LaunchDesc {
  U3 grid_threads;        // Metal dispatchThreads; ignored when by_groups
  U3 groups;              // when by_groups
  U3 tg;
  uint32_t width;
  uint32_t by_groups;     // 1: dispatchThreadgroups / CUDA <<<>>>
  uint32_t cuda;
  uint64_t shared_limit;  // bytes
  uint64_t dyn_bytes[8];  // dynamic shared allocations (Metal: per [[threadgroup(i)]], CUDA: [0])
  uint32_t ftz;
  uint32_t sched;         // 0 ascending, 1 descending, 2 random
  uint64_t seed;
  uint32_t nworkers;
  uint32_t order;         // GroupInfo::order
  uint32_t ulp;           // results of exp, log, rsqrt ... are off by up to so many ulp
};
template <class T, int ID> struct SharedKey { static inline char key; };
template <class T, int ID> inline T& shared(const char* name) {
  return *static_cast<T*>(simt_shared(&SharedKey<T, ID>::key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T), name));
}
}
