"""The Metal language as kernels use it, each construct against what numpy says it means."""

import numpy as np
import pytest

from simt import metal

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))

HEAD = """
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
"""
LANES = np.arange(32)


def run(source, name, buffers, outputs, threads=32, threadgroup=32, **options):
    """The arrays `outputs` (number -> array) after one launch under the checker."""
    kernel = metal.compile_kernel(HEAD + source, name, check=True)
    result = kernel(
        dict(enumerate(buffers)) | outputs,
        (threadgroup, 1, 1),
        (threads, 1, 1),
        outputs=outputs,
        **options,
    )
    assert [str(f) for f in result.findings] == []
    return outputs


def per_lane(expression, x, kind="float", dtype=None):
    """`expression` of x (this lane's number), lane, and t (x of another type: `kind`)."""
    source = f"""kernel void k(const device {kind}* in, device {kind}* out,
                               uint lane [[thread_index_in_simdgroup]]) {{
        {kind} x = in[lane];
        out[lane] = {expression};
    }}"""
    return run(source, "k", [x], {1: np.zeros(32, dtype or x.dtype)})[1]


X = np.arange(1, 33, dtype=np.float32)
SIMD = {
    "simd_sum(x)": np.full(32, X.sum()),
    "simd_product(x > 30.0f ? x : 1.0f)": np.full(32, 31 * 32),
    "simd_max(x)": np.full(32, 32),
    "simd_min(x)": np.full(32, 1),
    "simd_prefix_inclusive_sum(x)": np.cumsum(X),
    "simd_prefix_exclusive_sum(x)": np.cumsum(X) - X,
    "simd_prefix_inclusive_product(x > 29.0f ? x : 1.0f)": np.cumprod(np.where(X > 29, X, 1)),
    "simd_shuffle(x, 31 - lane)": X[31 - LANES],
    "simd_shuffle_xor(x, 5)": X[LANES ^ 5],
    "simd_shuffle_up(x, 3)": X[np.where(LANES >= 3, LANES - 3, LANES)],
    "simd_shuffle_down(x, 3)": X[np.where(LANES < 29, LANES + 3, LANES)],
    "simd_shuffle_rotate_up(x, 3)": np.roll(X, 3),
    "simd_shuffle_rotate_down(x, 3)": np.roll(X, -3),
    "simd_shuffle_and_fill_up(x, -x, 2)": np.r_[-X[30:], X[:30]],
    "simd_shuffle_and_fill_down(x, -x, 2)": np.r_[X[2:], -X[:2]],
    "simd_broadcast(x, 7)": np.full(32, 8),
    "simd_broadcast_first(x + 4.0f)": np.full(32, 5),
    "quad_sum(x)": X.reshape(8, 4).sum(1).repeat(4),
    "quad_max(x)": X.reshape(8, 4).max(1).repeat(4),
    "quad_shuffle_xor(x, 2)": X[LANES ^ 2],
    "quad_broadcast(x, 1)": X[LANES // 4 * 4 + 1],
    "float(simd_all(x > 0.0f)) + 2.0f * float(simd_any(x > 32.0f))": np.ones(32),
    "float(popcount(uint((ulong)simd_ballot(x > 20.0f))))": np.full(32, 12),
    "float(simd_is_first())": LANES == 0,
}


@pytest.mark.parametrize("expression", SIMD)
def test_simdgroup_operations(expression):
    assert np.array_equal(per_lane(expression, X), SIMD[expression])


U = (np.arange(32, dtype=np.uint64) * 0x9E3779B1 + 1).astype(np.uint32)
BITS = {
    "popcount(x)": [bin(u).count("1") for u in U],
    "clz(x)": [32 - int(u).bit_length() for u in U],
    "clz(0u)": [32] * 32,
    "ctz((x | 1u) << 3)": [3] * 32,
    "reverse_bits(x)": [int(f"{u:032b}"[::-1], 2) for u in U],
    "rotate(x, 7u)": (U << np.uint32(7)) | (U >> np.uint32(25)),
    "extract_bits(x, 5u, 9u)": (U >> np.uint32(5)) & 511,
    "insert_bits(x, 3u, 4u, 8u)": (U & ~np.uint32(0xFF0)) | np.uint32(0x30),
    "mulhi(x, 0x10001u)": [(int(u) * 0x10001) >> 32 for u in U],
    "absdiff(x, 1u << 31)": [abs(int(u) - 2**31) for u in U],
    "addsat(x, 1u << 31)": [min(int(u) + 2**31, 2**32 - 1) for u in U],
    "subsat(x, 1u << 31)": [max(int(u) - 2**31, 0) for u in U],
    "x >> (lane + 32)": [int(u) >> i for i, u in enumerate(U)],  # shifts use 5 bits
    "as_type<uint>(as_type<float>(x & 0x7f7fffff))": U & 0x7F7FFFFF,
    "uint(uchar(x))": U & 255,
    "uint(sizeof(unsigned long long))": [8] * 32,
    "uint(int(char(x))) & 0xffff": U.astype(np.int8).astype(np.int32).astype(np.uint32) & 0xFFFF,
    "min(max(x, 5u), 1u << 30)": np.clip(U, 5, 1 << 30),
    "clamp(x, 5u, 1u << 30)": np.clip(U, 5, 1 << 30),
    "select(x, 0u, (lane & 1u) != 0u)": np.where(LANES % 2, 0, U),
    "abs(int(x)) & 0x7fffffff": np.abs(U.astype(np.int32)).astype(np.uint32) & 0x7FFFFFFF,
}


@pytest.mark.parametrize("expression", BITS)
def test_integer_functions(expression):
    assert np.array_equal(per_lane(expression, U, "uint"), np.array(BITS[expression], np.uint32))


REAL = np.linspace(-4, 4, 32).astype(np.float32)
MATH = {
    "exp(x)": np.exp,
    "exp2(x)": np.exp2,
    "log(x * x)": lambda x: np.log(x * x),
    "log2(x * x)": lambda x: np.log2(x * x),
    "sin(x) * cos(x)": lambda x: np.sin(x) * np.cos(x),
    "tanh(x)": np.tanh,
    "precise::tanh(x)": np.tanh,
    "fast::exp(x)": np.exp,
    "rsqrt(x * x)": lambda x: 1 / np.abs(x),
    "sqrt(fabs(x))": lambda x: np.sqrt(np.abs(x)),
    "pow(x, 2.0f)": lambda x: x**2,
    "atan2(x, 2.0f)": lambda x: np.arctan2(x, 2),
    "fmod(x, 1.5f)": lambda x: np.fmod(x, 1.5),
    "floor(x) + ceil(x) + trunc(x) + rint(x)": lambda x: (
        np.floor(x) + np.ceil(x) + np.trunc(x) + np.rint(x)
    ),
    "round(x * 0.5f)": lambda x: np.sign(x) * np.floor(np.abs(x * 0.5) + 0.5),
    "fma(x, x, -1.0f)": lambda x: x * x - 1,
    "ldexp(x, 3)": lambda x: x * 8,
    "fract(x)": lambda x: x - np.floor(x),
    "sign(x) + step(1.0f, x)": lambda x: np.sign(x) + (x >= 1),
    "mix(x, 1.0f, 0.25f)": lambda x: x + (1 - x) * 0.25,
    "clamp(x, -1.0f, 1.0f) + saturate(x)": lambda x: np.clip(x, -1, 1) + np.clip(x, 0, 1),
    "fmax(x, NAN) + fmin(NAN, x)": lambda x: 2 * x,
    "copysign(2.0f, x)": lambda x: np.copysign(2, x),
    "isnan(x) ? 1.0f : isinf(x / 0.0f) ? 2.0f : 3.0f": lambda x: np.full(32, 2.0),
}


@pytest.mark.parametrize("expression", MATH)
def test_functions_of_real_numbers(expression):
    with np.errstate(all="ignore"):
        right = MATH[expression](REAL.astype(np.float64))
    assert np.allclose(per_lane(expression, REAL), right, rtol=5e-7, atol=5e-7)


def test_half_and_bfloat_round_to_nearest_even():
    source = """kernel void k(const device float* in, device half* h, device ushort* b,
                              uint i [[thread_position_in_grid]]) {
        h[i] = half(in[i]);
        b[i] = as_type<ushort>(bfloat(in[i]));
    }"""
    x = np.r_[np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1e-7, 70000]), REAL[:27]]
    x = x.astype(np.float32)
    out = run(source, "k", [x], {1: np.zeros(32, np.float16), 2: np.zeros(32, np.uint16)})
    with np.errstate(over="ignore"):
        assert np.array_equal(out[1], x.astype(np.float16))
    bits = x.view(np.uint32)
    assert np.array_equal(out[2], (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def test_templates_structs_vectors_and_tables():
    source = """
    constant float TABLE[4] = {-1.0f, -0.25f, 0.5f, 2.0f};
    constexpr constant int SHIFTS[4] = {0, 2, 4, 6};
    struct Shape { uint rows, columns; };
    struct Block { uchar4 codes; half scale; };
    template <int BITS, typename T> struct Decoder {
      static constexpr constant uint MASK = (1u << BITS) - 1u;
      T scale;
      METAL_FUNC T operator()(uint word, int i) const {
        return scale * T(TABLE[(word >> (BITS * i)) & MASK]);
      }
    };
    template <int BITS, typename T>
    METAL_FUNC T total(uint4 words, Decoder<BITS, T> decode, threadgroup T* shared, Shape shape,
                       uint lane) {
      T sum = 0;
      for (int w = 0; w < 4; w++)
        for (int i = 0; i < 32 / BITS; i++) sum += decode(words[w], i);
      shared[lane] = sum;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      return shared[(lane + 1) % shape.rows];
    }
    kernel void k(const device uint* words, device float* out,
                  uint lane [[thread_index_in_simdgroup]]) {
      threadgroup float shared[32];
      const uint4 v = ((const device uint4*)words)[lane];
      const Shape local = {32, 4};
      Decoder<2, float> decode{0.5f};
      float4 four = float4(v & 3u);
      four.xy = four.yx;
      out[lane] = total<2, float>(v, decode, shared, local, lane) + 0.0f * dot(four, float4(1.0f));
    }"""
    words = np.random.default_rng(0).integers(0, 1 << 32, (32, 4), dtype=np.uint32)
    codes = (words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32)) & 3
    sums = 0.5 * np.array([-1, -0.25, 0.5, 2])[codes].sum((1, 2))
    out = run(source, "k", [words], {1: np.zeros(32, np.float32)})[1]
    assert np.array_equal(out, np.roll(sums, -1).astype(np.float32))


def test_matrix_fragments():
    source = """kernel void k(const device float* a, const device float* b, device float* c,
                              device float* t) {
        simdgroup_float8x8 x, y, z = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
        simdgroup_load(x, a, 8);
        simdgroup_load(y, b, 16, ulong2(8, 0));
        simdgroup_multiply_accumulate(z, x, y, z);
        simdgroup_store(z, c, 8);
        simdgroup_load(x, a, 8, ulong2(0, 0), true);
        simdgroup_store(x, t, 8);
    }"""
    rng = np.random.default_rng(1)
    a = rng.integers(-8, 8, (8, 8)).astype(np.float32)
    b = rng.integers(-8, 8, (8, 16)).astype(np.float32)
    out = {i: np.zeros((8, 8), np.float32) for i in (2, 3)}
    run(source, "k", [a, b], out)
    assert np.array_equal(out[2], a @ b[:, 8:] + 1)
    assert np.array_equal(out[3], a.T)


def test_atomics_of_both_memories():
    source = """kernel void k(device atomic_uint* out, device atomic<float>* sums,
                              uint i [[thread_position_in_grid]],
                              uint l [[thread_position_in_threadgroup]]) {
        threadgroup atomic_uint count;
        if (l == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);
        atomic_fetch_max_explicit(&out[0], i, memory_order_relaxed);
        atomic_fetch_add_explicit(&sums[0], 0.5f, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint n = atomic_load_explicit(&count, memory_order_relaxed);
        if (l == 0) atomic_fetch_add_explicit(&out[1], n, memory_order_relaxed);
    }"""
    out, sums = np.zeros(2, np.uint32), np.zeros(1, np.float32)
    kernel = metal.compile_kernel(HEAD + source, "k", check=True)
    found = kernel({0: out, 1: sums}, (64, 1, 1), (256, 1, 1)).findings
    assert [str(f) for f in found] == []
    assert (out.tolist(), sums[0]) == ([255, 256], 128)


def test_positions_in_three_dimensions():
    source = """kernel void k(device uint* out, uint3 p [[thread_position_in_grid]],
                              uint3 n [[threads_per_grid]],
                              uint3 g [[threadgroup_position_in_grid]],
                              ushort2 l [[thread_position_in_threadgroup]],
                              uint i [[thread_index_in_threadgroup]],
                              uint3 size [[threads_per_threadgroup]],
                              uint s [[simdgroup_index_in_threadgroup]],
                              ushort lane [[thread_index_in_simdgroup]]) {
        uint at = p.x + n.x * (p.y + n.y * p.z);
        bool right = i == l.x + size.x * (l.y + size.y * (p.z - g.z * 2)) && i == s * 32 + lane;
        out[at] = right ? at : 0xffffffff;
    }"""
    kernel = metal.compile_kernel(HEAD + source, "k", check=True)
    out = np.zeros(10 * 6 * 3, np.uint32)
    assert kernel({0: out}, (8, 4, 2), (10, 6, 3), outputs=[0]).findings == []
    assert np.array_equal(out, np.arange(180))


def test_function_constants_and_dynamic_memory():
    source = """
    constant int scale [[function_constant(0)]];
    constant bool negate [[function_constant(1)]];
    kernel void k(device float* out, threadgroup float* shared [[threadgroup(0)]],
                  uint i [[thread_position_in_grid]]) {
        shared[i] = float(i * scale);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = negate ? -shared[31 - i] : shared[31 - i];
    }"""
    kernel = metal.compile_kernel(HEAD + source, "k", check=True)
    out = np.zeros(32, np.float32)
    constants = {"scale": 3, "negate": True}
    result = kernel({0: out}, (32, 1, 1), (32, 1, 1), constants=constants, dynamic=[128])
    assert result.findings == []
    assert result.threadgroup_bytes == 128
    assert np.array_equal(out, -3.0 * (31 - LANES))


def test_instances_by_host_name():
    source = """
    template <typename T, int N>
    [[kernel]] void f(device T* out, uint i [[thread_position_in_grid]]) { out[i] = T(N); }
    template [[host_name("f_half_3")]] [[kernel]] decltype(f<half, 3>) f<half, 3>;
    #define INSTANCE(T, N) \\
      template [[host_name("f_" #T "_" #N)]] [[kernel]] void f<T, N>(device T*, uint);
    INSTANCE(int, 7)
    """
    instances = {
        "f_half_3": (3, np.float16),
        "f_int_7": (7, np.int32),
        "f<uint, 9>": (9, np.uint32),
    }
    for name, (value, dtype) in instances.items():
        assert (run(source, name, [], {0: np.zeros(32, dtype)})[0] == value).all()
