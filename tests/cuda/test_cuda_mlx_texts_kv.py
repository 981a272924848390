"""Every text that MLX would compile for the quantized cache and its attention on CUDA."""

from __future__ import annotations

from functools import partial

import nvrtc
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from kv_cases_cuda import codecs_of  # noqa: E402
from mlx_texts import compiles, kernels_of, texts_of  # noqa: E402
from simt import cuda_launch  # noqa: E402

from hadamoe import cuda_kv, mlx_gpu_kv  # noqa: E402
from hadamoe.kv import PAGE, KVFormat, page_bytes  # noqa: E402

pytestmark = [
    pytest.mark.simulator,  # of an MLX that has CUDA
    pytest.mark.skipif(nvrtc.folder() is None, reason="nvidia-cuda-nvrtc is not installed"),
]
#: Columns -> codecs whose kernels read signs and centroids, or none.
FORMS = {
    32: ["h4/bf16"],
    64: ["h4/h3", "bf16/bf16", "turbo4/fp8"],
    128: ["kivi2/h2"],
    256: ["h8/turbo3"],
}


def pages(d):
    """Codes of every codec and back, and the integers of scores."""
    for codec in codecs_of(d):
        made = mlx_gpu_kv.kv_encode(mx.zeros((2, PAGE, d)), codec, side="key")
        mlx_gpu_kv.kv_decode(made, codec, d, side="key")
    mlx_gpu_kv.kv_scores(mx.zeros((8, d)), mx.zeros((2, page_bytes("h4", d)), mx.uint8), "h4")


def token(form, d, dtype=mx.float32, table=False):
    """A token's way through a cache: 8 query heads to a key head."""
    width, freqs = (2 * 8 + 2) * d, mx.ones(16)
    proj, norms = mx.zeros((1, 1, width)), (mx.ones(d), mx.ones(d))
    options = {"form": form, "kv_dtype": dtype}
    made = mlx_gpu_kv.prepare(proj, (8, 1), d, norms, freqs, 0, **options)
    raw = mx.zeros((2, 1, 1, cuda_kv.RAW, d), dtype)
    lead = (4, 1) if table else (1, 1, 4)
    stored = [mx.zeros((*lead, page_bytes(codec, d)), mx.uint8) for codec in form]
    places = mx.zeros((1, 4), mx.int32) if table else None
    mlx_gpu_kv.attend(made, raw, stored, 200, form, table=places, gate=proj)


def tokens(d):
    """Any two codecs, one page after the other; without a cache of codes; no norms."""
    for form in FORMS[d]:
        token(KVFormat(*form.split("/")), d)
    proj = mx.zeros((1, 3, (2 * 8 + 2) * d), mx.bfloat16)
    mlx_gpu_kv.prepare(proj, (8, 1), d, None, None, 0, kv_dtype=mx.bfloat16)


def a_table():
    """Pages of several sequences in a pool."""
    token(KVFormat("h4", "h3"), 64, mx.bfloat16, table=True)


def presets():
    """The model's heads, of which some presets have a kernel of their own."""
    for form in cuda_kv.COMPILED:
        token(form, 256, mx.bfloat16)


CALLS = {
    **{f"pages {d}": partial(pages, d) for d in cuda_kv.HEAD_DIMS},
    **{f"tokens {d}": partial(tokens, d) for d in cuda_kv.HEAD_DIMS},
    "a table": a_table,
    "presets": presets,
}


@pytest.mark.parametrize("name", CALLS)
def test_nvrtc_compiles(name):
    compiles(texts_of(CALLS[name]))


def test_every_kernel_is_among_them():
    """But for those that write a prompt's pages in place, which MLX's arrays cannot be."""
    found = kernels_of(CALLS.values())
    ours = [name for name in cuda_launch.compiled() if name.startswith(("kv_", "attention"))]
    assert found == {name for name in ours if not name.startswith("kv_append")}
