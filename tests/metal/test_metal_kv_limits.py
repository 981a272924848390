"""What Metal would refuse is in no kernel of the cache; what a codec cannot store is refused."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from simt import metal

from hadamoe import metal_kv, mlx_gpu_kv, mlx_kv
from hadamoe.errors import ContractError
from hadamoe.kv import CODECS, PAGE, KVFormat, page_bytes
from hadamoe.mlx_cache import HadamoeKVCache

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


def clean(log) -> None:
    for launch in log:
        assert metal.lint(launch.source, launch.name) == []


@pytest.mark.parametrize("codec", ["h3", "turbo3", "kivi4", "affine4", "fp8"])
def test_codecs(codec):
    """One of every file that encodes; the decoder with every branch."""
    rows = mx.zeros((1, PAGE, 64))
    with metal.installed() as log:
        mlx_gpu_kv.kv_decode(mlx_gpu_kv.kv_encode(rows, codec, side="key"), codec, 64, side="value")
    clean(log)


@pytest.mark.parametrize(
    "form",
    [("h4", "h3"), ("turbo3", "affine4"), ("kivi2", "fp8"), ("bf16", "turbo4")],
    ids="/".join,
)
def test_attention(form):
    """One of every file of keys and of values, the norms in front and the join behind."""
    form, d = KVFormat(*form), 64
    pages = [mx.zeros((1, 1, 1, page_bytes(c, d)), mx.uint8) for c in form]
    with metal.installed() as log:
        token = mlx_gpu_kv.prepare(
            mx.zeros((1, 1, 6 * d)), (2, 1), d, (mx.ones(d), mx.ones(d)), mx.ones(8), 150, form=form
        )
        raw = mx.zeros((2, 1, 1, 3 * PAGE, d))
        mlx_gpu_kv.attend(token, raw, pages, 151, form, gate=mx.zeros((1, 1, 6 * d)))
        if form.key == "h4":
            mlx_gpu_kv.kv_scores(token.q[0, :, 0], pages[0][0, 0], "h4")
    clean(log)


@pytest.mark.parametrize(
    ("codec", "d"), [("h4", 96), ("turbo4", 512), ("affine8", 96), ("fp8", 48)]
)
def test_widths_a_codec_cannot_store(codec, d):
    """As on the CPU, before anything is launched."""
    with metal.installed() as log:
        with pytest.raises(ContractError, match=f"head_dim is {d}, {codec} needs"):
            mlx_kv.kv_encode(mx.zeros((1, PAGE, d)), codec, side="key")
        with pytest.raises(ContractError, match=f"head_dim is {d}, {codec} needs"):
            HadamoeKVCache(KVFormat(codec, codec)).update_and_fetch(*mx.zeros((2, 1, 1, 1, d)))
    assert not log


@pytest.mark.parametrize("codec", CODECS)
def test_plans_stay_within_limits(codec):
    """At the model's shape and at the widest: at most 256 threads and 16 KB a group."""
    widths = {"h": (256, 512), "t": (256,)}.get(codec[0], (256, 512))
    for d in widths:
        heads = metal_kv.Heads(2, 16, 2, d, KVFormat(codec, codec))
        for launch in (
            metal_kv.encode(7, codec, "key", d),
            metal_kv.decode(7, codec, "value", d),
            metal_kv.prepare(heads, 1, 64, "float32", "bfloat16", eps=1e-6),
            metal_kv.runs(heads, 3, 1),
            metal_kv.join(heads, True, 10, "float32"),
        ):
            assert launch.threads <= 256
            sizes = {"float": 4, "float4": 16}
            assert sum(sizes[kind] * count for kind, count in launch.shared) <= 16384
            assert launch.groups[1] * launch.groups[2] < 65536


def test_launches_of_a_conversation():
    """A prompt of 200 tokens and one more, one layer: pages are stored once."""
    form, d, x = KVFormat("h8", "h4"), 64, np.zeros((2, 1, 1, 200, 64), np.float32)
    with metal.installed() as log:
        cache = HadamoeKVCache(form)
        cache.update_and_fetch(*mx.array(x))
        assert [launch.name.split("_")[4] for launch in log] == ["encode", "encode"]
        token = mlx_gpu_kv.prepare(mx.zeros((1, 1, 4 * d)), (1, 1), d, None, None, 200, form=form)
        cache.attend(token)
        names = [
            launch.name.removeprefix("custom_kernel_hadamoe_").split("_")[:2] for launch in log
        ]
    assert names[2:] == [["attention", "1"], ["kv", "runs"], ["kv", "join"]]
