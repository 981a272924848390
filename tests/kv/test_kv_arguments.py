"""What the cache's ops refuse, each argument alone, before anything is written."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import _cpu, kv_ops
from hadamoe.errors import ContractError
from hadamoe.kv import CODECS, KEY_SEED, VALUE_SEED, page_bytes, signs

H3, H4, FP8, TURBO4 = (CODECS[c] for c in ("h3", "h4", "fp8", "turbo4"))
KEY_BYTES, VALUE_BYTES = page_bytes("h4", 32), page_bytes("h3", 32)


def refused(op, inputs, outputs, ints=(), floats=()) -> str:
    """The message of a call that must fail and leave its outputs alone."""
    for out in outputs:
        if out is not None:
            out.view(np.uint8)[...] = 77
    with pytest.raises(ContractError) as error:
        _cpu.call(op, inputs, outputs, list(ints), list(floats))
    assert all(out is None or (out.view(np.uint8) == 77).all() for out in outputs)
    text = str(error.value)
    assert text.startswith(f"{op}: "), text
    return text.removeprefix(f"{op}: ")


def changed(arrays: dict, changes: dict) -> list:
    """Zeros of a shape where a change is a tuple, else the change itself."""
    found = []
    for name, default in arrays.items():
        new = changes.get(name, default)
        dtype = default.dtype if default is not None else np.float32
        found.append(np.zeros(new, dtype) if isinstance(new, tuple) else new)
    return found


# ---- kv_encode, kv_decode, kv_scores ----

DIMS, PAGES = "[d=32 p=2 u=64]", "[d=32 n=1152 p=2 u=64 z=1]"
NAN, INF = (np.float32([number]) for number in (np.nan, np.inf))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (2, 63, 32)}, "rows has u=63, needs 64 tokens a page [d=32 p=2 u=63]"),
        ({"rows": (2, 64)}, "rows has 2 dimensions, needs 3"),
        ({"rows": np.zeros((2, 64, 32))}, f"rows is f64, needs f32 {DIMS}"),
        ({"rows": (2, 64, 33)},
         "d is 33, needs a multiple of 32 up to 512 [d=33 p=2 u=64]"),
        ({"rows": (2, 64, 96)}, "d is 96, the codec needs a power of two [d=96 p=2 u=64]"),
        ({"rows": (2, 64, 1024)},
         "d is 1024, needs a multiple of 32 up to 512 [d=1024 p=2 u=64]"),
        ({"rows": (2, 64, 0)}, "d is 0, needs a multiple of 32 up to 512 [d=0 p=2 u=64]"),
        ({"signs": (31,)}, f"signs has d=31, needs 32 {DIMS}"),
        ({"signs": np.zeros(32)}, f"signs is f64, needs f32 {DIMS}"),
        ({"signs": None}, f"signs is absent, needs f32[d] for a codec that rotates {DIMS}"),
        ({"mean": (31,)}, f"mean has d=31, needs 32 {DIMS}"),
        ({"mean": np.zeros(32)}, f"mean is f64, needs f32 {DIMS}"),
        ({"balance": (31,)}, f"balance has d=31, needs 32 {DIMS}"),
        ({"balance": np.zeros(32)}, f"balance is f64, needs f32 {DIMS}"),
        ({"codec": FP8, "mean": (32,)},
         f"mean and balance belong to codecs h2, h3, h4 and h8 {DIMS}"),
        ({"codec": FP8, "balance": (32,)},
         f"mean and balance belong to codecs h2, h3, h4 and h8 {DIMS}"),
        ({"scale": (2,)}, "scale has z=2, needs 1 [d=32 p=2 u=64 z=1]"),
        ({"scale": np.ones(1)}, "scale is f64, needs f32 [d=32 p=2 u=64 z=1]"),
        ({"scale": (1,)}, "scale needs a positive number [d=32 p=2 u=64 z=1]"),
        ({"scale": NAN}, "scale needs a positive number [d=32 p=2 u=64 z=1]"),
        ({"scale": INF}, "scale needs a positive number [d=32 p=2 u=64 z=1]"),
        ({"pages": (2, 1151)}, f"pages has n=1151, needs 1152 {PAGES}"),
        ({"pages": (3, KEY_BYTES)}, f"pages has p=3, needs 2 {PAGES}"),
        ({"pages": np.zeros((2, KEY_BYTES), np.int8)}, f"pages is i8, needs u8 {PAGES}"),
        ({"codec": -1}, f"codec is -1, needs 0..12 {DIMS}"),
        ({"codec": 13}, f"codec is 13, needs 0..12 {DIMS}"),
        ({"codec": 2**40}, f"codec is 1099511627776, needs 0..12 {DIMS}"),
        ({"codec": TURBO4}, "d is 32, the codec needs 64, 128 or 256, for which mlx-swift-lm has "
         f"codebooks {DIMS}"),
        ({"side": 2}, f"side is 2, needs 0 (keys) or 1 (values) {DIMS}"),
        ({"side": -1}, f"side is -1, needs 0 (keys) or 1 (values) {DIMS}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("op", ["kv_encode", "kv_decode"])
def test_codecs_refuse(op, changes, message):
    rows, pages = np.zeros((2, 64, 32), np.float32), np.zeros((2, KEY_BYTES), np.uint8)
    arrays = {
        "rows": rows, "signs": signs(32, KEY_SEED), "mean": None, "balance": None,
        "scale": np.ones(1, np.float32), "pages": pages,
    }  # fmt: skip
    rows, *vectors, pages = changed(arrays, changes)
    first, last = (rows, pages) if op == "kv_encode" else (pages, rows)
    ints = [changes.get("codec", H4), changes.get("side", 0)]
    assert refused(op, [first, *vectors], [last], ints) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (3, 31)}, "d is 31, needs a multiple of 32 up to 512 [d=31 r=3]"),
        ({"q": (3, 96)}, "d is 96, the codec needs a power of two [d=96 r=3]"),
        ({"q": (32,)}, "q has 1 dimensions, needs 2"),
        ({"q": np.zeros((3, 32))}, "q is f64, needs f32 [d=32 r=3]"),
        ({"pages": (2, 1151)}, "pages has n=1151, needs 1152 [d=32 n=1152 p=2 r=3]"),
        ({"pages": np.zeros((2, KEY_BYTES), np.int8)},
         "pages is i8, needs u8 [d=32 n=1152 p=2 r=3]"),
        ({"signs": (31,)}, "signs has d=31, needs 32 [d=32 r=3]"),
        ({"signs": None}, "signs is absent, needs f32[d] for a codec that rotates [d=32 r=3]"),
        ({"mean": (31,)}, "mean has d=31, needs 32 [d=32 r=3]"),
        ({"balance": (31,)}, "balance has d=31, needs 32 [d=32 r=3]"),
        ({"q8": (2, 32)}, "q8 has r=2, needs 3 [d=32 n=1152 p=2 r=3]"),
        ({"q8": np.zeros((3, 32), np.uint8)}, "q8 is u8, needs i8 [d=32 n=1152 p=2 r=3]"),
        ({"unit": (2,)}, "unit has r=2, needs 3 [d=32 n=1152 p=2 r=3]"),
        ({"unit": np.zeros(3)}, "unit is f64, needs f32 [d=32 n=1152 p=2 r=3]"),
        ({"scores": (3, 127)}, "scores has t=127, needs 128 [d=32 n=1152 p=2 r=3 t=128]"),
        ({"scores": np.zeros((3, 128), np.float32)},
         "scores is f32, needs i32 [d=32 n=1152 p=2 r=3 t=128]"),
        ({"codec": FP8}, "codec has no integer scores, needs h2, h3, h4 or h8 [d=32 r=3]"),
        ({"codec": 99}, "codec is 99, needs 0..12 [d=32 r=3]"),
    ],
)  # fmt: skip
def test_scores_refuse(changes, message):
    arrays = {
        "q": np.zeros((3, 32), np.float32), "pages": np.zeros((2, KEY_BYTES), np.uint8),
        "signs": signs(32, KEY_SEED), "mean": None, "balance": None,
        "q8": np.zeros((3, 32), np.int8), "unit": np.zeros(3, np.float32),
        "scores": np.zeros((3, 128), np.int32),
    }  # fmt: skip
    every = changed(arrays, changes)
    assert refused("kv_scores", every[:5], every[5:], [changes.get("codec", H4)]) == message


# ---- kv_attend ----

START = "[b=2 d=32 g=2 h=4 t=3]"  # before the cache
RAW = "[b=2 d=32 g=2 h=4 s=3 t=3 u=64]"
TABLE = "[b=2 d=32 g=2 h=4 m=3 s=3 t=3 u=64]"
KEYS = "[b=2 d=32 g=2 h=4 m=3 n=1152 p=5 s=3 t=3 u=64]"
ALL = "[b=2 d=32 g=2 h=4 m=3 n=1152 o=896 p=5 s=3 t=3 u=64]"


def with_(dims: str, letter: str, size: int) -> str:
    return dims[:-1] + f" {letter}={size}]"


def integers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def places(*rows) -> np.ndarray:
    return np.array(rows, np.int32)


def spoiled(shape: tuple[int, ...], number: float) -> np.ndarray:
    x = np.zeros(shape, np.float32)
    x[1, 2, -1, 7] = number
    return x


CACHED = {"k": None, "v": None}
HALF = np.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None, "k": None, "v": None, "y": None},
         "q is absent, and so is k: needs one of them"),
        ({"k": None}, "v is given without k"),
        ({"v": None}, "v is absent, k is not"),
        ({"q": None}, "y is given without q [b=2 d=32 g=2 m=3 n=1152 o=896 p=5 s=3 t=3 u=64]"),
        ({"y": None}, f"y is absent {ALL}"),
        ({"q": (2, 3, 4)}, "q has 3 dimensions, needs 4"),
        ({"q": (2, 3, 3, 32)}, f"q has h=3, needs a multiple of g=2 {ALL.replace('h=4', 'h=3')}"),
        ({"q": (2, 3, 0, 32)}, f"q has h=0, needs a multiple of g=2 {ALL.replace('h=4', 'h=0')}"),
        ({"q": (2, 4, 4, 32)}, "k has t=3, needs 4 [b=2 d=32 h=4 t=4]"),
        ({"q": (3, 3, 4, 32)}, "k has b=2, needs 3 [b=3 d=32 h=4 t=3]"),
        ({"q": (2, 3, 4, 64)}, "k has d=32, needs 64 [b=2 d=64 g=2 h=4 t=3]"),
        ({"q": np.zeros((2, 3, 4, 32))}, "q is f64, needs f32 bf16 f16 [b=2 d=32 h=4 t=3]"),
        ({"q": np.zeros((2, 3, 4, 32), HALF)}, f"k is f32, needs f16 {START}"),
        ({"k": (2, 3, 1, 32)}, f"v has g=2, needs 1 {START.replace('g=2', 'g=1')}"),
        ({"k": (2, 3, 2, 31)}, f"k has d=31, needs 32 {START}"),
        ({"k": (2, 2, 2, 32)}, "k has t=2, needs 3 [b=2 d=32 h=4 t=3]"),
        ({"k": np.zeros((2, 3, 2, 32), HALF)}, f"k is f16, needs f32 {START}"),
        ({"v": (2, 3, 1, 32)}, f"v has g=1, needs 2 {START}"),
        ({"v": np.zeros((2, 3, 2, 32), HALF)}, f"v is f16, needs f32 {START}"),
        ({"raw_keys": (2, 1, 3, 64, 32)}, f"raw_keys has g=1, needs 2 {START}"),
        ({"raw_keys": (1, 2, 3, 64, 32)}, f"raw_keys has b=1, needs 2 {START}"),
        ({"raw_keys": (2, 2, 2, 64, 32), "raw_values": (2, 2, 2, 64, 32)},
         f"raw_keys has s=2 u=64, needs 3 slots of 64 tokens {RAW.replace('s=3', 's=2')}"),
        ({"raw_keys": (2, 2, 3, 63, 32), "raw_values": (2, 2, 3, 63, 32)},
         f"raw_keys has s=3 u=63, needs 3 slots of 64 tokens {RAW.replace('u=64', 'u=63')}"),
        ({"raw_keys": np.zeros((2, 2, 3, 64, 32))},
         f"raw_keys is f64, needs f32 f16 bf16 u16 {RAW}"),
        ({"raw_values": (2, 2, 3, 64, 64)}, f"raw_values has d=64, needs 32 {RAW}"),
        ({"raw_values": (2, 2, 2, 64, 32)}, f"raw_values has s=2, needs 3 {RAW}"),
        ({"raw_values": np.zeros((2, 2, 3, 64, 32), HALF)}, f"raw_values is f16, needs f32 {RAW}"),
        ({"lengths": (3,)}, f"lengths has b=3, needs 2 {RAW}"),
        ({"lengths": places(0, 0)}, f"lengths is i32, needs i64 {RAW}"),
        ({"lengths": integers(-1, 0)}, f"lengths [0] is -1, needs 0..1099511627776 {ALL}"),
        ({"lengths": integers(0, 2**62)},
         f"lengths [1] is 4611686018427387904, needs 0..1099511627776 {ALL}"),
        ({"counts": (3,)}, f"counts has b=3, needs 2 {RAW}"),
        ({"counts": places(0, 0)}, f"counts is i32, needs i64 {RAW}"),
        ({"counts": integers(0, 4)}, f"counts [1] is 4, needs 0..3 {ALL}"),
        ({"counts": integers(-1, 0)}, f"counts [0] is -1, needs 0..3 {ALL}"),
        ({"table": (3, 3)}, f"table has b=3, needs 2 {RAW}"),
        ({"table": (2,)}, "table has 1 dimensions, needs 2 " + RAW),
        ({"table": np.zeros((2, 3), np.int64)}, f"table is i64, needs i32 {TABLE}"),
        ({"table": (2, 1)}, f"table has m=1, needs a place for page 1 {ALL.replace('m=3', 'm=1')}"),
        ({"table": places([-1] * 3, [-1] * 3)},
         f"table has -1 for page 1 of sequence 1, needs 0..4 {ALL}"),
        ({"table": places([-1] * 3, [-1, 5, 0])},
         f"table has 5 for page 1 of sequence 1, needs 0..4 {ALL}"),
        ({"table": places([-1] * 3, [-1, 2**31 - 1, 0])},
         f"table has 2147483647 for page 1 of sequence 1, needs 0..4 {ALL}"),
        ({"key": 99}, f"codec is 99, needs 0..12 {TABLE}"),
        ({"key_pages": (5, 2, 1151)}, f"key_pages has n=1151, needs 1152 {KEYS}"),
        ({"key_pages": (5, 1, KEY_BYTES)}, f"key_pages has g=1, needs 2 {KEYS}"),
        ({"key_pages": np.zeros((5, 2, KEY_BYTES), np.int8)}, f"key_pages is i8, needs u8 {KEYS}"),
        ({"key_signs": (31,)}, f"key_signs has d=31, needs 32 {KEYS}"),
        ({"key_signs": np.zeros(32)}, f"key_signs is f64, needs f32 {KEYS}"),
        ({"key_signs": None},
         f"key_signs is absent, needs f32[d] for a codec that rotates {KEYS}"),
        ({"value": -1}, f"codec is -1, needs 0..12 {KEYS}"),
        ({"value_pages": (5, 2, 897)}, f"value_pages has o=897, needs 896 {ALL}"),
        ({"value_pages": (4, 2, VALUE_BYTES)}, f"value_pages has p=4, needs 5 {ALL}"),
        ({"value_pages": np.zeros((5, 2, VALUE_BYTES), np.int8)},
         f"value_pages is i8, needs u8 {ALL}"),
        ({"value_signs": (31,)}, f"value_signs has d=31, needs 32 {ALL}"),
        ({"value_signs": np.zeros(32)}, f"value_signs is f64, needs f32 {ALL}"),
        ({"value_signs": None},
         f"value_signs is absent, needs f32[d] for a codec that rotates {ALL}"),
        ({"vectors": (3, 2, 32)}, f"vectors has v=3, needs 4 {with_(ALL, 'v', 4)}"),
        ({"vectors": (4, 1, 32)}, f"vectors has g=1, needs 2 {with_(ALL, 'v', 4)}"),
        ({"vectors": (4, 2, 31)}, f"vectors has d=31, needs 32 {with_(ALL, 'v', 4)}"),
        ({"vectors": np.zeros((4, 2, 32))}, f"vectors is f64, needs f32 {with_(ALL, 'v', 4)}"),
        ({"vectors": (4, 2, 32), "key": FP8, "key_pages": (5, 2, 2048)},
         "vectors belong to codecs h2, h3, h4 and h8 "
         f"{with_(ALL, 'v', 4).replace('n=1152', 'n=2048')}"),
        ({"scales": (1,)}, f"scales has z=1, needs 2 {with_(ALL, 'z', 2)}"),
        ({"scales": np.ones(2)}, f"scales is f64, needs f32 {with_(ALL, 'z', 2)}"),
        ({"scales": np.float32([1, 0])}, f"scales needs positive numbers {with_(ALL, 'z', 2)}"),
        ({"scales": np.float32([np.nan, 1])},
         f"scales needs positive numbers {with_(ALL, 'z', 2)}"),
        ({"window": -1}, f"window is -1, needs 0 (all pages) or more {ALL}"),
        ({"y": (2, 3, 4, 31)}, f"y has d=31, needs 32 {ALL}"),
        ({"y": (2, 3, 2, 32)}, f"y has h=2, needs 4 {ALL}"),
        ({"y": np.zeros((2, 3, 4, 32), HALF)}, f"y is f16, needs f32 {ALL}"),
        ({"q": spoiled((2, 3, 4, 32), np.nan)}, f"q has a number that is not finite {ALL}"),
        ({"k": spoiled((2, 3, 2, 32), np.inf)}, f"k has a number that is not finite {ALL}"),
        ({"v": spoiled((2, 3, 2, 32), -np.inf)}, f"v has a number that is not finite {ALL}"),
        (CACHED | {"lengths": integers(2, 126)},
         f"lengths [0] is 2, needs 3..1099511627776 {ALL}"),
        (CACHED | {"lengths": integers(200, 0), "counts": integers(3, 0)},
         f"table has -1 for page 1 of sequence 0, needs 0..4 {ALL}"),
        (CACHED | {"lengths": integers(200, 0), "counts": integers(80, 0),
                   "q": (2, 100, 4, 32), "y": (2, 100, 4, 32)},
         f"counts [0] is 80, needs tokens of the last two pages {ALL.replace('t=3', 't=100')}"),
    ],
)  # fmt: skip
def test_attend_refuses(changes, message):
    """Sequences of 70 and 126 tokens; the second's page 1 fills, and has place 3."""
    arrays = {
        "q": np.zeros((2, 3, 4, 32), np.float32),
        "k": np.zeros((2, 3, 2, 32), np.float32),
        "v": np.zeros((2, 3, 2, 32), np.float32),
        "lengths": integers(70, 126),
        "counts": integers(3, 2),
        "table": places([-1, -1, -1], [-1, 3, -1]),
        "key_signs": signs(32, KEY_SEED),
        "value_signs": signs(32, VALUE_SEED),
        "vectors": None,
        "scales": None,
        "y": np.zeros((2, 3, 4, 32), np.float32),
        "raw_keys": np.zeros((2, 2, 3, 64, 32), np.float32),
        "raw_values": np.zeros((2, 2, 3, 64, 32), np.float32),
        "key_pages": np.zeros((5, 2, KEY_BYTES), np.uint8),
        "value_pages": np.zeros((5, 2, VALUE_BYTES), np.uint8),
    }
    every = changed(arrays, changes)
    ints = [changes.get("key", H4), changes.get("value", H3), changes.get("window", 0)]
    assert refused("kv_attend", every[:10], every[10:], ints) == message
    every = changed(arrays, {})
    _cpu.call("kv_attend", every[:10], every[10:], [H4, H3, 0], [])  # as it is, it runs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kv_ops.kv_encode(x, "h5"),
         "kv: 'h5' is no codec, needs one of bf16, h2, h3, h4, h8, "),
        (lambda x: kv_ops.kv_encode(x, "h4", side="query"),
         "kv: side='query' codec='h4', needs one of key, value and of "),
        (lambda x: kv_ops.kv_encode(x[..., :48], "h4"),
         "kv: head_dim is 48, h4 needs a multiple of 32 up to 512, a power of two"),
        (lambda x: kv_ops.kv_encode(x[..., :32], "affine4"),
         "kv: head_dim is 32, affine4 needs a multiple of 64 up to 512"),
    ],
)  # fmt: skip
def test_front_refuses(call, message):
    with pytest.raises(ContractError) as error:
        call(np.zeros((1, 64, 64), np.float32))
    assert str(error.value).startswith(message)
