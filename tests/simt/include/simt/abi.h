// What a compiled kernel and the engine share. No <math.h> or <stdlib.h>: names of libc must not join
// the overload sets of Metal and CUDA functions.
#pragma once
#include <stddef.h>
#include <stdint.h>
namespace simt {

struct U3 {
  uint32_t x, y, z;
};

enum State : uint8_t { READY = 0, AT_COLL = 1, AT_BAR = 2, DONE = 3 };

struct Lane;
// Called once, when every lane that takes part has left its operand. `lanes` is sorted by lane;
// `by_lane` has one entry per lane of the simdgroup, null where the lane does not take part.
typedef void (*ResolveFn)(Lane** lanes, int n, Lane** by_lane, int width);

// One GPU thread.
struct Lane {
  void* sp;       // saved stack pointer
  State st;
  uint8_t flags;  // of the barrier it waits at; UNCHECKED
  uint16_t lane;  // in its simdgroup
  uint32_t simd;  // simdgroup in the group
  uint32_t lin;   // thread in the group
  U3 tid;         // position in the group
  void* val;      // operand and result, on the fiber's stack
  uint64_t arg;   // of this lane: source lane, predicate ...
  uint64_t need;  // lanes that must take part (CUDA's mask); 0: all
  ResolveFn rf;
  const char* file;  // where it waits
  uint32_t line;
};
enum : uint8_t { UNCHECKED = 0x80 };  // the checker ignores this lane's accesses

struct GroupInfo {
  U3 gid, ngroups, gsize, gsize_nominal, grid;  // gsize: an edge group's real size
  uint32_t width, nthreads, nsimd, group_lin;
  bool cuda;
  uint8_t order;  // of simd_sum and the like: 0 butterfly, 1 sequential, 2 reversed
};

struct Tls {
  Lane* cur;
  GroupInfo g;
};
extern thread_local Tls tls __attribute__((tls_model("initial-exec")));

extern "C" {
// Waits until the other lanes of the simdgroup are at the same operation, then `rf` runs once.
void simt_block_coll(void* val, uint64_t arg, uint64_t need, ResolveFn rf, const char* file,
                     uint32_t line);
void simt_barrier(uint32_t flags, const char* file, uint32_t line);
void simt_simd_barrier(uint32_t flags, uint64_t need, const char* file, uint32_t line);
// A threadgroup variable: one per key and group. Bit 32 of `align` asks for zeroed memory.
void* simt_shared(const void* key, size_t size, size_t align, const char* name);
void* simt_dyn_shared(uint32_t index);
void simt_fail(const char* kind, const char* msg, const char* file, uint32_t line);
void simt_note_atomic(const void* p, size_t n, int is_write, void* pc);
void simt_note_range(const void* p, size_t n, int is_write, void* pc);
void simt_exit_thread();
float simt_m1(int function, float x);
float simt_m2(int function, float x, float y);
}

enum : uint32_t { MEM_NONE = 0, MEM_DEVICE = 1, MEM_TG = 2, MEM_TEX = 4 };

// One dispatch. core.py has the same struct.
struct LaunchDesc {
  U3 grid_threads;  // Metal's dispatchThreads; ignored when by_groups
  U3 groups;        // when by_groups
  U3 tg;
  uint32_t width;
  uint32_t by_groups;  // dispatchThreadgroups, CUDA's <<<>>>
  uint32_t cuda;
  uint64_t shared_limit;  // bytes
  uint64_t dyn_bytes[8];  // dynamic threadgroup memory (Metal: per [[threadgroup(i)]], CUDA: [0])
  uint32_t ftz;
  uint32_t sched;  // 0 ascending, 1 descending, 2 random
  uint64_t seed;
  uint32_t nworkers;
  uint32_t order;         // GroupInfo::order
  uint32_t ulp;           // exp, log, rsqrt ... are off by up to so many units in the last place
  uint32_t transactions;  // count memory lines per simdgroup instruction
  uint32_t seconds;       // of processor time, after which the kernel is taken for endless
};

template <class T, int ID>
struct SharedKey {
  static inline char key;
};
template <class T, int ID>
inline T& shared(const char* name) {
  size_t align = alignof(T) < 16 ? 16 : alignof(T);
  return *static_cast<T*>(simt_shared(&SharedKey<T, ID>::key, sizeof(T), align, name));
}
}  // namespace simt
