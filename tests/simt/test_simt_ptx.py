"""Inline PTX in CUDA kernels: each instruction the interpreter knows, against what the ISA says."""

from __future__ import annotations

import numpy as np
import pytest

from simt import toolchain
from simt.cuda_kernel import compile_kernel

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))

A, B = 0x12345678, 0x9ABCDEF1
ONE = {
    # text with %0 the result, %1 and %2 the numbers A and B: what it makes of them
    "mov.b32 %0, %1;": A,
    "mov.u32 %0, 0x10;": 16,
    "add.s32 %0, %1, %2;": (A + B) & 0xFFFFFFFF,
    "sub.u32 %0, %1, %2;": (A - B) & 0xFFFFFFFF,
    "mul.lo.u32 %0, %1, %2;": (A * B) & 0xFFFFFFFF,
    "mad.lo.s32 %0, %1, 3, %2;": (A * 3 + B) & 0xFFFFFFFF,
    "and.b32 %0, %1, %2;": A & B,
    "or.b32 %0, %1, %2;": A | B,
    "xor.b32 %0, %1, %2;": A ^ B,
    "not.b32 %0, %1;": A ^ 0xFFFFFFFF,
    "shl.b32 %0, %1, 40;": 0,
    "shl.b32 %0, %1, 4;": (A << 4) & 0xFFFFFFFF,
    "shr.u32 %0, %2, 4;": B >> 4,
    "shr.s32 %0, %2, 4;": 0xF0000000 | B >> 4,
    "lop3.b32 %0, %1, %2, 0x0F0F0F0F, 0xea;": A & B | 0x0F0F0F0F,
    "prmt.b32 %0, %1, %2, 0x5140;": 0xDE56F178,
    "shf.l.wrap.b32 %0, %1, %2, 8;": (B << 8 | A >> 24) & 0xFFFFFFFF,
    "shf.r.wrap.b32 %0, %1, %2, 8;": (B << 24 | A >> 8) & 0xFFFFFFFF,
    "{ .reg .pred p; setp.lt.s32 p, %2, %1; selp.b32 %0, 7, 9, p; }": 7,
    "{ .reg .pred p; setp.lt.u32 p, %2, %1; selp.b32 %0, 7, 9, p; }": 9,
    "{ .reg .pred p; setp.ne.b32 p, %1, 0; @p mov.b32 %0, 3; @!p mov.b32 %0, 2; }": 3,
    "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 %0, {hi, lo}; }": 0x56781234,
    "{ .reg .f32 f; mul.f32 f, 0f40400000, 0f40400000; add.f32 %0, f, 0f3F800000; }": 0x41200000,
    "{ .reg .f32 f; mov.f32 f, 0f40400000; fma.rn.f32 %0, f, f, f; }": 0x41400000,
    "ex2.approx.ftz.f32 %0, 0f40400000;": 0x41000000,  # 2^3
    "fma.rn.f16x2 %0, 0x40003C00, 0x42004200, 0x3C003C00;": 0x47004400,  # (2, 1) * 3 + 1
    "fma.rn.bf16x2 %0, 0x40003F80, 0x40404040, 0x3F803F80;": 0x40E04080,
    "add.f16x2 %0, 0x40003C00, 0x3C003C00;": 0x42004000,
    "mov.u32 %0, %%laneid;": 0,
}


@pytest.mark.parametrize("text", ONE)
def test_an_instruction(text):
    source = f"""
    __global__ void k(const uint32_t* in, uint32_t* out) {{
      uint32_t r;
      asm volatile("{text}" : "=r"(r) : "r"(in[0]), "r"(in[1]));
      out[0] = r;
    }}
    """
    out = np.zeros(1, np.uint32)
    arguments = [np.array([A, B], np.uint32), out]
    result = compile_kernel(source, "k")(arguments, (1, 1, 1), (1, 1, 1), outputs=[1])
    assert not result.findings
    assert hex(out[0]) == hex(ONE[text])


@pytest.mark.parametrize(
    "text",
    [
        "brev.b32 %0, %1;",
        "mul.hi.u32 %0, %1, %1;",
        "add.rz.f32 %0, %1, %1;",
        "lop3.b32 %0, %1, %1;",
        "setp.ltu.f32 %0, %1, %1;",
        "mov.u32 %0, %%smid;",
        "mov.u32 %0, %7;",
        "ld.local.u32 %0, [%1];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0}, {%0}, {%0}, {%0};",
        "cp.async.bulk.shared.global [%0], [%1], 16;",
    ],
)
def test_what_is_not_known_is_a_finding(text):
    source = f"""
    __global__ void k(uint32_t* out) {{
      uint32_t r = 0;
      asm volatile("{text}" : "+r"(r) : "r"(1));
      out[0] = r;
    }}
    """
    result = compile_kernel(source, "k")([np.zeros(1, np.uint32)], (1, 1, 1), (1, 1, 1))
    assert {f.kind for f in result.findings} == {"unknown-ptx"}
    assert all(f.where == "kernel.cu:4" for f in result.findings)


