"""MLX's own GPU kernels on given arrays: what ours are compared with in bytes, launches and error.

    run = peers.qmv(x, codes, scales, biases, bits=4, group=64).run(check=True)
    run.y, run.bytes_read, run.bytes_written

Each function makes a `Peer`: the kernel MLX would launch (mlx/backend/metal/quantized.cpp and
scaled_dot_product_attention.cpp), its buffers and its grid. `run` compiles it from the headers in
the installed mlx, `run_apple` takes the same kernel from Apple's compilation of it.

Arrays are numpy's; a bfloat16 array is given as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from . import core, msl, wheels
from .air_kernel import AirKernel
from .mtllib import Metallib

KERNELS = "mlx/backend/metal/kernels/"
METAL_TYPE = {"float32": "float", "float16": "float16_t", "uint16": "bfloat16_t"}
RESULTS = 8  # rows of a matvec threadgroup: two simdgroups of four
TILE = 32  # rows and tokens of a matmul threadgroup


@dataclass(frozen=True)
class Run:
    """The outputs by buffer index and what the engine saw."""

    outputs: dict[int, np.ndarray]
    result: core.Result
    device: tuple[str, ...] = ()  # names of the buffers that lie in device memory

    @property
    def y(self) -> np.ndarray:
        """The only output, or the first."""
        return self.outputs[min(self.outputs)]

    @property
    def bytes_read(self) -> int:
        """From device memory by all lanes, in a checked run; constants are not counted."""
        return sum(self.result.traffic[name][0] for name in self.device)

    @property
    def bytes_written(self) -> int:
        """To device memory, in a checked run."""
        return sum(self.result.traffic[name][1] for name in self.device)


@dataclass(frozen=True)
class Peer:
    """One launch of one kernel of MLX."""

    headers: tuple[str, ...]
    expression: str
    apple: str  # its name in mlx.metallib; "" where MLX compiles it at run time only
    buffers: dict[int, np.ndarray]
    outputs: tuple[int, ...]
    threadgroup: tuple[int, int, int]
    groups: tuple[int, int, int]
    constants: Mapping[str, int] = field(default_factory=dict)
    before: str = ""  # text the headers expect from MLX's host code

    def source(self) -> str:
        """The Metal text that is compiled."""
        names = ("utils.h", *self.headers)
        first, *rest = (f'#include "{KERNELS}{name}"\n' for name in names)
        return first + self.before + "".join(rest)

    def kernel(self, check: bool = False, contract: bool = True) -> msl.Kernel:
        """Compiled from the installed mlx's headers."""
        include = [msl.mlx_include()]
        return msl.compile_kernel(
            self.source(), self.expression, include, check=check, contract=contract
        )

    def _fresh(self) -> dict[int, np.ndarray]:
        return {i: a.copy() if i in self.outputs else a for i, a in self.buffers.items()}

    def run(self, check: bool = False, contract: bool = True, **options) -> Run:
        """Runs MLX's source; ``options`` as in `core.launch`."""
        kernel, buffers = self.kernel(check, contract), self._fresh()
        result = kernel(
            buffers,
            self.threadgroup,
            groups=self.groups,
            outputs=self.outputs,
            constants=self.constants,
            **{"ftz": True, **options},
        )
        params = [kernel.params[k] for i, k in kernel.slots().items() if i in buffers]
        device = tuple(p.name for p in params if "device" in p.text.split())
        return Run({i: buffers[i] for i in self.outputs}, result, device)

    def run_apple(self, **options) -> Run:
        """Runs Apple's compilation of it."""
        numbers = self.kernel().constants
        constants = {int(numbers[name][0]): value for name, value in self.constants.items()}
        kernel = apple_kernel(self.apple, tuple(sorted(constants.items())))
        buffers = self._fresh()
        result = kernel(buffers, self.threadgroup, groups=self.groups, **{"ftz": True, **options})
        return Run({i: buffers[i] for i in self.outputs}, result)


@cache
def library() -> Metallib | None:
    """The functions of mlx.metallib, or None where PyPI is out of reach."""
    data = wheels.metallib()
    return Metallib(data) if data else None


@cache
def apple_kernel(name: str, constants: tuple[tuple[int, int], ...]) -> AirKernel:
    """A function of mlx.metallib."""
    return AirKernel(library(), name, dict(constants))


def number(value: int) -> np.ndarray:
    """An int parameter."""
    return np.array([value], np.int32)


def batch_parameters(first: int, strides: int) -> dict[int, np.ndarray]:
    """x_batch_ndims and so on, which an unbatched kernel has and ignores."""
    names = [number(0), number(1), np.zeros(1, np.int64)]
    arrays = [*names, *names, *([np.zeros(1, np.int64)] * strides)]
    return dict(enumerate(arrays, first))


