"""torch.compile(fullgraph=True) over the CUDA operators: traced for tensors on "cuda", and run.

What runs is a compiled graph with CPU tensors in the place of the GPU's: there the dispatcher calls
the CUDA operators, whose launches go to the simulator.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from simt import cuda, cuda_graph
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch_calls import K, N, Small, op_calls, operator_calls, small_arguments

from hadamoe import torch_cuda

pytestmark = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]
CALLS = {
    name: call
    for name, call in operator_calls(np.random.default_rng(0)).items()
    if name.split()[0] in torch_cuda.OPERATORS
}
OP_CALLS = op_calls(np.random.default_rng(1))


@pytest.fixture(autouse=True)
def forget():
    """Graphs of other tests."""
    torch._dynamo.reset()


@pytest.fixture
def on_cuda():
    """The simulator's machine and log; operators on CPU tensors are those of CUDA."""
    library = torch.library.Library("hadamoe", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, op in torch_cuda.OPERATORS.items():
            library.impl(name, op, "CPU", allow_override=True)
    with cuda_graph.installed() as installed:
        yield installed
    library._destroy()


def call(name):
    """An operator as a function torch.compile can take."""
    return lambda *args: getattr(torch.ops.hadamoe, name.split()[0])(*args)


def equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def copied(args):
    return tree_map(lambda a: a.clone() if isinstance(a, torch.Tensor) else a, args)


def tensors(args):
    return [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]


def test_every_operator_is_here():
    assert {name.split()[0] for name in CALLS} == set(torch_cuda.OPERATORS)
    assert {name.split()[0] for name in OP_CALLS} == set(torch_cuda.OPERATORS)


def test_a_call_without_a_gpu_is_one_of_the_cpu():
    x = torch.ones(2, 64)
    with cuda_graph.installed() as (_, log):
        torch.ops.hadamoe.hadamard(x, None, None, 0, torch.float32)
    assert not log


@pytest.mark.parametrize("name", CALLS)
def test_tracing_tensors_on_cuda(name):
    """Part tables and mapped files stay on the CPU, all else is on the GPU, as is the result."""
    want = call(name)(*copied(CALLS[name]))
    op = getattr(torch.ops.hadamoe, name.split()[0])
    # AOT's copies of what is written need a torch with CUDA, fake or not
    backend = CompileCounterWithBackend("eager" if op.default._schema.is_mutable else "aot_eager")
    with FakeTensorMode():

        def lent(a):
            if not isinstance(a, torch.Tensor):
                return a
            stored = a.dtype == torch.uint8 or (a.dtype == torch.int64 and a.shape[-1] == 12)
            device = "cpu" if stored else "cuda"
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device)

        args = tree_map(lent, CALLS[name])
        got = torch.compile(call(name), fullgraph=True, backend=backend)(*args)
    (graph,) = backend.graphs
    assert op in [node.target for node in graph.graph.nodes]
    found = [got] if isinstance(got, torch.Tensor) else got
    for a, b in zip(found, [want] if isinstance(want, torch.Tensor) else want, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "cuda")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CALLS)
def test_an_operator(name, backend, on_cuda):
    _, log = on_cuda
    (eager, traced) = (copied(CALLS[name]) for _ in range(2))
    want = call(name)(*eager)
    launches = [launch.name for launch in log]
    got = torch.compile(call(name), fullgraph=True, backend=backend)(*traced)
    equal(got, want)
    equal(tensors(traced), tensors(eager))  # states are written
    assert [launch.name for launch in log] == launches * 2


def test_no_tokens_are_a_result_of_their_own(on_cuda):
    """Operators may not return what they were given."""
    x, *rest = CALLS["moe_decode"]
    y, expert, share = call("moe_decode")(x[:, :0], *rest)
    assert (y.shape, expert.shape, share.shape) == ((2, 0, K), (0, 2), (0, 2))
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata


@pytest.mark.parametrize("name", OP_CALLS)
def test_an_op_over_packed_weights(name, on_cuda, monkeypatch):
    """As `hadamoe.ops` has them; weights and their signs go to the GPU once."""
    machine, _ = on_cuda
    op, given = OP_CALLS[name]
    want = op(*copied(given))
    compiled = torch.compile(op, fullgraph=True, backend="inductor")
    monkeypatch.setattr(machine, "array", lambda *_: pytest.fail("a weight was sent again"))
    for _ in range(2):
        equal(compiled(*copied(given)), want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_any_number_of_tokens(backend, on_cuda):
    fixed, state = small_arguments(np.random.default_rng(2))
    compiled = torch.compile(Small(), fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 5):
        ids = torch.arange(2 * tokens).view(2, tokens) % N
        eager, traced = copied([state, state])
        want, got = Small()(ids, *fixed, eager), compiled(ids, *fixed, traced)
        equal([got, *traced], [want, *eager])
