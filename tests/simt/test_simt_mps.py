"""The stand-in for `torch.mps.compile_shader` binds arguments as PyTorch does."""

import pytest

import simt
from simt import metal

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'hadamoe[torch]')")
pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))

SOURCE = """
#include <metal_stdlib>
using namespace metal;
kernel void full(device float* out, constant float& value, uint i [[thread_position_in_grid]]) {
  out[i] = value;
}
template <typename T>
kernel void axpy(device T* y, constant T* x, constant long& n, constant half& a, constant long* l,
                 uint2 i [[thread_position_in_grid]]) {
  if (i.x < n) y[i.x] += T(a) * x[i.x] + T(l[1]);
}
template [[host_name("axpy_bf16")]] kernel void axpy<bfloat>(
    device bfloat*, constant bfloat*, constant long&, constant half&, constant long*, uint2);
kernel void add(device float* y, const device float* x, constant int* n [[buffer(2)]],
                uint i [[thread_position_in_grid]], uint size [[threads_per_threadgroup]]) {
  y[i] = x[i] + float(n[1]) * float(size);
}
"""


@pytest.fixture
def library():
    with metal.mps_installed(check=True) as log:
        library = torch.mps.compile_shader(SOURCE)
        library.__dict__["log"] = log
        yield library


def test_numbers_and_the_default_grid(library):
    x = torch.zeros(4, 4)
    library.full(x, 3.5)
    assert (x == 3.5).all()
    assert library.log[0].grid == (16, 1, 1)


def test_templates_casts_and_lists(library):
    y, x = torch.ones(20, dtype=torch.bfloat16), torch.arange(20, dtype=torch.bfloat16)
    sizes = {"threads": (32, 1), "group_size": (8, 1), "arg_casts": {3: "fp16"}}
    library.axpy_bf16(y, x, 20, 0.5, [1, 2], **sizes)
    assert torch.equal(y, (torch.arange(20) * 0.5 + 3).bfloat16())


def test_slices_and_aliases(library):
    x = torch.zeros(16)
    library.add(x[2:6], x[2:6], [0, 1], threads=4, group_size=2, arg_casts="int32")
    assert x.tolist() == [0] * 2 + [2] * 4 + [0] * 10
    with pytest.raises(ValueError, match="y and x overlap in part"):
        library.add(x[2:6], x[3:7], [0, 1], threads=4, arg_casts="int32")
    with pytest.raises(simt.CheckError, match="out-of-bounds"):
        library.add(x[2:6], torch.zeros(3), [0, 1], threads=4, arg_casts="int32")


def test_what_pytorch_refuses(library):
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="Failed to create function state object for: other"):
        _ = library.other
    with pytest.raises(RuntimeError, match="Unsupported argument type"):
        library.full(x, "1")
    with pytest.raises(RuntimeError, match="Unsupported cast instruction fp64"):
        library.full(x, 1.0, arg_casts="fp64")
    with pytest.raises(RuntimeError, match="Number of threads is undefined"):
        library.full(1.0)
    assert dir(library) == ["add", "axpy", "axpy_bf16", "full"]


def test_it_is_gone_afterwards():
    with metal.mps_installed():
        inside = torch.mps.compile_shader
    assert torch.mps.compile_shader is not inside