QUANTIZED = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
FP_QUANTIZED = ("steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h")


def qmv(
    x: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray | None = None,
    *,
    bits: int = 4,
    group: int = 64,
) -> Peer:
    """y[t,n] = sum_k x[t,k] * w[n,k], one threadgroup per token and 8 rows (mx.quantized_matmul).

    x [t, k] in f32, f16 or bf16 bits; codes [n, k * bits / 32] uint32. Affine: scales and biases
    [n, k / group] of x's dtype. MXFP4 where biases is None: scales [n, k / 32] uint8.
    """
    tokens, columns = x.shape
    rows, type = len(codes), METAL_TYPE[x.dtype.name]
    fast = "_fast" if rows % RESULTS == 0 and columns % 512 == 0 else ""
    start = {0: codes, 1: scales, 3: x, 4: np.zeros((tokens, rows), x.dtype)}
    start |= {5: number(columns), 6: number(rows)}
    place = {
        "outputs": (4,),
        "threadgroup": (32, 2, 1),
        "groups": (tokens, -(-rows // RESULTS), 1),
    }
    if biases is None:
        name = f"mxfp4_qmv{fast}_{type}_gs_32_b_4_batch_0_pr_0_hgs_0_r_4"
        buffers = start | {2: np.ones(1, np.float32)} | batch_parameters(7, 1)
        expression = f"fp_qmv{fast}<{type}, 32, 4, false>"
        return Peer(FP_QUANTIZED, expression, name, buffers, **place)
    name = f"affine_qmv{fast}_{type}_gs_{group}_b_{bits}_batch_0_pr_0_hgs_0_r_4"
    buffers = start | {2: biases} | batch_parameters(7, 2)
    expression = f"affine_qmv{fast}<{type}, {group}, {bits}, false>"
    return Peer(QUANTIZED, expression, name, buffers, **place)


def gather_qmv(
    x: np.ndarray,
    chosen: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray | None = None,
    *,
    bits: int = 4,
    group: int = 64,
) -> Peer:
    """`qmv` with each token's chosen experts (mx.gather_qmm): y [t, chosen, n].

    chosen [t, c] uint32; codes, scales and biases as in `qmv`, stacked over experts.
    """
    tokens, columns = x.shape
    experts, rows, words = codes.shape
    type, many = METAL_TYPE[x.dtype.name], chosen.size
    fast = "_fast" if rows % RESULTS == 0 and columns % 512 == 0 else ""
    token = np.repeat(np.arange(tokens, dtype=np.uint32), chosen.shape[1])
    y = np.zeros((*chosen.shape, rows), x.dtype)
    start = [codes, scales, np.ones(1, np.float32) if biases is None else biases, x, token]
    start += [chosen.reshape(-1), y, number(columns), number(rows)]
    groups = scales.shape[-1]
    shapes = [number(1), np.int32([tokens, 1, columns]), np.int64([columns, columns, 1])]
    shapes += [number(1), np.int32([experts, rows, words]), np.int64([rows * words, words, 1])]
    shapes += [np.int64([rows * groups, groups, 1])] * (1 if biases is None else 2)
    shapes += [number(1), np.int32([many]), np.int64([1]), np.int64([1])]
    kernel = f"gather_qmv{fast}"
    if biases is None:
        names = f"fp_{kernel}<{type}, 32, 4>", f"mxfp4_{kernel}_{type}_gs_32_b_4"
    else:
        suffix = f"{type}_gs_{group}_b_{bits}"
        names = f"affine_{kernel}<{type}, {group}, {bits}>", f"affine_{kernel}_{suffix}"
    return Peer(
        FP_QUANTIZED if biases is None else QUANTIZED,
        *names,
        dict(enumerate(start + shapes)),
        outputs=(6,),
        threadgroup=(32, 2, 1),
        groups=(1, -(-rows // RESULTS), many),
    )


def qmm(
    x: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray | None = None,
    *,
    bits: int = 4,
    group: int = 64,
) -> Peer:
    """The same product in tiles of 32 rows by 32 tokens on simdgroup matrices; rows % 32 == 0."""
    tokens, columns = x.shape
    rows, type = len(codes), METAL_TYPE[x.dtype.name]
    start = {0: codes, 1: scales, 3: x, 4: np.zeros((tokens, rows), x.dtype)}
    start |= {5: number(columns), 6: number(rows), 7: number(tokens)}
    place = {
        "outputs": (4,),
        "threadgroup": (32, 2, 2),
        "groups": (-(-rows // TILE), -(-tokens // TILE), 1),
    }
    if biases is None:
        name = f"mxfp4_qmm_t_{type}_gs_32_b_4_alN_true_batch_0"
        buffers = start | {2: np.ones(1, np.float32)} | batch_parameters(8, 1)
        return Peer(FP_QUANTIZED, f"fp_qmm_t<{type}, 32, 4, true, false>", name, buffers, **place)
    name = f"affine_qmm_t_{type}_gs_{group}_b_{bits}_alN_true_batch_0"
    buffers = start | {2: biases} | batch_parameters(8, 2)
    expression = f"affine_qmm_t<{type}, {group}, {bits}, true, false>"
    return Peer(QUANTIZED, expression, name, buffers, **place)


def sdpa(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> Peer:
    """Attention of one query per head (mx.fast.scaled_dot_product_attention's vector kernel).

    queries [heads, head_dim], keys and values [kv_heads, tokens, head_dim], one dtype.
    """
    heads, width = queries.shape
    kv_heads, tokens, _ = keys.shape
    type = METAL_TYPE[queries.dtype.name]
    strides = [np.array([n], np.uint64) for n in (tokens * width, width) * 2]
    buffers = {0: queries, 1: keys, 2: values, 3: np.zeros_like(queries)}
    buffers |= {4: number(heads // kv_heads), 5: number(tokens)} | dict(enumerate(strides, 6))
    buffers[10] = np.array([scale], np.float32)
    names = ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks")
    return Peer(
        ("sdpa_vector.h",),
        f"sdpa_vector<{type}, {width}, {width}>",
        f"sdpa_vector_{type}_{width}_{width}",
        buffers,
        outputs=(3,),
        threadgroup=(1024, 1, 1),
        groups=(heads, 1, 1),
        constants=dict.fromkeys(names, 0),
    )


def gated_delta(q, k, v, decay, beta, state, *, chunk: int = 0) -> Peer:
    """The gated delta rule over tokens, one at a time or in chunks of 8 (MLX 0.32.4's own kernels).

    q, k [tokens, key_heads, 128], v [tokens, heads, 128], decay (already exponentiated) and beta
    [tokens, heads] of one dtype, state f32 [heads, 128, 128]. Outputs 6 = y and 7 = new state.
    """
    tokens, heads, width = v.shape
    key_heads, type = q.shape[1], METAL_TYPE[v.dtype.name]
    shape = f"{width}, {width}, {key_heads}, {heads}"
    arrays = [q, k, v, state, decay, beta, np.zeros_like(v), np.zeros_like(state), number(tokens)]
    suffix = f"{type}_{shape.replace(', ', '_')}"
    threads = width if not chunk else width // 8  # a simdgroup per value, or per 8 of them
    return Peer(
        ("gated_delta_update.h",),
        f"gated_delta_{'fused_chunk' if chunk else 'seq'}<{type}, {shape}, {chunk or 4}>",
        f"gated_delta_fused_chunk_{suffix}_8" if chunk else f"seq_gated_delta_{suffix}_4",
        dict(enumerate(arrays)),
        outputs=(6, 7),
        threadgroup=(32, 4, 1),
        groups=(1, threads // 4, heads),
        constants={} if chunk else {"save_state": 0},
    )


def hadamard(x: np.ndarray, scale: float) -> Peer:
    """Each row times the Hadamard matrix of its length, a power of two (mx.hadamard_transform)."""
    batch, size = x.shape
    radix = min(size, 16)
    type = METAL_TYPE[x.dtype.name]
    return Peer(
        ("hadamard.h",),
        f"hadamard_n<{type}, {size}, {radix}, {min(4, radix)}>",
        "",
        {0: x, 1: np.zeros_like(x), 2: np.array([scale], np.float32)},
        outputs=(1,),
        threadgroup=(size // radix, 1, 1),
        groups=(1, batch, 1),
        before="METAL_FUNC void hadamard_radix_m(thread float* x) {}\n",
    )


def softmax(x: np.ndarray) -> Peer:
    """Each row's softmax (mx.softmax), 4 numbers a thread."""
    batch, size = x.shape
    type = METAL_TYPE[x.dtype.name]
    threads = -(-size // 4 // 32) * 32
    return Peer(
        ("softmax.h",),
        f"softmax_single_row<{type}>",
        "block_softmax_" + {"float": "float32", "float16_t": "float16"}.get(type, "bfloat16"),
        {0: x, 1: np.zeros_like(x), 2: number(size)},
        outputs=(1,),
        threadgroup=(threads, 1, 1),
        groups=(batch, 1, 1),
    )
