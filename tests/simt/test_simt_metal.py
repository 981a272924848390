"""Kernels through `mx.fast.metal_kernel`: results, variants, counts, the log."""

import numpy as np
import pytest

import simt
from simt import metal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
REVERSE = f"""
    threadgroup float s[64];
    uint i = thread_position_in_threadgroup.x;
    s[i] = x[thread_position_in_grid.x];
    {BARRIER}
    y[thread_position_in_grid.x] = s[63 - i];
"""
SOFTMAX = (
    "float e = exp(x[thread_position_in_grid.x]); y[thread_position_in_grid.x] = e / simd_sum(e);"
)


def run(source, x, grid=None, threadgroup=(64, 1, 1), shape=None, dtype=mx.float32, **more):
    kernel = mx.fast.metal_kernel(
        name="test",
        input_names=["x"],
        output_names=["y"],
        source=source,
        header=more.pop("header", ""),
    )
    return kernel(
        inputs=[x],
        grid=grid or (x.size, 1, 1),
        threadgroup=threadgroup,
        output_shapes=[shape or x.shape],
        output_dtypes=[dtype],
        **more,
    )[0]


def numbers(n=128):
    return 4 * mx.sin(mx.arange(n, dtype=mx.float32))


@pytest.mark.parametrize("check", [False, True])
def test_a_kernel_runs(check):
    x = numbers()
    with metal.installed(check=check) as log:
        assert mx.metal.is_available()
        assert mx.default_device() == mx.gpu
        y = run(REVERSE, x)
    assert mx.array_equal(y.reshape(2, 64), x.reshape(2, 64)[:, ::-1])
    assert log[0].name == "custom_kernel_test_float_float"
    assert (log[0].grid, log[0].threadgroup) == ((128, 1, 1), (64, 1, 1))
    assert log[0].threadgroup_bytes == 256
    assert log[0].stats["barriers"] == log[0].stats["groups"] == 2
    assert mx.default_device() == mx.cpu
    assert not mx.metal.is_available()


def test_findings_are_raised_or_kept():
    bad = REVERSE.replace(BARRIER, "")
    with metal.installed(check=True) as log, pytest.raises(simt.CheckError) as raised:
        run(bad, numbers())
    message = str(raised.value)
    assert message.startswith("kernel custom_kernel_test_float_float: 3 findings\n")
    assert "y[thread_position_in_grid.x] = s[63 - i];" in message
    assert len(log) == 1
    with metal.installed(check=True, findings="keep") as log:
        run(bad, numbers())
    assert {f.kind for f in log[0].findings} >= {"race-read-write", "uninitialised-read"}


