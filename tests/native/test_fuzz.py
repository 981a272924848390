"""Wrong part tables, indices and shapes under sanitizers: an error, never a wild read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hadamoe import ops
from hadamoe.errors import ContractError
from hadamoe.kv import CODECS, page_bytes
from hadamoe.verify import samples
from hadamoe.verify.layers import gated_delta_arrays

from .conftest import start

INSTANCES = ops.instances()
EXTREMES = [
    -(2**63),
    -(2**31),
    -1,
    0,
    1,
    2,
    3,
    7,
    16,
    31,
    2**31,
    2**32,
    2**40,
    2**61,
    2**62,
    2**63 - 1,
]
NUMBERS = st.sampled_from(EXTREMES) | st.integers(-40, 5000)
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def sanitized():
    """A runner of its own: one wild read ends it."""
    runner = start("sanitized")
    yield runner
    runner.close()


def packed(inst, experts=2):
    rng = np.random.default_rng(0)
    w = ops.pack(samples.random_weight(rng, inst, [5, 3], 128, experts=experts))
    return w.parts.copy(), list(w.buffers)


def attempt(runner, op, inputs, outputs, ints=(), floats=()):
    """Runs the op; a ContractError names the op, anything else is a bug."""
    message = f"{op}: "
    try:
        runner.call(op, inputs, outputs, list(ints), list(floats))
    except ContractError as error:
        message = str(error)
    assert message.startswith(f"{op}: ")


@FUZZ
@given(
    inst=st.sampled_from(INSTANCES),
    changes=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 11), NUMBERS),
        min_size=1,
        max_size=3,
    ),
)
def test_part_tables(sanitized, inst, changes):
    parts, buffers = packed(inst)
    for e, p, field, number in changes:
        parts[e, p, field] = number
    y = np.empty((4, 128), np.float32)
    attempt(sanitized, "dequantize", [parts, np.array([0, 6, 9, 15]), *buffers], [y], [128])
    x, expert = np.ones((3, 128), np.float32), np.array([[0, 1]] * 3, np.int32)
    attempt(sanitized, "qmatmul", [x, parts, expert, *buffers], [np.empty((3, 2, 8), np.float32)])
    attempt(sanitized, "qmatmul", [x, parts[:1], None, *buffers], [np.empty((3, 8), np.float32)])


@FUZZ
@given(
    inst=st.sampled_from(INSTANCES),
    rows=st.lists(NUMBERS, max_size=5),
    columns=NUMBERS,
    width=st.integers(0, 300),
)
def test_rows_and_columns(sanitized, inst, rows, columns, width):
    parts, buffers = packed(inst)
    y = np.empty((len(rows), width), np.float32)
    index = np.array(rows, np.int64)
    attempt(sanitized, "dequantize", [parts, index, *buffers], [y], [columns])
    x, expert = np.ones((1, width), np.float32), index.reshape(1, -1)
    y = np.empty((1, len(rows), 8), np.float32)
    attempt(sanitized, "qmatmul", [x, parts, expert, *buffers], [y])


@FUZZ
@given(
    k=st.integers(0, 200),
    width=st.integers(0, 260),
    block=NUMBERS,
    pre=st.none() | st.integers(0, 200),
    post=st.none() | st.integers(0, 200),
)
def test_hadamard(sanitized, k, width, block, pre, post):
    signs = [None if n is None else np.ones(n, np.float32) for n in (pre, post)]
    x, y = np.ones((2, k), np.float32), np.empty((2, width), np.float32)
    attempt(sanitized, "hadamard", [x, *signs], [y], [block])


@FUZZ
@given(sizes=st.lists(st.integers(0, 20), min_size=8, max_size=8), heads=st.tuples(*[NUMBERS] * 4))
def test_gated_delta(sanitized, sizes, heads):
    b, t, c, w, h, kernel, dk, dv = sizes
    shapes = [(b, t, w), (c, kernel), (h,), (h,), (dv,)]
    states = [(b, t, h * dv), (b, c, kernel), (b, h, dk, dv)]
    arrays = [[np.ones(s, np.float32) for s in group] for group in (shapes, states)]
    attempt(sanitized, "gated_delta", *arrays, heads, [1e-6])


@FUZZ
@given(counts=st.lists(NUMBERS, min_size=2, max_size=3))
def test_tokens_of_a_sequence(sanitized, counts):
    arrays = gated_delta_arrays(np.random.default_rng(0), 3, 50, 1, 2, 4, 4, 4)
    *inputs, conv_state, state = arrays.values()
    outputs = [np.empty((3, 50, 8), np.float32), conv_state, state]
    numbers = np.array(counts, np.int64)
    attempt(sanitized, "gated_delta", [*inputs, numbers], outputs, [1, 2, 4, 4], [1e-6])


@FUZZ
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 11), NUMBERS), max_size=2
    ),
    ints=st.tuples(
        NUMBERS, NUMBERS, *[st.sampled_from([-1, -1, 0, 16, 128, 3, 2**40])] * 2, NUMBERS
    ),
)
def test_moe_decode(sanitized, changes, ints):
    rng = np.random.default_rng(0)
    inst = INSTANCES[0]
    sizes = ((5, 128, 1), (128, 128, 5), (128, 64, 5), (128, 128, 1), (128, 64, 1), (1, 128, 1))
    weights = [samples.random_weight(rng, inst, n, k, group=32, experts=e) for n, k, e in sizes]
    roles = ops.pack(*weights)
    tables = [w.parts.copy() for w in roles]
    for role, e, field, number in changes:
        table = tables[role]
        table[e % len(table), 0, field] = number
    x, y = np.ones((2, 128), np.float32), np.empty((2, 128), np.float32)
    inputs = [x, None, None, None, None, *tables, *roles[0].buffers]
    attempt(sanitized, "moe_decode", inputs, [y], ints)
    attempt(sanitized, "moe_decode", inputs, [y], [2, 1, -1, -1, 0])


@FUZZ
@given(
    sizes=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    ints=st.tuples(NUMBERS, NUMBERS),
    masked=st.integers(-1, 12),
)
def test_attention(sanitized, sizes, ints, masked):
    b, t, w, d, rot, kv, capacity, n = sizes
    shapes = [(b, t, w), (d,), (d,), (b, t, rot), (b, t, rot)]
    inputs = [np.ones(s, np.float32) for s in shapes]
    inputs.append(None if masked < 0 else np.arange(b * t * masked).reshape(b, t, masked) % 3 == 1)
    caches = [np.ones((b, kv, capacity, d), np.float32) for _ in range(2)]
    attempt(sanitized, "attention", inputs, [np.ones((b, t, n), np.float32), *caches], ints, [1e-6])
    heads, past = kv * 2, min(max(ints[1], 0), 9)
    inputs[0] = np.ones((b, t, 2 * (heads + kv) * d), np.float32)
    y = np.ones((b, t, heads * d), np.float32)
    attempt(sanitized, "attention", inputs, [y, *caches], [heads, past], [1e-6])


@FUZZ
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 11), NUMBERS), min_size=1, max_size=2
    ),
    first=st.tuples(NUMBERS, *[st.sampled_from([-1, 0, 16, 3, 2**40])] * 2, NUMBERS),
)
def test_blocks(sanitized, changes, first):
    rng = np.random.default_rng(0)
    k, d, heads, kv = 64, 16, 2, 1
    sizes = [(2 * heads * d, k), (kv * d, k), (kv * d, k), (k, heads * d)]
    delta = [(2 * 8 + 16, k), (16, k), (2, k), (2, k), (k, 16)]
    roles = ops.pack(
        *(samples.random_weight(rng, INSTANCES[0], n, c, group=c) for n, c in (*sizes, *delta))
    )
    tables = [w.parts.copy() for w in roles]
    for role, field, number in changes:
        tables[role][0, 0, field] = number
    x, norm, none = np.ones((1, 3, k), np.float32), np.ones(k, np.float32), [None] * 4
    angles, norms = [np.ones((1, 3, 4), np.float32)] * 2, [np.ones(d, np.float32)] * 2
    y, caches = np.empty_like(x), [np.ones((1, kv, 5, d), np.float32) for _ in range(2)]
    inputs = [x, *angles, None, norm, *none, *norms, *tables[:4], *roles[0].buffers]
    for ints in (first, [2, -1, -1, 0]):
        attempt(sanitized, "attention_block", inputs, [y, *caches], ints, [1e-6])
    vectors = [np.ones(s, np.float32) for s in ((32, 4), (2,), (2,), (8,))]
    states = [np.ones(s, np.float32) for s in ((1, 32, 4), (1, 2, 8, 8))]
    inputs = [x, None, norm, *none, *vectors, *tables[4:], *roles[0].buffers]
    for ints in ([1, 2, 8, 8, *first[1:]], [1, 2, 8, 8, -1, -1, 0]):
        attempt(sanitized, "gated_delta_block", inputs, [y, *states], ints, [1e-6])


@FUZZ
@given(
    codecs=st.tuples(st.integers(-1, 14), st.integers(-1, 14)),
    lengths=st.tuples(NUMBERS, NUMBERS) | st.tuples(*[st.integers(0, 300)] * 2),
    counts=st.tuples(NUMBERS, NUMBERS) | st.tuples(*[st.integers(0, 5)] * 2),
    table=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 4), max_size=12),
    window=NUMBERS,
    given_=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    d=st.sampled_from([0, 32, 64, 96]),
    cut=st.integers(0, 40),
)
def test_kv_attend(sanitized, codecs, lengths, counts, table, window, given_, d, cut):
    """Tables and lengths of anything: pages outside, tokens before the first, unknown codecs."""
    b, t, h, g, pages = 2, 5, 4, 2, 4
    names = dict(enumerate(CODECS))

    def page(codec: int) -> int:
        try:
            return page_bytes(names.get(codec, "bf16"), d)
        except ContractError:
            return 64

    asks, gives, has_vectors = given_
    q, y = ([np.ones((b, t, h, d), np.float32)] * 2) if asks else (None, None)
    k, v = ([np.ones((b, t, g, d), np.float32)] * 2) if gives else (None, None)
    numbers = [np.array(n, np.int64) for n in (lengths, counts)]
    places = np.array(table[: len(table) // b * b], np.int32).reshape(b, -1)
    vectors = np.ones((4, g, d), np.float32) if has_vectors else None
    inputs = [q, k, v, *numbers, places, *[np.ones(d, np.float32)] * 2, vectors, None]
    raw = [np.ones((b, g, 3, 64, d), np.float32) for _ in range(2)]
    kept = [np.ones((pages, g, max(page(c) - (cut > 38), 0)), np.uint8) for c in codecs]
    attempt(sanitized, "kv_attend", inputs, [y, *raw, *kept], [*codecs, window])
    attempt(sanitized, "kv_attend", inputs, [y, *raw, *kept], [*codecs, 0])


@FUZZ
@given(
    codec=st.integers(-1, 14),
    side=st.integers(-1, 2),
    sizes=st.tuples(st.integers(0, 2), st.integers(63, 64), st.sampled_from([0, 31, 32, 64, 128])),
    extra=st.integers(-1, 1),
    byte=st.integers(0, 255),
)
def test_kv_codecs(sanitized, codec, side, sizes, extra, byte):
    """Pages of any bytes are numbers; a wrong size is refused."""
    p, _, d = sizes
    try:
        size = page_bytes(dict(enumerate(CODECS)).get(codec, "bf16"), d)
    except ContractError:
        size = 64
    rows, pages = np.ones(sizes, np.float32), np.full((p, max(size + extra, 0)), byte, np.uint8)
    vectors = [np.ones(d, np.float32), None, None]
    scale = np.ones(1, np.float32)
    attempt(sanitized, "kv_encode", [rows, *vectors, scale], [pages], [codec, side])
    pages[:] = byte
    attempt(sanitized, "kv_decode", [pages, *vectors, scale], [rows], [codec, side])
    q, q8, unit = np.ones((3, d), np.float32), np.ones((3, d), np.int8), np.ones(3, np.float32)
    outputs = [q8, unit, np.ones((3, p * 64), np.int32)]
    attempt(sanitized, "kv_scores", [q, pages, *vectors], outputs, [codec])
