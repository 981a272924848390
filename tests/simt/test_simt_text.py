"""The stand-in compiles the text MLX itself would: MLX prints it while a function is exported.

That works without a Metal device, so the whole path from Python to kernel is the real one.
"""

import os
import re
import sys
from dataclasses import dataclass, field

import pytest

from simt import metal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from simt import mxtext  # noqa: E402

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))


@dataclass
class Case:
    source: str
    inputs: list
    outputs: list
    template: list = field(default_factory=list)
    header: str = ""
    atomic: bool = False


def zeros(*shape, dtype=None):
    return mx.zeros(shape, dtype=dtype or mx.float32)


EVERY_ATTRIBUTE = "".join(f"o0[0] += {name};\n" for name in mxtext.ATTRIBUTES)
CASES = {
    "templates": Case(
        "uint i = thread_position_in_grid.x; o0[i] = i0[i] * T(i1[0]) + N + (F ? 1 : 0);",
        [zeros(64), zeros(3, dtype=mx.float16)],
        [mx.float32],
        [("T", mx.bfloat16), ("N", -3), ("F", True), ("G", False), ("U", mx.int32)],
    ),
    "shapes, strides, dimensions": Case(
        "o0[0] = i0_shape[0] + i0_strides[1] + i2_ndim + i1 + i3_shape[0]; o1[0] = i2[0];",
        [zeros(8, 9, dtype=mx.bfloat16), mx.array(4), zeros(2, 2, dtype=mx.uint32), mx.array(1.0)],
        [mx.bfloat16, mx.int32],
    ),
    "few elements": Case(
        "o0[0] = i0[0] + i1[0] + i2[0];", [zeros(7), zeros(8), zeros(2, 4)], [mx.float32]
    ),
    "an empty input": Case("o0[0] = 1.0f;", [zeros(0)], [mx.float32]),
    "atomic outputs and a header": Case(
        "atomic_fetch_add_explicit(&o0[0], Q, memory_order_relaxed);",
        [zeros(16, dtype=mx.uint8)],
        [mx.float32, mx.uint32],
        [("T", mx.int64)],
        "constant int Q = 3;\n",
        True,
    ),
    "every attribute": Case(EVERY_ATTRIBUTE, [zeros(16)], [mx.float32]),
    "every type": Case(
        "o0[0] = 0;",
        [zeros(16, dtype=dtype) for dtype in mxtext.TYPES],
        list(mxtext.TYPES),
        [(f"T{i}", dtype) for i, dtype in enumerate(mxtext.TYPES)],
    ),
}


def printed(function, *arguments, path) -> str:
    """What the C++ side writes to standard output while `function` is exported."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(path / "printed", "w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            mx.export_function(str(path / "exported.mlxfn"), function, *arguments)
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("name", CASES)
def test_text_is_mlxs(name, tmp_path):
    case = CASES[name]
    inputs = [f"i{k}" for k in range(len(case.inputs))]
    outputs = [f"o{k}" for k in range(len(case.outputs))]
    kernel = mx.fast.metal_kernel(
        name="test",
        input_names=inputs,
        output_names=outputs,
        source=case.source,
        header=case.header,
        atomic_outputs=case.atomic,
    )

    def call(*arrays):
        return kernel(
            inputs=list(arrays),
            template=case.template,
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)] * len(outputs),
            output_dtypes=case.outputs,
            verbose=True,
        )

    text = printed(call, *case.inputs, path=tmp_path)
    real = re.search(r"```\n(.*?)\n```", text, re.S)[1]
    body = ("test", inputs, outputs, case.source, case.header)
    ours = mxtext.generate(*body, case.inputs, case.outputs, case.template, case.atomic)
    assert ours.source == real
    assert ours.name in real


def test_arguments_are_refused_in_mlxs_words():
    def both(**changes):
        with metal.installed():
            stand_in = mx.fast.metal_kernel
        told = []
        for make in (mx.fast.metal_kernel, stand_in):
            kernel = make(name="k", input_names=["x"], output_names=["y"], source="y[0] = x[0];")
            arguments = {"inputs": [zeros(3)], "output_shapes": [(3,)], "grid": (3, 1, 1)}
            arguments |= {"output_dtypes": [mx.float32], "threadgroup": (3, 1, 1)} | changes
            with pytest.raises(ValueError) as refused:
                kernel(**arguments)
            told.append(str(refused.value).strip())
        assert told[0] == told[1]

    both(inputs=[])
    both(output_shapes=[(3,), (3,)])
    both(output_dtypes=[])
    both(template=[("T", 3.5)])