def test_a_kernel_outlives_its_session_but_does_not_run_outside():
    with metal.installed():
        kernel = mx.fast.metal_kernel(
            name="k", input_names=[], output_names=["y"], source="y[0] = 1;"
        )
    arguments = {"inputs": [], "output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    arguments |= {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    with pytest.raises(RuntimeError, match="only inside"):
        kernel(**arguments)
    with metal.installed() as log:
        assert kernel(**arguments)[0].item() == 1
    assert len(log) == 1


def test_inside_a_compiled_function():
    @mx.compile
    def doubled(x):
        return 2 * run("y[thread_position_in_grid.x] = x[thread_position_in_grid.x] + 1;", x)

    with metal.installed():
        with metal.installed(check=True) as inner:
            doubled(mx.arange(4.0))
        assert len(inner) == 1
        assert mx.array_equal(doubled(mx.arange(4.0)), mx.array([2.0, 4.0, 6.0, 8.0]))


def test_streams_of_a_device_that_is_not_there():
    """mlx-lm makes a stream of the default device when it is imported."""
    with metal.installed():
        stream = mx.new_thread_local_stream(mx.default_device())
        with mx.stream(stream):
            assert (mx.array(1) + 2).item() == 3
        with mx.stream(mx.gpu):
            assert (mx.array(1) + 2).item() == 3
        assert mx.default_stream(mx.default_device()).device == mx.cpu
        assert mx.device_info()["max_recommended_working_set_size"] > 0


def test_options_that_do_not_exist():
    with pytest.raises(ValueError, match="schedule='backwards'; it is one of ascending"):
        metal.installed(schedule="backwards").__enter__()
    with (
        metal.installed(max_threads=32),
        pytest.raises(ValueError, match="64 threads a threadgroup"),
    ):
        run(REVERSE, numbers())
    with metal.installed(), pytest.raises(ValueError, match="grid is"):
        run(REVERSE, numbers(), grid=(0, 1, 1))


# -- variants


def test_every_variant_is_accepted_and_right():
    x = numbers(32)
    right = np.exp(np.array(x, np.float64))
    right /= right.sum()
    seen = []
    for variant in metal.variants():
        with metal.installed(**variant):
            y = np.array(run(SOFTMAX, x))
        assert np.allclose(y, right, rtol=3e-6, atol=0), variant
        seen.append(y.tobytes())
    assert len(seen) == 10
    assert len(set(seen)) >= 5  # rounding differs, or the variants do nothing


@pytest.mark.parametrize("variant", [{"order": "sequential"}, {"order": "reversed"}, {"ulp": 4}])
def test_a_variant_changes_bits(variant):
    x = numbers(32)
    with metal.installed():
        plain = run(SOFTMAX, x)
    with metal.installed(**variant):
        assert not mx.array_equal(run(SOFTMAX, x), plain)


def test_orders_of_a_sum():
    x = mx.array([1e8] + [1.0] * 30 + [-1e8])
    sums = {}
    for order in ("butterfly", "sequential", "reversed"):
        with metal.installed(order=order):
            source = "y[thread_position_in_grid.x] = simd_sum(x[thread_position_in_grid.x]);"
            sums[order] = run(source, x)[0].item()
    assert sums["sequential"] == 0  # each 1 is lost beside 1e8
    assert sums["butterfly"] == 16  # ... except those that meet each other first
    assert sums["reversed"] == 0


def test_denormals():
    x = mx.array([1e-40, 2e-40, 1e-30, 1.0])
    source = "y[thread_position_in_grid.x] = x[thread_position_in_grid.x] * 2.0f;"
    with metal.installed():
        assert np.array(run(source, x)).tolist()[:2] == [0, 0]
    with metal.installed(ftz=False):
        assert np.array_equal(np.array(run(source, x)), 2 * np.array(x))


def test_contraction():
    source = "float a = x[0]; y[0] = a * a - 1.0f;"
    x = mx.array([1.0 + 2.0**-12])
    with metal.installed():
        fused = run(source, x).item()
    with metal.installed(contract=False):
        apart = run(source, x).item()
    assert fused == 2.0**-11 + 2.0**-24
    assert apart == 2.0**-11


@pytest.mark.parametrize(
    "name",
    ["exp", "exp2", "log", "log2", "sin", "cos", "tanh", "rsqrt", "precise::exp", "fast::log2"],
)
def test_an_error_of_some_ulp(name):
    x = mx.arange(1, 65, dtype=mx.float32) / 16
    source = f"y[thread_position_in_grid.x] = {name}(x[thread_position_in_grid.x]);"
    with metal.installed():
        exact = np.array(run(source, x))
    with metal.installed(ulp=4):
        off = np.array(run(source, x))
        assert np.array_equal(np.array(run(source, x)), off)  # still a function of its argument
    distance = np.abs(off.view(np.int32) - exact.view(np.int32))
    assert 1 < distance.max() <= 4


# -- counts


def test_bytes_and_lines():
    x = mx.arange(256, dtype=mx.float32)
    reads = {
        "x[i]": (1024, 1024, 8),
        "x[i / 2]": (1024, 512, 8),
        "x[(i * 8) % 256 + i / 32]": (1024, 1024, 64),
        "x[0]": (1024, 4, 8),
    }
    for expression, counts in reads.items():
        with metal.installed(check=True, transactions=True) as log:
            run(f"uint i = thread_position_in_grid.x; y[i] = {expression};", x)
        t = log[0].traffic["x"]
        assert (t.read, t.unique_read, t.lines_read) == counts, expression
        read, written = t
        assert (read, written) == (1024, 0)
        t = log[0].traffic["y"]
        assert (t.read, t.written, t.unique_written, t.lines_written) == (0, 1024, 1024, 8)


def test_vector_loads_count_once():
    source = """
        uint i = thread_position_in_grid.x;
        float4 v = ((const device float4*)x)[i];
        ((device float4*)y)[i] = v + 1.0f;
    """
    with metal.installed(check=True, transactions=True) as log:
        run(source, mx.zeros(512), grid=(128, 1, 1))
    t = log[0].traffic["x"]
    assert (t.read, t.unique_read, t.lines_read) == (2048, 2048, 16)


# -- what MLX hands over


def test_strides_of_an_input_that_is_not_copied():
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4).T
    kernel = {"name": "s", "input_names": ["x"], "output_names": ["y"]}
    kernel["source"] = """
        uint i = thread_position_in_grid.x;
        uint r = i / x_shape[1], c = i % x_shape[1];
        y[i] = x[r * x_strides[0] + c * x_strides[1]];
    """
    for dtype in (mx.float32, mx.bfloat16):
        for contiguous in (True, False):
            with metal.installed(check=True):
                call = mx.fast.metal_kernel(**kernel, ensure_row_contiguous=contiguous)
                y = call(
                    inputs=[x.astype(dtype).T.T if contiguous else x.astype(dtype)],
                    grid=(12, 1, 1),
                    threadgroup=(12, 1, 1),
                    output_shapes=[x.shape],
                    output_dtypes=[dtype],
                )[0]
            assert mx.array_equal(y.astype(mx.float32), x)


def test_initial_values_and_atomics():
    kernel = {"name": "a", "input_names": ["x"], "output_names": ["y"], "atomic_outputs": True}
    kernel["source"] = """
        uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&y[i % 2], x[i], memory_order_relaxed);
    """
    with metal.installed(check=True):
        y = mx.fast.metal_kernel(**kernel)(
            inputs=[mx.arange(64, dtype=mx.float32)],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(2,)],
            output_dtypes=[mx.float32],
            init_value=10,
        )[0]
    assert y.tolist() == [10 + 992, 10 + 1024]


def test_dtypes_go_through():
    for dtype in (mx.bool_, mx.uint8, mx.int16, mx.uint32, mx.int64, mx.float16, mx.bfloat16):
        x = mx.arange(16).astype(dtype)
        source = "y[thread_position_in_grid.x] = x[thread_position_in_grid.x];"
        with metal.installed(check=True):
            assert mx.array_equal(run(source, x, dtype=dtype), x)
