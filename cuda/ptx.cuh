// Instructions that CUDA C++ has no words for. All inline PTX is here.
#pragma once
#include <cuda_runtime.h>

namespace hm {

// A launch may begin before the one in front of it ends (programmatic dependent launch), and this waits for that end:
// what was written is there, what was read is no longer needed. The next launch may begin when all blocks have passed
// this (a block that ends without it counts too: wait first), and not sooner: so before it, a kernel may read what the
// launch in front of it does not write, such as weights.
__device__ inline void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The line of 128 bytes at p is on its way to the L2 from now on.
__device__ inline void fetch_line(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// v is taken as new here: nvcc makes nothing of it before; ptxas, to which this is a move, may.
__device__ inline void keep_here(unsigned& v) { asm volatile("mov.b32 %0, %0;" : "+r"(v)); }

// d += a b: 16 rows, 8 columns, 32 bytes, signed, or those of a unsigned. PTX ISA, "Matrix Fragments for mma.m16n8k32".
//   a[0], a[1]: row lane / 4, row lane / 4 + 8, k 4 (lane % 4) ..; a[2], a[3]: the same, k 16 more
//   b[0], b[1]: column lane / 4, k 4 (lane % 4) .. and 16 more
//   d[0], d[1]: row lane / 4, columns 2 (lane % 4), + 1; d[2], d[3]: row lane / 4 + 8
__device__ inline void multiply_bytes(int* d, const unsigned* a, const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_unsigned(int* d, const unsigned* a, const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of 16-bit floats: 16 deep, sums in f32. Registers hold two where they held four bytes.
__device__ inline void multiply_halves(float* d, const unsigned* a, const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_bfloats(float* d, const unsigned* a, const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four blocks of 8 rows of 16 bytes; lane l brings the address of row l % 8 of block l / 8, and gets bytes
// 4 (lane % 4) .. of row lane / 4 of each.
__device__ inline void load_matrices(unsigned* to, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Copies from global to shared memory that go on behind the program: 4, 8 or 16 bytes, aligned to their size.
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from) {
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
  else if (BYTES == 8) asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(place), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(from) : "memory");
}
// This thread's copies since the last commit are a group.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All of this thread's groups have arrived.
__device__ inline void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Whether four warps in a row multiply together (wgmma): sm_90a, Hopper's own instructions, at twice the rate of mma.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool WARPGROUPS = true;

// A matrix of bytes in shared memory for multiply_group: its rows are lines of 128 bytes, whose 16-byte pieces are
// exchanged by the line's number modulo 8. tile: a multiple of 1024, and 32 for each step of k from there.
__device__ inline unsigned long long group_matrix(const void* tile) {
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(tile)) & 0x3ffffu;
  return 1ull << 62 | 64ull << 32 | place >> 4;
}
// Registers are written: before the first product that reads them.
__device__ inline void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// What this thread has copied to shared memory is there for multiply_group, which goes another way.
__device__ inline void group_copies_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Products since the last commit are a group.
__device__ inline void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last LEFT groups are done.
template <int LEFT>
__device__ inline void group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// After the wait: the compiler, which does not know that products take until then, reads no sum before this.
template <int N>
__device__ inline void group_sums(int (&d)[N][4]) {
  _Pragma("unroll") for (int i = 0; i < 4 * N; i++) asm volatile("" : "+r"(d[i / 4][i % 4])::"memory");
}
// d += a b as multiply_bytes, for each warp's own 16 rows and 64 or 32 columns; d and a are to be left alone until the wait.
__device__ inline void multiply_group(int (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,"
      "%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1;"
      : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]),
        "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]), "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]),
        "+r"(d[4][0]), "+r"(d[4][1]), "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
        "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]), "+r"(d[7][0]), "+r"(d[7][1]), "+r"(d[7][2]), "+r"(d[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ inline void multiply_group(int (&d)[4][4], const unsigned (&a)[4], unsigned long long b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, 1;"
      : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]),
        "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]), "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#else
constexpr bool WARPGROUPS = false;
#endif

// Bytes of a (0 .. 3) and b (4 .. 7) by the selector's four low half-bytes; with 8 more a byte's sign bit in all its bits.
__device__ inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

}  // namespace hm