MEMORY = """
__global__ void k(const uint4* in, uint32_t* out, unsigned* count) {
  extern __shared__ uint32_t s[];
  uint32_t a, b, c, d, v;
  const uint4* mine = in + threadIdx.x;
  uint32_t at = (uint32_t)__cvta_generic_to_shared(s + 4 * threadIdx.x);
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(mine));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(d), "r"(c), "r"(b), "r"(a)
               : "memory");
  asm volatile("ld.shared.u32 %0, [%1+4];" : "=r"(v) : "r"(at));
  out[threadIdx.x] = v;
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 2;" :: "l"(count));
  asm volatile("atom.global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(count + 1));
  out[32 + threadIdx.x] = v;
}
"""


def test_loads_stores_and_atomics():
    given = np.arange(128, dtype=np.uint32)
    out, count = np.zeros(64, np.uint32), np.zeros(2, np.uint32)
    kernel = compile_kernel(MEMORY, "k", check=True)
    result = kernel([given, out, count], (1, 1, 1), (32, 1, 1), shared=512, outputs=[1])
    assert not result.findings
    assert np.array_equal(out[:32], given[2::4])
    assert sorted(out[32:]) == list(range(32))
    assert list(count) == [64, 32]
    assert result.traffic["argument 0"] == (512, 0)


def test_a_load_out_of_bounds_is_found():
    source = """
    __global__ void k(const uint32_t* in, uint32_t* out) {
      uint32_t v;
      asm volatile("ld.global.u32 %0, [%1+16];" : "=r"(v) : "l"(in));
      out[0] = v;
    }
    """
    arguments = [np.zeros(4, np.uint32), np.zeros(1, np.uint32)]
    result = compile_kernel(source, "k", check=True)(arguments, (1, 1, 1), (1, 1, 1), outputs=[1])
    assert "out-of-bounds" in {f.kind for f in result.findings}


# C = A * B in one warp: A 16 x K by rows through shared memory and ldmatrix, B by columns.
MATRIX = """
#include <cuda_fp16.h>
__global__ void k(const uint16_t* a, const uint16_t* b, float* c) {
  __shared__ __align__(16) uint16_t tile[16 * 16];
  int t = threadIdx.x;
  asm volatile("cp.async.cg.shared.global [%%0], [%%1], 16;" ::
               "r"((uint32_t)__cvta_generic_to_shared(tile + 8 * t)), "l"(a + 8 * t));
  asm volatile("cp.async.commit_group;");
  %s
  __syncwarp();
  uint32_t x[4], y[2];
  const uint16_t* row = tile + t %% 16 * 16 + t / 16 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%%0, %%1, %%2, %%3}, [%%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row)));
  for (int i = 0; i < 2; i++) y[i] = ((const uint32_t*)b)[t / 4 * 8 + t %% 4 + 4 * i];
  float d[4] = {0, 0, 0, 1};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.%s.%s.f32 {%%0, %%1, %%2, %%3}, "
               "{%%4, %%5, %%6, %%7}, {%%8, %%9}, {%%0, %%1, %%2, %%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  for (int i = 0; i < 4; i++) c[(t / 4 + i / 2 * 8) * 8 + t %% 4 * 2 + i %% 2] = d[i];
}
"""
WAIT = 'asm volatile("cp.async.wait_group 0;");'


def matrix_product(type: str, wait: str):
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-8, 8, shape) for shape in ((16, 16), (8, 16)))  # exact in either type
    if type == "f16":
        given = [m.astype(np.float16).view(np.uint16) for m in (a, b)]
    else:
        given = [(m.astype("f4").view(np.uint32) >> 16).astype(np.uint16) for m in (a, b)]
    c = np.zeros((16, 8), np.float32)
    kernel = compile_kernel(MATRIX % (wait, type, type), "k", check=True)
    result = kernel([*given, c], (1, 1, 1), (32, 1, 1), outputs=[2])
    one = np.zeros((16, 8))
    one[8:, 1::2] = 1  # the d[3] that every lane starts with
    return c, a @ b.T + one, result


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_matrix_product_of_a_warp(type):
    c, want, result = matrix_product(type, WAIT)
    assert not result.findings
    assert np.array_equal(c, want)


def test_a_missing_wait_is_found():
    _, _, result = matrix_product("f16", "")
    assert "uninitialised-read" in {f.kind for f in result.findings}


