"""PyTorch on CUDA: its operators in the simulator on CPU tensors, and what is missing by name."""

from __future__ import annotations

import builtins
import subprocess
import sys

import numpy as np
import pytest
import torch
from simt import cuda, cuda_graph
from torch._subclasses.fake_tensor import FakeTensorMode

import hadamoe
from hadamoe import reference, torch_cuda
from hadamoe.errors import DeviceError

simulated = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]
OPERATORS = ("hadamard", "dequantize", "qmatmul", "moe_decode", "gated_delta", "qmatmul_top")


def test_operators_are_registered_for_the_device():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hadamoe::{name}", "CUDA")


def test_importing_ops_of_torch_registers_them():
    """As `hadamoe.ops` does, of which a model need not have been loaded."""
    code = "import torch, hadamoe.torch_ops\n" + "\n".join(
        f"assert torch._C._dispatch_has_kernel_for_dispatch_key('hadamoe::{name}', 'CUDA')"
        for name in OPERATORS
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hadamard():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2, 300)).astype("f4"))
    signs = torch.tensor([1.0, -1, -1, 1] * 75)
    with cuda_graph.installed(check=True) as (_, log):
        got = torch_cuda.OPERATORS["hadamard"](x, signs, None, 0, torch.float32)
    want = reference.hadamard(x.numpy(), pre=signs.numpy())
    np.testing.assert_array_equal(got.numpy(), want)
    assert [launch.name for launch in log] == ["hadamard<2>"]


def test_torch_compile_knows_results_on_cuda():
    """What fullgraph needs: shapes, dtypes and device of every result, without running a kernel."""
    call, table = torch.ops.hadamoe, torch.zeros(1, 1, 12, dtype=torch.int64)
    stored, f32 = [torch.zeros(4, dtype=torch.uint8)], torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 300, device="cuda")
        ids = torch.zeros(3, dtype=torch.int64, device="cuda")
        found = [
            call.hadamard(x, None, None, 128, f32),
            call.dequantize(table, ids, stored, 256, f32),
            call.qmatmul(x, table, None, stored, 77, torch.bfloat16),
            *call.qmatmul_top(x, None, None, None, table, stored, 5, -1, 1e-6),
        ]
    assert [tuple(a.shape) for a in found] == [(2, 384), (3, 256), (2, 77), (2, 5), (2, 5)]
    assert {a.device.type for a in found} == {"cuda"}


def test_a_graph_runs_what_was_recorded_and_nothing_else():
    x, total = torch.ones(2, 64), torch.zeros(2, 64)
    ran = []

    def step():
        ran.append(True)
        y = torch_cuda.OPERATORS["hadamard"](x, None, None, 0, torch.float32)
        total.add_(y[:, :32].repeat(1, 2) + 1)

    with cuda_graph.installed() as (machine, log):
        replay = machine.capture(step, torch.device("cpu"))
        assert not log
        assert not total.any()
        for n in (1, 2):
            replay()
            assert len(log) == n
        x.mul_(2)
        replay()
    assert len(ran) == 1
    assert total[0, 0] == 8 * 1 + 8 * 1 + 8 * 2 + 3
    assert machine.graphs == [["hadamard<1>", "repeat", "add", "add_"]]


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: bool(x.any())])
def test_a_graph_cannot_wait_for_numbers(wait):
    with cuda_graph.installed() as (machine, _), pytest.raises(RuntimeError, match="capturing"):
        machine.capture(lambda: wait(torch.ones(2)), torch.device("cpu"))


for _test in (test_hadamard, test_a_graph_runs_what_was_recorded_and_nothing_else):
    _test.pytestmark = [*getattr(_test, "pytestmark", []), *simulated]


class Library:
    """What `torch_cuda.Machine` asks ``_cuda``."""

    def __init__(self, names=("NVIDIA A", "NVIDIA B"), problem=None):
        self.names, self.problem, self.loaded = list(names), problem, []

    def devices(self):
        if self.problem:
            raise DeviceError(self.problem)
        return self.names

    def load(self, index):
        self.loaded.append(index)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(capability, ...): torch and ``_cuda`` as on a machine with two GPUs."""

    def made(capability=(9, 0), available=True, **options):
        library = Library(**options)
        monkeypatch.setattr(torch_cuda, "_library", lambda: library)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        return library

    return made


def test_the_device_is_found_and_gets_its_kernels(gpus):
    library = gpus()
    assert torch_cuda.machine.device(torch.device("cuda")) == torch.device("cuda", 1)
    assert torch_cuda.machine.device(torch.device("cuda:0")) == torch.device("cuda", 0)
    assert library.loaded == [1, 0]


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (
            {"problem": "CUDA: there is no NVIDIA driver on this machine"},
            "cuda",
            "no NVIDIA driver",
        ),
        ({"available": False}, "cuda", r"NVIDIA A is there, but torch .* \(CUDA 13.0\) cannot use"),
        ({}, "cuda:2", "load: device='cuda:2': there are 2 GPUs"),
        ({"capability": (7, 5)}, "cuda:0", "NVIDIA A has compute capability 7.5, .* need 8.0 or"),
    ],
)
def test_what_is_missing(options, device, message, gpus):
    gpus(**options)
    with pytest.raises(DeviceError, match=message):
        torch_cuda.machine.device(torch.device(device))


def test_a_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"needs a torch with CUDA, torch .* built without"):
        torch_cuda.machine.device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("error", "why"), [(ModuleNotFoundError("_cuda"), ""), (ImportError("torn"), r" \(torn\)")]
)
def test_a_build_without_kernels(error, why, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **options):
        if args and len(args) > 2 and args[2] and "_cuda" in args[2]:
            raise error
        return real(name, *args, **options)

    torch_cuda._library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DeviceError, match=f"built without CUDA kernels{why}; .*HM_CUDA=pypi"):
        torch_cuda._library()


class Event:
    """A `torch.cuda.Event` whose copies are done only when it is waited for."""

    def __init__(self):
        self.pending = []

    def record(self, stream):
        self.pending, stream.pending = stream.pending, []

    def synchronize(self):
        for to, source in self.pending:
            to.copy_(source)
        self.pending = []


class Stream:
    """A stream that copies when something waits for it."""

    def __init__(self):
        self.pending = []


def test_staging_sends_every_byte(monkeypatch):
    """Copies happen as late as CUDA may do them: a buffer that is filled too early shows."""
    stream = Stream()
    staging = torch_cuda.Staging.__new__(torch_cuda.Staging)
    staging.buffers = [torch.empty(48, dtype=torch.uint8) for _ in range(2)]
    staging.sent, staging.turn, staging.stream = [Event(), Event()], 0, stream
    staging.late = lambda to, source: stream.pending.append((to, source))
    source = torch.arange(1000, dtype=torch.int32).to(torch.uint8)
    result = torch.zeros_like(source)
    for piece, to in zip(source.split(48), result.split(48), strict=True):
        staging.send(piece, to)
    for event in staging.sent:
        event.synchronize()
    assert torch.equal(result, source)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_load_says_so_before_it_reads_anything(tmp_path):
    with pytest.raises(DeviceError, match="load: device='cuda' needs a torch with CUDA"):
        hadamoe.load(tmp_path, device="cuda")
