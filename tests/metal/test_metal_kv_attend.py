"""Attention of one token over coded pages on Metal: within its bound, codes read once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attend_claims import (  # noqa: F401
    OTHERS,
    OURS,
    Token,
    test_every_pair_of_ours,
    test_gate,
    test_mutants_leave_the_bound,
)
from simt import metal

from hadamoe import metal_plan, mlx_gpu_kv
from hadamoe.kv import PRESETS, KVFormat, page_bytes
from hadamoe.verify.kv_cases import Shape

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

#: Files of codecs, as keys and as values.
FAMILIES = ("", "_turbo", "_line", "_plain")
VARIANTS = list(metal.variants())


class Case(Token):
    """`attend_claims.Token` on the simulated device, where the token's page is full already."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.layer = self.after

    def arrays(self, room: int = 0) -> tuple[mx.array, list[mx.array]]:
        """Raw tokens and pages as the kernels take them, ``room`` more pages of 0xFF behind."""
        layer, pages = self.layer, []
        b, g, _, _, d = layer.raw_keys.shape
        for a in (layer.key_pages, layer.value_pages):
            a = a[np.maximum(layer.table, 0)].swapaxes(1, 2)
            pages.append(
                mx.array(np.pad(a, [(0, 0), (0, 0), (0, room), (0, 0)], constant_values=255))
            )
        raw = [layer.raw_keys, layer.raw_values]
        if raw[0].dtype == np.uint16:
            rows = mx.array(np.stack(raw)).view(mx.bfloat16)
        else:
            rows = mx.array(np.stack(raw))
        return rows.reshape(2, b, g, -1, d), pages

    def run(self, room: int = 0, gated: bool = False, **options):
        """(y ``[b, 1, h, d]``, the launches)."""
        (b, _, h, d), g = self.q.shape, self.k.shape[2]
        raw, pages = self.arrays(room)
        lengths = mx.array([n + 1 for n in self.shape.past])
        fp8 = {} if self.layer.scales is None else {"scales": tuple(map(float, self.layer.scales))}
        proj = mx.array(self.proj)
        with metal.installed(**options) as log:
            token = mlx_gpu_kv.prepare(proj, (h, g), d, None, None, 0, form=self.form, **fp8)
            fp8["gate"] = proj if gated else None
            y = mlx_gpu_kv.attend(token, raw, pages, lengths, self.form, skip=0, **fp8)
        return np.array(y).reshape(b, 1, h, d), log

    def check(self, **options) -> None:
        y, log = self.run(**options)
        assert np.isfinite(y).all()
        assert (np.abs(y - self.want.value) <= self.want.error).all()
        assert len(log) == 3  # prepare, runs, join
        for launch in log:
            assert launch.threadgroup_bytes <= 16384
            assert launch.threadgroup[0] <= 256


@pytest.fixture
def token_case():
    return Case


@pytest.mark.parametrize(
    "past", [0, 1, 62, 63, 64, 126, 127, 128, 190, 191, 192, 511, 512, 575, 576, 1024]
)
def test_every_length(past):
    """Around the ends of pages and of runs of 8 pages."""
    Case(KVFormat("h4", "h3"), Shape(16, 2, 32, (past,), 1)).check(check=past < 600)


@pytest.mark.parametrize("d", [32, 128, 256, 512])
@pytest.mark.parametrize("heads", [(8, 1), (2, 2), (3, 1), (10, 2), (16, 1)])
def test_every_head(heads, d):
    """Groups that fill no four rows, more than a group of threads has, 512 columns."""
    Case(OURS[(d // 32 + heads[0]) % 16], Shape(*heads, d, (200,), 1)).check()


@pytest.mark.parametrize("raw", ["f16", "bf16"])
def test_raw_dtypes_and_ragged_batches(raw):
    Case(KVFormat("h8", "h4"), Shape(8, 2, 64, (0, 70, 700, 127, 9), 1, raw=raw)).check()


@pytest.mark.parametrize("form", [("h4", "h2"), ("h8", "h3"), ("turbo4", "kivi4")], ids="/".join)
def test_every_variant(form):
    case = Case(KVFormat(*form), Shape(8, 1, 64, (600,), 1))
    plain = case.run()[0]
    for options in VARIANTS:
        case.check(**options)
        if options.keys() - {"seed"} == {"schedule"}:  # and nothing else differs
            np.testing.assert_array_equal(case.run(**options)[0], plain)


def test_room_behind_the_pages_is_not_read():
    """Runs beyond the length end at once: the same bits with any room, and its bytes untouched."""
    case = Case(KVFormat("h4", "h3"), Shape(4, 2, 64, (400, 200), 1))
    plain, _ = case.run()
    roomy, log = case.run(room=30, check=True)
    np.testing.assert_array_equal(roomy, plain)
    seen = 2 * (5 + 2)  # pages between page 0 and the own one
    assert log[1].traffic["key_pages"].read == seen * page_bytes("h4", 64)


@pytest.mark.parametrize(
    "preset", ["hk4v3", "hk8v8", "turbo4v2", "turbo3", "fp8", "affine4", "kivi2"]
)
def test_pages_are_read_once_for_all_heads(preset):
    """The model's shape, 8 query heads to a key head of 256 columns, 2,100 tokens."""
    form = PRESETS[preset]
    case = Case(form, Shape(16, 2, 256, (2100,), 1, raw="bf16"))
    y, log = case.run(check=True)
    assert (np.abs(y - case.want.value) <= case.want.error).all()
    traffic = log[1].traffic
    for name, codec in zip(("key_pages", "value_pages"), form, strict=True):
        assert traffic[name].read == 2 * 31 * page_bytes(codec, 256)  # 33 pages less page 0 and own


@pytest.mark.parametrize("values", FAMILIES)
@pytest.mark.parametrize("keys", FAMILIES)
def test_text_is_small(keys, values):
    assert len(metal_plan.source(f"kv_keys{keys}+kv_values{values}+kv_runs")) < 8192
    assert len(metal_plan.source("kv_join")) < 8192
