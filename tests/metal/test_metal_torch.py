"""PyTorch on a Mac: its operators through `torch.mps.compile_shader`, simulated, on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import recorded
import torch
from simt import metal

import hadamoe
from hadamoe import ops, torch_blocks, torch_gpu, torch_layers, torch_mps
from hadamoe.errors import ContractError, DeviceError, UnsupportedError
from hadamoe.verify import layers, samples

pytestmark = [
    pytest.mark.simulator,  # of PyTorch's shaders, on CPU tensors
    pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing())),
]

OPERATORS = ("hadamard", "dequantize", "qmatmul", "moe_decode", "gated_delta", "qmatmul_top")
on_gpu = SimpleNamespace(**torch_mps.OPERATORS)


@pytest.fixture
def on_mps(monkeypatch):
    """Modules take the operators that tensors on "mps" would; the native ones raise."""
    monkeypatch.setattr(torch_layers, "operators", on_gpu)
    monkeypatch.setattr(torch_blocks, "operators", on_gpu)
    monkeypatch.setattr(torch_blocks.DecoderLayer, "in_parts", lambda self, device="cpu": True)
    monkeypatch.setattr(ops._cpu, "call", lambda *_: pytest.fail("a native op was called"))


def test_operators_are_registered_for_the_device():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hadamoe::{name}", "MPS")


@pytest.mark.parametrize("name", ["stdlib_jangtq2", "tqvllm_tiny"])
def test_a_checkpoint(name, on_mps):
    ids, want, _ = recorded.logits(name)
    with metal.mps_installed() as log:
        model, _ = hadamoe.load(recorded.checkpoint(name), dtype="float32")
        got = model(torch.from_numpy(ids)).logits.detach().numpy()
    assert len(log) > 8
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_weights_stay_where_files_are(monkeypatch):
    model, _ = hadamoe.load(recorded.checkpoint("stdlib_jangtq2"))
    held = sum(b.numel() * b.element_size() for b in model.buffers())
    held += sum(p.numel() * p.element_size() for p in model.parameters())
    files = sum(f.stat().st_size for f in recorded.checkpoint("stdlib_jangtq2").glob("*.safe*"))
    assert held < files / 10, "moving the model would move its weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_qmatmul(dtype):
    rng = np.random.default_rng(3)
    instance = hadamoe.Instance("linear", 4, "bf16")
    weight = samples.random_weight(rng, instance, [24, 9], 256, experts=3, kind="integer")
    w = ops.pack(weight)
    x = torch.from_numpy(rng.integers(-4, 5, (2, 3, 256))).to(dtype)
    expert = torch.from_numpy(rng.integers(0, 3, (2, 3, 2)))
    table, buffers = torch.from_numpy(w.parts), [torch.from_numpy(b) for b in w.buffers]
    with metal.mps_installed(check=True):
        got = on_gpu.qmatmul(x, table, expert, buffers, w.rows, dtype)
    assert torch.equal(got, ops.qmatmul(x, w, expert=expert))


@pytest.mark.parametrize("top", [1, 5, 70])
def test_qmatmul_top(top):
    rng = np.random.default_rng(5)
    w = ops.pack(
        samples.random_weight(rng, hadamoe.Instance("linear", 4, "bf16"), 90, 256, kind="integer")
    )
    table, buffers = torch.from_numpy(w.parts), [torch.from_numpy(b) for b in w.buffers]
    x = torch.from_numpy(rng.integers(-4, 5, (2, 256)).astype("f4"))
    with metal.mps_installed():
        got = on_gpu.qmatmul_top(x, None, None, None, table, buffers, top, 0, 1e-6)
    want = torch.ops.hadamoe.qmatmul_top(x, None, None, None, table, buffers, top, 0, 1e-6)
    assert all(map(torch.equal, got, want))


def test_gated_delta_writes_its_states():
    rng = np.random.default_rng(4)
    shape = (2, 3, 2, 4, 16, 24, 4)
    arrays = layers.gated_delta_arrays(rng, *shape)
    numbers = [2, 4, 16, 24, 1e-6]
    ours, native = ([torch.from_numpy(a.copy()) for a in arrays.values()] for _ in range(2))
    with metal.mps_installed(check=True):
        got = on_gpu.gated_delta(*ours, *numbers, torch.float32)
    want = torch.ops.hadamoe.gated_delta(*native, *numbers, torch.float32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours[-2:], native[-2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(UnsupportedError, match="device='xpu' has no kernels"):
        hadamoe.load(tmp_path, device="xpu")
    if not torch.backends.mps.is_available():
        with pytest.raises(DeviceError, match="device='mps' is not there"):
            hadamoe.load(tmp_path, device="mps")
    with pytest.raises(ContractError, match="a part table is on meta, needs cpu"):
        torch_gpu.weight_of(torch.empty((1, 1, 12), device="meta"), [], 32)
