"""A launch plan runs in the simulator only where `_cuda` would take it."""

from __future__ import annotations

import pytest
import torch

from hadamoe import cuda_products
from simt import cuda, cuda_launch

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def run(**changes):
    (step,) = cuda_products.hadamard(1, 32, "float32", block=32, pre=0, post=0)
    with cuda.installed(check=False):
        return cuda_launch.run(step.launch._replace(**changes), {"x": torch.zeros(1, 32)})


def test_a_kernel_nobody_compiles_is_refused():
    assert "hadamard<1>" in cuda_launch.compiled()
    with pytest.raises(LookupError, match=r"^hadamard<3> is in no HM_KERNELS"):
        run(constants=(3,))


def test_more_threads_than_a_kernel_is_compiled_for_are_refused():
    with pytest.raises(ValueError, match="hadamard<1>: 512 threads, its THREADS are 256"):
        run(threads=512)


def test_arrays_and_sizes_have_the_types_of_the_kernel():
    (step,) = cuda_products.hadamard(1, 32, "float32", block=32, pre=0, post=0)
    launch = step.launch
    with pytest.raises(TypeError, match="eps is int, needs f"):
        run(sizes=launch.sizes | {"eps": 1})
    with pytest.raises(TypeError, match="block is float, needs i"):
        run(sizes=launch.sizes | {"block": 32.0})
    launch = cuda_products.largest(1, 9, 3)[0]
    with (
        cuda.installed(),
        pytest.raises(TypeError, match=r"x is torch\.int32, needs 4"),
    ):
        cuda_launch.run(launch, {"x": torch.zeros(1, 9, dtype=torch.int32)})
    swapped = launch._replace(inputs={"x": True}, outputs=(launch.outputs[0], *launch.outputs))
    with cuda.installed(), pytest.raises(TypeError, match="values is no array that it"):
        cuda_launch.run(swapped, {"x": torch.zeros(1, 9)})