@pytest.mark.parametrize("kind", ["s8", "u8"])
def test_matrix_product_of_bytes(kind):
    source = """
    __global__ void k(const uint32_t* a, const uint32_t* b, int* c) {
      int t = threadIdx.x, g = t / 4, q = t % 4, d[4];
      uint32_t x[4], y[2];
      for (int i = 0; i < 4; i++) x[i] = a[(g + i % 2 * 8) * 8 + q + i / 2 * 4];
      for (int i = 0; i < 2; i++) y[i] = b[g * 8 + q + i * 4];
      asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.KIND.s8.s32 {%0, %1, %2, %3}, "
                   "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                   : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                   : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), "r"(5));
      for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + q * 2 + i % 2] = d[i];
    }
    """.replace("KIND", kind)
    rng = np.random.default_rng(4)
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 32), (8, 32)))
    a = a.view(np.uint8) if kind == "u8" else a
    c = np.zeros((16, 8), np.int32)
    kernel = compile_kernel(source, "k", check=True)
    result = kernel([a.view(np.uint32), b.view(np.uint32), c], (1, 1, 1), (32, 1, 1), outputs=[2])
    assert not result.findings
    assert np.array_equal(c, a.astype(int) @ b.T.astype(int) + 5)


def test_a_matrix_product_of_half_a_warp_is_found():
    source = """
    __global__ void k(float* c) {
      float d[4] = {0, 0, 0, 0};
      if (threadIdx.x < 16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(0));
      c[threadIdx.x] = d[0];
    }
    """
    result = compile_kernel(source, "k")([np.zeros(32, "f4")], (1, 1, 1), (32, 1, 1))
    assert {f.kind for f in result.findings} == {"mask-mismatch"}


# D = A * B^T + 1 by four warps, 64 x 32 times N x 32, N = 16. Fragments of A and D as the PTX ISA's
# figures "WGMMA .m64nNk32 register fragment layout" number them: by element i of a thread. B as
# CUTLASS lays it for its 128-byte swizzle: layout type 1, 1024 bytes from 8 rows to the next.
WARPGROUP = """
#include <cuda_runtime.h>
__global__ void k(const int8_t* a, const int8_t* b, int* c) {
  extern __shared__ int4 dynamic[];
  uint32_t base = ((uint32_t)__cvta_generic_to_shared(dynamic) + 1023) / 1024 * 1024;
  char* tile = (char*)dynamic + (base - (uint32_t)__cvta_generic_to_shared(dynamic));
  const int t = threadIdx.x, lane = t % 32, step = 1;
  for (int i = t; i < 16 * 128; i += 128) {
    const int row = i / 128, k = i % 128 - 32 * step;
    char* to = tile + row * 128 + ((i % 128 / 16 ^ row % 8) << 4) + i % 16;
    *to = k >= 0 && k < 32 ? b[row * 32 + k] : 99;
  }
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  uint32_t x[4];
  for (int i = 0; i < 16; i++) {
    const int row = t / 32 * 16 + lane / 4 + i / 4 % 2 * 8;
    const int k = lane % 4 * 4 + i % 4 + i / 8 * 16;
    ((int8_t*)x)[i] = a[row * 32 + k];
  }
  int d[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  uint64_t matrix = (uint64_t)((base & 0x3ffff) >> 4) + 2 * step;
  matrix |= (uint64_t)64 << 32 | (uint64_t)1 << 62;
  FENCE
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7}, "
               "{%8, %9, %10, %11}, %12, p;}"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]),
                 "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7])
               : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(matrix));
  asm volatile("wgmma.commit_group.sync.aligned;");
  BEFORE
  asm volatile("wgmma.wait_group.sync.aligned LEFT;" ::: "memory");
  for (int i = 0; i < 8; i++)
    c[(t / 32 * 16 + lane / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}
"""


def warpgroup_product(fence='asm volatile("wgmma.fence.sync.aligned;");', before="", left="0"):
    """Findings, and whether the product is right."""
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-128, 128, (n, 32)).astype(np.int8) for n in (64, 16))
    c = np.zeros((64, 16), np.int32)
    source = WARPGROUP.replace("FENCE", fence).replace("BEFORE", before).replace("LEFT", left)
    kernel = compile_kernel(source, "k", check=True)
    result = kernel([a, b, c], (1, 1, 1), (128, 1, 1), shared=4096, outputs=[2])
    right = np.array_equal(c, a.astype(int) @ b.T.astype(int) + 1)
    return {f.kind for f in result.findings}, right


def test_wgmma_of_bytes():
    assert warpgroup_product() == (set(), True)


def test_wgmma_without_a_fence_is_found():
    assert warpgroup_product(fence="")[0] == {"wgmma-fence"}


def test_sums_of_wgmma_come_with_the_wait():
    assert warpgroup_product(left="1") == (set(), False)


def test_writing_what_wgmma_still_reads_is_found():
    write = "__syncthreads(); tile[48 + t % 16] = 7; __syncthreads();"
    assert "wgmma-overwritten" in warpgroup_product(before=write)[0]
