"""Attention of one token over coded pages on Metal: within its bound, codes read once."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from simt import metal

from hadamoe import kv_ops, metal_plan, mlx_gpu_kv, reference_kv
from hadamoe.kv import CODECS, PRESETS, KVFormat, page_bytes
from hadamoe.verify import kv_cases, kv_rounding
from hadamoe.verify.kv_cases import Shape

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

OURS = [KVFormat(k, v) for k in kv_cases.OURS for v in kv_cases.OURS]
OTHERS = [codec for codec in CODECS if codec not in kv_cases.OURS]
#: Files of codecs, as keys and as values.
FAMILIES = ("", "_turbo", "_line", "_plain")
VARIANTS = list(metal.variants())


class Case:
    """A cache that holds ``past`` tokens, one more token, and what attention of it is."""

    def __init__(self, form: KVFormat, shape: Shape, seed: int = 0):
        rng = np.random.default_rng([seed, CODECS[form.key], CODECS[form.value]])
        self.form, self.shape = form, shape
        layer = kv_cases.filled(rng, form, shape, 1)
        self.q, self.k, self.v = kv_cases.tokens(rng, shape, 1)
        self.want, _ = kv_rounding.kv_attend(self.q, self.k, self.v, layer, shape.past)
        self.layer = reference_kv.copied(layer)
        kv_ops.kv_attend(None, self.k, self.v, self.layer, shape.past)

    @property
    def proj(self) -> mx.array:
        """The token as attention's projection has it, with gates that count heads."""
        b, _, h, d = self.q.shape
        heads = [np.stack([self.q[:, 0], self.gate[:, 0]], 2).reshape(b, 2 * h, d), self.k[:, 0]]
        return mx.array(np.concatenate([*heads, self.v[:, 0]], 1).reshape(b, 1, -1))

    @property
    def gate(self) -> np.ndarray:
        return np.broadcast_to(np.linspace(-2, 2, self.q.shape[2])[:, None], self.q.shape).astype(
            np.float32
        )

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
        with metal.installed(**options) as log:
            token = mlx_gpu_kv.prepare(self.proj, (h, g), d, None, None, 0, form=self.form, **fp8)
            fp8["gate"] = self.proj if gated else None
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


@pytest.mark.parametrize("form", OURS, ids="/".join)
def test_every_pair_of_ours(form):
    Case(form, Shape(8, 2, 64, (331, 65), 1)).check(check=True)


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


def test_gate():
    case = Case(KVFormat("h4", "h4"), Shape(8, 2, 64, (200,), 1))
    plain, gated = case.run()[0], case.run(gated=True)[0]
    want = plain / (1 + np.exp(-case.gate.astype(np.float64)))
    assert np.abs(gated - want).max() <= 4e-7 * np.abs(want).max()


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


@pytest.mark.parametrize("wrong", ["length", "code", "value scale"])
def test_mutants_leave_the_bound(wrong):
    """The bound sees a token too few, one code of a key that matters, one scale of a value."""
    case = Case(KVFormat("h4", "h4"), Shape(4, 1, 64, (200,), 1))
    if wrong == "length":
        case.shape = case.shape._replace(past=(199,))
    if wrong == "code":
        case.layer.key_pages[case.layer.table[0, 1]][..., :64] ^= 0x88
    if wrong == "value scale":
        case.layer.value_pages[case.layer.table[0, 1]][..., -127::2] ^= 4
    y, _ = case.run()
    assert (np.abs(y - case.want.value) > case.want.error).any()


@pytest.mark.parametrize("values", FAMILIES)
@pytest.mark.parametrize("keys", FAMILIES)
def test_text_is_small(keys, values):
    assert len(metal_plan.source(f"kv_keys{keys}+kv_values{values}+kv_runs")) < 8192
    assert len(metal_plan.source("kv_join")) < 8192
