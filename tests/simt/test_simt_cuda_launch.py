"""A launch plan runs in the simulator only where `_cuda` would take it."""

from __future__ import annotations

import pytest
import torch

from hadamoe import cuda_products
from simt import CompileError, cuda, cuda_launch

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
    with pytest.raises(CompileError, match="THREADS"):
        run(threads=512)
