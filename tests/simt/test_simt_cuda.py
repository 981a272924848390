"""CUDA kernels in the simulator: right answers, and a planted fault of every kind is found."""

from __future__ import annotations

import numpy as np
import pytest

from simt import CompileError, toolchain
from simt.cuda_kernel import compile_kernel

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))
THREADS = 64

REVERSE = """
__global__ void k(const float* x, float* y, int n) {
  __shared__ float s[64];
  int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  %s
}
"""


def run(body: str, check: bool = True, source: str = REVERSE, **options):
    """The kernel over two blocks of 64 threads: y and the launch's result."""
    kernel = compile_kernel(source % body if "%s" in source else source, "k", check=check)
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    result = kernel(
        [x, y, 128], (2, 1, 1), (THREADS, 1, 1), outputs=[1], names=["x", "y", "n"], **options
    )
    return y, result


SOUND = {
    "barrier": "s[t] = x[i]; __syncthreads(); y[i] = s[63 - t];",
    "warp barrier": "s[t] = x[i]; __syncwarp(); y[i] = s[t ^ 31];",
    "early return": "y[i] = 0; if (i >= 100) return; s[t] = x[i]; __syncthreads(); y[i] = s[t];",
    "half a warp": "y[i] = t % 32 < 16 ? __shfl_xor_sync(0xffff, x[i], 8) : 0;",
    "active mask": "y[i] = t % 2 ? __popc(__activemask()) : 0;",
    "atomics": "if (t == 0) s[0] = 0; __syncthreads(); atomicAdd(s, 1.f); __syncthreads();"
    "y[i] = s[0];",
    "vote": "y[i] = __syncthreads_or(t == 5) + __ballot_sync(~0u, t & 1);",
    "copy": "__pipeline_memcpy_async(s + t, x + i, 4); __pipeline_commit();"
    "__pipeline_wait_prior(0); __syncthreads(); y[i] = s[63 - t];",
}
FAULTS = {
    "race-": [
        "s[t] = x[i]; y[i] = s[63 - t];",
        "s[t] = x[i]; __syncwarp(); y[i] = s[63 - t];",
        "float a = x[i]; for (int r = 0; r < 2; r++) { s[t] = a; __syncthreads(); a += s[63 - t]; }"
        " y[i] = a;",
        "y[t] = x[i];",  # both blocks write the same place
    ],
    "mask-mismatch": [
        "y[i] = t % 32 < 16 ? __shfl_xor_sync(~0u, x[i], 1) : 0;",
        "y[i] = __shfl_xor_sync(0xffff, x[i], 1);",
        "y[i] = t % 32 < 16 ? __any_sync(~0u, 1) : 0;",
    ],
    "shuffle-inactive": ["y[i] = t % 32 < 16 ? __shfl_sync(0xffff, x[i], 20) : 0;"],
    "divergent-barrier": [
        "s[t] = x[i];\nif (t < 32)\n__syncthreads();\nelse\n__syncthreads();\ny[i] = s[t];"
    ],
    "out-of-bounds": [
        "y[i] = x[i + 1];",
        "y[i + 1] = x[i];",
        "s[t] = x[i]; __syncthreads(); float* p = s + t; y[i] = p[1];",
        "y[i] = ((const float4*)x)[t / 2 + 1].x;",  # 16 bytes, the last 16 past the end
    ],
    "uninitialised-read": [
        "if (t < 32) s[t] = x[i]; __syncthreads(); y[i] = s[t];",
        "y[i] = y[(i + 1) % 128];",
        "__pipeline_memcpy_async(s + t, x + i, 4); __pipeline_commit(); y[i] = s[t];",
        "__pipeline_memcpy_async(s + t, x + i, 4); __pipeline_wait_prior(0); y[i] = s[t];",
    ],
    "misaligned": ["y[i] = ((const float2*)(x + 1))[i / 4].x;"],
    "write-to-const": ["((float*)x)[i] = 1; y[i] = 0;"],
    "unknown-ptx": ['asm("vadd2.s32 %%0, %%0, 1;" : "+r"(n)); y[i] = n;'],
    "threadgroup-memory-limit": ["__shared__ float big[16384]; big[t] = x[i]; y[i] = big[t];"],
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_has_no_findings(name):
    y, result = run(SOUND[name])
    assert not result.findings
    assert np.isfinite(y).all()
    again, _ = run(SOUND[name], check=False, schedule="random", seed=3)
    assert np.array_equal(y, again)


@pytest.mark.parametrize(
    ("kind", "body"), [(kind, body) for kind, bodies in FAULTS.items() for body in bodies]
)
def test_a_planted_fault_is_found(kind, body):
    _, result = run(body)
    assert any(f.kind.startswith(kind) for f in result.findings), result.findings
    assert all(f.where.startswith("kernel.cu:") for f in result.findings), result.findings
    line = next(f for f in result.findings if f.kind.startswith(kind))
    assert line.code.strip() in REVERSE % body


def test_without_the_checker_a_missing_wait_reads_no_data():
    y, _ = run(FAULTS["uninitialised-read"][2], check=False)
    assert np.isnan(y).all()


def test_a_fault_stops_the_kernel_without_the_checker():
    _, result = run("y[i] = x[i + 1024];", check=False)
    assert [f.kind for f in result.findings] == ["memory-fault"]


def test_compile_errors_show_the_line():
    with pytest.raises(CompileError, match=r"kernel\.cu:5:.*\n.*y\[i\] = undeclared"):
        run("y[i] = undeclared;")
    with pytest.raises(CompileError, match="without initialiser"):
        run("__shared__ float z = 1;")


def test_arguments_are_checked():
    kernel = compile_kernel(REVERSE % "y[i] = x[i] + s[0];", "k")
    x = np.zeros(128, np.float32)
    with pytest.raises(ValueError, match="2 arguments, it has 3 parameters"):
        kernel([x, x], (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="argument 1 is a pointer"):
        kernel([x, x[::2], 1], (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="2048 threads a block"):
        kernel([x, x, 1], (1, 1, 1), (1024, 2, 1))


CODEBOOK = """
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_fp16.h>
namespace cg = cooperative_groups;
// y[r] = norms[r] * sum_k x[k] * book[code(r, k)], 16 two-bit codes a word, a warp for each row.
template <int WARPS>
__global__ void __launch_bounds__(WARPS * 32)
    product(const uint32_t* codes, const half* norms, const float* book, const float* x, float* y,
            int rows, int columns) {
  __shared__ float table[4];
  auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  if (threadIdx.x < 4) table[threadIdx.x] = book[threadIdx.x];
  __syncthreads();
  int row = blockIdx.x * WARPS + warp.meta_group_rank();
  if (row >= rows) return;
  const uint32_t* words = codes + (size_t)row * (columns / 16);
  float sum = 0;
  for (int w = warp.thread_rank(); w < columns / 16; w += warp.size()) {
    uint32_t word = __ldg(words + w);
    const float4* x4 = reinterpret_cast<const float4*>(x + w * 16);
    for (int i = 0; i < 4; i++, word >>= 8) {
      float4 v = x4[i];
      sum = fmaf(v.x, table[word & 3], sum);
      sum = fmaf(v.y, table[word >> 2 & 3], sum);
      sum = fmaf(v.z, table[word >> 4 & 3], sum);
      sum = fmaf(v.w, table[word >> 6 & 3], sum);
    }
  }
  sum = cg::reduce(warp, sum, cg::plus<float>());
  if (warp.thread_rank() == 0) y[row] = sum * __half2float(norms[row]);
}
"""


@pytest.mark.parametrize("check", [False, True])
def test_codebook_matvec_in_cooperative_groups(check):
    rng, rows, columns = np.random.default_rng(0), 30, 512  # the last block has two rows to spare
    codes = rng.integers(0, 4, (rows, columns))
    words = (codes.reshape(rows, -1, 16) << 2 * np.arange(16)).sum(-1).astype(np.uint32)
    book, x = rng.standard_normal(4).astype("f4"), rng.standard_normal(columns).astype("f4")
    norms, y = rng.uniform(0.5, 1.5, rows).astype(np.float16), np.zeros(rows, np.float32)
    kernel = compile_kernel(CODEBOOK, "product<4>", check=check)
    names = ["codes", "norms", "book", "x", "y", "rows", "columns"]
    arguments = [words, norms, book, x, y, rows, columns]
    result = kernel(arguments, (8, 1, 1), (128, 1, 1), outputs=[4], names=names)
    assert not result.findings
    assert np.abs(y - (book[codes].astype("f8") @ x) * norms).max() < 1e-4
    if check:
        assert result.traffic["codes"] == (words.nbytes, 0)


def test_half_types_round_once():
    """Every pair of a sample of f16 and bf16 numbers against numpy and, for fma, exact integers."""
    source = """
    #include <cuda_bf16.h>
    __global__ void k(const half* a, const half* b, const half* c, half* out, uint16_t* wide) {
      int i = threadIdx.x + blockIdx.x * blockDim.x;
      out[4 * i] = a[i] + b[i];
      out[4 * i + 1] = a[i] * b[i];
      out[4 * i + 2] = __hfma(a[i], b[i], c[i]);
      out[4 * i + 3] = __float2half(__half2float(a[i]) / 3);
      wide[i] = __bfloat16_as_ushort(__float2bfloat16(__half2float(a[i])));
    }
    """
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 65536, (3, 4096)).astype(np.uint16)
    a, b, c = (np.where(np.isfinite(v), v, 1).astype("f2") for v in bits.view(np.float16))
    out, wide = np.zeros((4096, 4), np.float16), np.zeros(4096, np.uint16)
    compile_kernel(source, "k")([a, b, c, out, wide], (64, 1, 1), (64, 1, 1), outputs=[3, 4])
    with np.errstate(over="ignore"):
        assert np.array_equal(out[:, 0], a + b)
        assert np.array_equal(out[:, 1], a * b)
        assert np.array_equal(out[:, 3], (a.astype("f4") / np.float32(3)).astype("f2"))
        # Exact in long double's 64 bits wherever the terms are less than that apart.
        exact = a.astype(np.longdouble) * b + c
        assert (out[:, 2] == exact.astype(np.float16)).mean() > 0.999
    word = a.astype("f4").view(np.uint32)
    assert np.array_equal(wide, (word + 0x7FFF + (word >> 16 & 1)) >> 16)


def test_products_join_sums_as_nvcc_joins_them():
    """(1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, or 0 where the product is rounded first."""
    source = "__global__ void k(const float* x, float* y) { *y = x[0] * x[0] - x[1]; }"
    x, found = np.float32([1 + 2**-12, 1 + 2**-11]), []
    for contract in (True, False):
        y = np.zeros(1, np.float32)
        kernel = compile_kernel(source, "k", contract=contract)
        kernel([x, y], (1, 1, 1), (1, 1, 1), outputs=[1])
        found.append(float(y[0]))
    assert found == [2.0**-24, 0]
