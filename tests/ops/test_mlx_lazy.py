"""What MLX may do with a lazy op: trace, map, reuse, reorder, run elsewhere, throw away."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest

from hadamoe import Instance, ops
from hadamoe.errors import UnsupportedError
from hadamoe.verify import layers, samples

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from hadamoe import mlx, mlx_host  # noqa: E402

if mlx_host.bridge is None:
    pytest.skip(
        "_mlx was not built for the installed mlx (HM_MLX=1 pip install .)", allow_module_level=True
    )

INST = Instance("linear", 4, "f32")


def same(a, b) -> None:
    np.testing.assert_array_equal(np.array(a), np.array(b))


@pytest.fixture
def weight(rng):
    return ops.pack(samples.random_weight(rng, INST, 24, 256, kind="gaussian"))


@pytest.fixture
def experts(rng):
    return ops.pack(samples.random_weight(rng, INST, 24, 256, experts=3, kind="gaussian"))


@pytest.fixture
def x(rng):
    return mx.array(rng.standard_normal((4, 3, 256)).astype("f4"))


@pytest.fixture
def moe(rng):
    hidden, inner, e = 256, 64, 4
    sizes = {
        "router": (e, hidden, 1), "gate_up": (2 * inner, hidden, e), "down": (hidden, inner, e),
        "shared_gate_up": (2 * inner, hidden, 1), "shared_down": (hidden, inner, 1),
        "shared_gate": (1, hidden, 1),
    }  # fmt: skip
    return ops.MoeWeights.of(
        **{
            name: samples.random_weight(rng, INST, n, k, experts=e, kind="gaussian")
            for name, (n, k, e) in sizes.items()
        }
    )


EXPERT = mx.array([[0, 2], [1, 1], [2, 0]])


@pytest.fixture
def rowwise(weight, experts, moe):
    """Functions of rows [..., 256] alone."""
    norm = np.ones(256, np.float32)
    return {
        "hadamard": lambda a: ops.hadamard(a, block=128),
        "qmatmul": lambda a: ops.qmatmul(a, weight),
        "experts": lambda a: ops.qmatmul(a, experts, expert=EXPERT[: a.shape[0]]),
        "moe_decode": lambda a: ops.moe_decode(a, moe, top_k=2),
        "moe_block": lambda a: ops.moe_block(a, norm, moe, top_k=2),
        "qmatmul_top": lambda a: ops.qmatmul_top(a, weight, 3)[0],
    }


ROWWISE = ("hadamard", "qmatmul", "experts", "moe_decode", "moe_block", "qmatmul_top")


@pytest.mark.parametrize("op", ROWWISE)
def test_compiled(op, rowwise, x):
    f = rowwise[op]
    for shapeless in (False, True):
        compiled = mx.compile(lambda a: f(mx.abs(a)) * 2, shapeless=shapeless)
        same(compiled(x[0]), f(mx.abs(x[0])) * 2)
        same(compiled(x[1]), f(mx.abs(x[1])) * 2)


@pytest.mark.parametrize("op", ["hadamard", "qmatmul", "moe_decode", "moe_block", "qmatmul_top"])
def test_one_trace_serves_any_number_of_tokens(op, rowwise, x):
    f, traces = rowwise[op], []
    compiled = mx.compile(lambda a: traces.append(1) or f(a), shapeless=True)
    for a in (x[0, :1], x[0], x.reshape(12, 256)):
        same(compiled(a), f(a))
    assert len(traces) == 1


@pytest.mark.parametrize("op", ROWWISE)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap(op, rowwise, x, axis):
    f = rowwise[op]
    want = mx.stack([f(a) for a in x])
    moved = mx.moveaxis(x, 0, axis)
    same(mx.vmap(f, in_axes=axis)(moved), want)
    same(mx.compile(mx.vmap(f, in_axes=axis))(moved), want)
    rows = mx.vmap(mx.vmap(f))(x) if op != "experts" else want
    same(rows, want)


def test_vmap_over_experts_alone_and_with_rows(experts, x):
    expert = mx.array([[0], [2], [1], [0]])

    def f(a, e):
        return ops.qmatmul(a, experts, expert=e)

    want = [f(x[0, 0], e) for e in expert]
    same(mx.vmap(f, in_axes=(None, 0))(x[0, 0], expert), mx.stack(want))
    want = [f(a, e) for a, e in zip(x[:, 0], expert, strict=True)]
    same(mx.vmap(f)(x[:, 0], expert), mx.stack(want))


def test_vmap_over_rows_of_a_table(weight):
    rows = mx.array([[3, 1], [0, 23]])
    same(mx.vmap(lambda r: ops.dequantize(weight, r))(rows), ops.dequantize(weight, rows))


def test_vmap_over_sequences_and_their_states(rng):
    hk, hv, dk, dv = 1, 2, 16, 8
    arrays = layers.gated_delta_arrays(rng, 3, 4, hk, hv, dk, dv, 4)
    arrays = [mx.array(a) for a in arrays.values()]
    options = {"heads": (hk, hv), "head_dims": (dk, dv)}

    def f(proj, conv_state, state):
        return mlx.gated_delta(proj[None], *arrays[1:5], conv_state[None], state[None], **options)

    got = mx.vmap(f)(arrays[0], *arrays[5:])
    want = mlx.gated_delta(*arrays, **options)
    for a, b in zip(got, want, strict=True):
        same(a[:, 0], b)


def test_vmap_over_what_has_no_batch_is_refused(x):
    signs = mx.ones((4, 128))
    with pytest.raises(UnsupportedError) as e:
        mx.vmap(lambda a, s: ops.hadamard(a, block=128, pre=s))(x, signs)
    assert str(e.value) == "hadamard: an argument without a batch has one under mx.vmap"


def test_equal_calls_of_a_trace_are_one(x, weight, experts):
    """MLX merges equivalent primitives; different weights, numbers or shapes are not."""
    other = ops.pack(
        samples.random_weight(np.random.default_rng(9), INST, 24, 256, kind="gaussian")
    )

    def f(a):
        return [
            ops.qmatmul(a, weight), ops.qmatmul(a, weight), ops.qmatmul(a, other),
            ops.hadamard(a, block=128), ops.hadamard(a, block=64),
            *ops.qmatmul_top(a, weight, 2), *ops.qmatmul_top(a, weight, 2, norm=np.ones(256, "f4")),
        ]  # fmt: skip

    for a, b in zip(mx.compile(f)(x), f(x), strict=True):
        same(a, b)


def test_streams(x, weight):
    """Work of two streams waits for what it reads, and only for that."""
    streams = [mx.new_stream(mx.cpu) for _ in range(2)]
    a = b = x
    for _ in range(20):
        with mx.stream(streams[0]):
            a = ops.hadamard(a + b)
        with mx.stream(streams[1]):
            b = ops.hadamard(a - b)
    wanted = [x, x]
    for _ in range(20):
        wanted[0] = ops.hadamard(wanted[0] + wanted[1])
        wanted[1] = ops.hadamard(wanted[0] - wanted[1])
    same(a, wanted[0])
    same(b, wanted[1])


STATES = {"heads": (1, 2), "head_dims": (64, 64)}


def delta_arrays(rng):
    return [mx.array(a) for a in layers.gated_delta_arrays(rng, 1, 1, 1, 2, 64, 64, 4).values()]


def address(a: mx.array) -> int:
    return np.asarray(a).__array_interface__["data"][0]


def test_a_state_nobody_else_holds_is_updated_where_it_is(rng):
    *arrays, conv_state, state = delta_arrays(rng)
    kept = [np.array(conv_state), np.array(state)]
    y, *new = mlx.gated_delta(*arrays, conv_state, state, **STATES)
    mx.eval(y, new)
    same(conv_state, kept[0])  # held here: left as they were
    same(state, kept[1])
    assert address(new[1]) != address(state)
    for _ in range(3):
        conv_state, state = new
        before = address(state)
        y, *new = mlx.gated_delta(*arrays, conv_state, state, **STATES)
        del conv_state, state
        mx.eval(y, new)
        assert address(new[1]) == before


def test_a_view_of_a_state_keeps_it(rng):
    """Memory is shared between arrays; none of them may change."""
    *arrays, conv_state, state = delta_arrays(rng)
    doubled = mx.concatenate([state, state])
    mx.eval(doubled)
    want = np.array(doubled)
    state, view = doubled[:1], doubled.reshape(-1)
    del doubled
    results = mlx.gated_delta(*arrays, conv_state, state, **STATES)
    again = mlx.gated_delta(*arrays, conv_state, state, **STATES)
    mx.eval(results, again)
    same(view, want.reshape(-1))
    for a, b in zip(results, again, strict=True):
        same(a, b)


def test_states_inside_compile(rng):
    *arrays, conv_state, state = delta_arrays(rng)
    step = mx.compile(lambda p, c, s: mlx.gated_delta(p, *arrays[1:], c, s, **STATES))
    held = [np.array(conv_state), np.array(state)]
    a, b = (conv_state, state), (conv_state, state)
    for i in range(4):
        proj = arrays[0] + i
        ya, *a = step(proj, *a)
        yb, *b = mlx.gated_delta(proj, *arrays[1:], *b, **STATES)
        same(ya, yb)
        same(a[1], b[1])
    same(conv_state, held[0])
    same(state, held[1])


def test_a_state_given_twice(rng):
    """Keys that are also the values: two outputs, two memories."""
    arrays = [mx.array(a) for a in layers.attention_arrays(rng, 1, 2, 4, 2, 16, 8, 0, 4).values()]
    both = mx.array(np.array(arrays[5]))
    _, keys, values = mlx.attention(*arrays[:5], both, both, heads=4)
    del both
    assert address(keys) != address(values)
    _, *want = mlx.attention(*arrays[:5], arrays[5], mx.array(np.array(arrays[5])), heads=4)
    same(keys, want[0])
    same(values, want[1])


def test_weights_stay_alive_as_long_as_the_graph_and_no_longer(rng, x):
    w = ops.pack(samples.random_weight(rng, INST, 24, 256, kind="gaussian"))
    want = ops.qmatmul(np.array(x), w)
    gone = weakref.ref(w.parts)
    y = ops.qmatmul(x, w)
    del w
    gc.collect()
    assert gone() is not None
    same(y, want)
    del y
    gc.collect()
    assert gone() is None


def test_a_large_weight_is_never_copied():
    """256 MB of mapped codes through compile, vmap and a plain call: memory stays far below."""
    code = """
        import resource, sys, tempfile
        import mlx.core as mx, numpy as np
        from hadamoe import Part, Instance, Weight, ops

        rows, columns = 1 << 17, 4096
        with tempfile.NamedTemporaryFile() as f:
            f.truncate(rows * columns // 2)
            codes = np.memmap(f.name, np.uint8, "r").reshape(rows, -1)
            scale = np.ones((rows, 1), np.float32)
            part = Part(Instance("linear_signed", 4, "f32"), rows, columns, codes, scale)
            w = ops.pack(Weight(columns, ((part,),)))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rows = mx.array([0, 5, rows - 1])
            f = lambda r: ops.dequantize(w, r)
            for g in (f, mx.compile(f), mx.vmap(f)):
                mx.eval(g(rows))
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(grown * (1 if sys.platform == "darwin" else 1024), mx.get_peak_memory())
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    grown, mlxs = map(int, out.stdout.split())
    assert grown < 64 << 20
    assert mlxs < 1 << 20


def test_other_threads_compute_at_the_same_time(x, weight):
    """torch's and numpy's calls share the thread pool with MLX's streams."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    want, theirs = ops.qmatmul(np.array(x), weight), torch.from_numpy(np.array(x))
    wrong = []

    def compute(run):
        for _ in range(50):
            if not np.array_equal(np.array(run()), want):
                wrong.append(run)

    def in_mlx():
        with mx.stream(mx.new_stream(mx.cpu)):
            return ops.qmatmul(mx.array(np.array(x)), weight)

    runs = [in_mlx, in_mlx, lambda: ops.qmatmul(theirs, weight).numpy(),
            lambda: ops.qmatmul(np.array(x), weight)]  # fmt: skip
    threads = [threading.Thread(target=compute, args=(run,)) for run in runs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_process_ends_with_work_under_way():
    code = """
        import mlx.core as mx, numpy as np
        from hadamoe import ops
        x = mx.zeros((512, 16384))
        y = [ops.hadamard(x + i, pre=np.ones(16384, np.float32)) for i in range(8)]
        mx.async_eval(y)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0, out.stderr


def test_another_mlx_means_the_eager_route(monkeypatch):
    """The C++ ABI of MLX changes with its patch releases: `_mlx` is not even imported."""
    monkeypatch.setattr(mx, "__version__", "0.0.1")
    monkeypatch.setitem(sys.modules, "hadamoe._mlx", None)  # an import would fail
    assert mlx_host._bridge() is None
    monkeypatch.undo()
    assert mlx_host._bridge() is mlx_host.bridge
    monkeypatch.setitem(sys.modules, "hadamoe._mlx_built", None)  # not built at all
    assert mlx_host._bridge() is None
    monkeypatch.setattr(mlx_host, "bridge", None)
    assert mlx_host.route() == "eager"
