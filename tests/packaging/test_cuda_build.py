"""`_cuda`, built by NVIDIA's compiler from PyPI: what its kernels need of a GPU, and its launches.

No GPU takes part: the module's calls go to a runtime of our own (fake_cuda_runtime.cpp).
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cmake
import nanobind
import ninja
import numpy as np
import pytest
from fake_cuda import HOST, STREAMS, Array, Runtime
from simt import cuda_launch

from hadamoe.errors import ContractError, DeviceError

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import cuda_kernels  # noqa: E402

#: What is compiled here: the H200's machine code. `.ci/run` makes a wheel of PTX, and
#: .ci/cuda_kernels.py compiles for all architectures.
ARCHITECTURE = "90a"
#: Registers of a thread that let two blocks of 256 threads, or four of 128, share a multiprocessor.
REGISTERS = 128
#: Kernels that may have more, and how many: one block of 256 threads, or two of 128. A tile's sums
#: are most of what a multiprocessor has; no known model has gated delta heads of more than 128;
#: attention has a way through for every codec; a token's
#: experts are a block for each multiprocessor, which waits for memory and not for others.
WIDE = {
    "qmatmul<2, 64>": 255,
    "qmatmul<3, 32>": 255,
    "delta_scan<32>": 255,
    "delta_prepare<8, 8>": 255,
    "moe_gate_up": 255,
    "moe_down<2>": 168,
    "moe_down<4>": 255,
    **{f"kv_runs<{d}, 99, 99>": 255 for d in (32, 64, 128, 256)},
}
#: Static shared memory of a block, in bytes; what grows with a model's sizes is dynamic.
SHARED = 2048
#: Kernels that may keep something in a stack frame, and its bytes. Never one of a decoded token.
STACK: dict[str, int] = {}

pytestmark = pytest.mark.skipif(
    cuda_kernels.nvcc() is None,
    reason="no nvcc (nvidia-cuda-nvcc is not installed: pip install 'hadamoe[test]')",
)


class Built(NamedTuple):
    """The build folder and what the compiler said."""

    folder: Path
    log: str

    @property
    def kernels(self) -> list[cuda_kernels.Kernel]:
        return list(cuda_kernels.parse(self.log))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """`_cuda`, warnings as errors."""
    folder = tmp_path_factory.mktemp("cuda")
    tools = f"{cmake.CMAKE_BIN_DIR}{os.pathsep}{ninja.BIN_DIR}{os.pathsep}{os.environ['PATH']}"
    flags = {"CUDAARCHS": f"{ARCHITECTURE}-real", "CUDAFLAGS": "-Xptxas -v"}
    environment = os.environ | flags | {"PATH": tools}
    how = "pypi" if "site-packages" in cuda_kernels.nvcc().parts else "on"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DHM_CUDA={how}"]
    configure += ["-DHM_WERROR=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    log = ""
    for command in (configure, ["cmake", "--build", folder, "--target", "_cuda"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        log += done.stdout + done.stderr
        assert done.returncode == 0, log[-6000:]
    return Built(folder, log)


def import_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_of_the_sources_is_compiled(built):
    compiled = [kernel.name for kernel in built.kernels]
    assert sorted(compiled) == sorted(cuda_launch.compiled())
    assert {kernel.architecture for kernel in built.kernels} == {ARCHITECTURE}


def test_kernels_keep_to_their_budgets(built):
    over = [
        kernel
        for kernel in built.kernels
        if kernel.registers > WIDE.get(kernel.name, REGISTERS)
        or kernel.spilled
        or kernel.stack > STACK.get(kernel.name, 0)
        or kernel.shared > SHARED
    ]
    assert not over, "\n".join(map(str, over))
    assert set(STACK) | set(WIDE) <= {kernel.name for kernel in built.kernels}


def test_the_compilers_report_is_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2hm6kernelINS_3oneILi2ELin3EEEEEvNS_9ArgumentsE' for 'sm_90a'
ptxas info    : Function properties for _ZN2hm6kernelINS_3oneILi2ELin3EEEEEvNS_9ArgumentsE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 77 registers, used 1 barriers, 96 bytes smem
ptxas info    : Compiling entry function '_ZN2hm6kernelINS_3twoEEEvNS_9ArgumentsE' for 'sm_80'
ptxas info    : Function properties for _ZN2hm6kernelINS_3twoEEEvNS_9ArgumentsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 24 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Function properties for _ZN2hm4deepEPKfi
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""  # noqa: E501
    one, two = cuda_kernels.parse(log)
    assert one == ("one<2, -3>", "90a", 77, 16, 20, 96)
    assert two == ("two", "80", 8, 24, 12, 0), "what it calls counts too"


def test_it_imports_without_a_driver(built):
    """In a process of its own; a launch says what is missing."""
    (module,) = built.folder.glob("_cuda*.so")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cuda", {str(module)!r})
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
print(cuda.kernels())
print(cuda.architectures())
for ask in (cuda.devices, lambda: cuda.device(0), lambda: cuda.load(0)):
    try:
        ask()
    except Exception as e:
        print(type(e).__name__, e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, architectures, *errors = done.stdout.splitlines()
    assert kernels == str(list(cuda_launch.compiled()))
    assert architectures == f"{ARCHITECTURE}-real"
    if not Path("/dev/nvidiactl").exists():
        assert errors == ["DeviceError CUDA: there is no NVIDIA driver on this machine"] * 3


# ---- launches


class Module(NamedTuple):
    """`_cuda` over the runtime that only listens."""

    cuda: ModuleType
    runtime: Runtime


@pytest.fixture(scope="module")
def linked(built) -> Module:
    """The module's own two files again, in a namespace of their own, so that `hadamoe._cuda` may be
    in the same process; kernels and tables are those of the build."""
    here = Path(__file__).parent
    system = cuda_kernels.nvcc().resolve().parent.parent / "include"
    include = [system, nanobind.include_dir(), built.folder / "cuda"]
    sources = [ROOT / "csrc" / "bind" / name for name in ("cuda.cpp", "cuda_device.cpp")]
    objects = sorted((built.folder / "CMakeFiles" / "hm_cuda.dir" / "cuda").glob("*.o"))
    path = built.folder / "linked" / "_cuda.so"
    path.parent.mkdir()
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Dhm=hm_fake",
    ]
    command += [f"-I{folder}" for folder in (*include, sysconfig.get_path("include"))]
    command += [*sources, here / "fake_cuda_runtime.cpp", *objects]
    command += [built.folder / "libnanobind-static.a", "-o", path]
    subprocess.run(command, check=True)
    return Module(import_module("_cuda", path), Runtime(path))


@pytest.fixture
def module(linked) -> Module:
    """On a machine with two H200s, and nothing asked yet."""
    linked.runtime.reset()
    STREAMS.update({(2, 0): 1000, (2, 1): 1001})
    return linked


NAME, ARRAYS, SIZES = "hadamard<4>", 5, 9
ADDRESS = 0x7F0000000000


def arrays(**options) -> list[Array]:
    return [Array(ADDRESS + 4096 * i, (2, 8), **options) for i in range(ARRAYS)]


def launch(module: Module, lent: list | None = None, sizes=(0,) * SIZES, shared=0, **options):
    lent = arrays() if lent is None else lent
    module.cuda.launch(NAME, lent, sizes, (3, 2, 1), 256, shared, **options)


def test_a_launch_hands_over_what_it_was_given(module):
    lent = [Array(ADDRESS, (2, 8), offset=64), None, *arrays()[2:]]
    sizes = [7, -1, 2**31 - 1, 1e-6, 0.5, 0, -(2**31), np.float64(3.0), 1]
    launch(module, lent, sizes, shared=1234)
    (made,) = module.runtime.launches
    assert made["arrays"] == [ADDRESS + 64, 0, *(ADDRESS + 4096 * i for i in (2, 3, 4))] + [0] * 19
    (eps,) = struct.unpack("<i", struct.pack("<f", 1e-6))
    assert (
        made["sizes"] == [7, -1, 2**31 - 1, eps, 0x3F000000, 0, -(2**31), 0x40400000, 1] + [0] * 23
    )
    assert made["kernel"] == "_ZN2hm6kernelINS_8hadamardILi4EEEEEvNS_9ArgumentsE"
    assert (made["grid"], made["block"], made["shared"]) == ([3, 2, 1], [256, 1, 1], 1234)
    assert (made["device"], made["stream"], made["attributes"]) == (0, 1000, {"6": 1})


def needs(module: Module, name: str, *given: object) -> int:
    """The number in the refusal of a launch."""
    with pytest.raises(ContractError, match=r"needs \d+$") as refused:
        module.cuda.launch(name, *given, (1, 1, 1), 32, 0)
    return int(str(refused.value).split()[-1])


def test_a_name_leads_to_its_kernel(module):
    for name in module.cuda.kernels():
        sizes = [0] * needs(module, name, [], [0] * 40)
        absent = [None] * needs(module, name, [], sizes)
        module.cuda.launch(name, absent, sizes, (1, 1, 1), 32, 0)
        assert cuda_kernels.kernel_name(module.runtime.launches[-1]["kernel"]) == name


def test_a_launch_does_nothing_else(module):
    """Neither waits nor allocates nor asks for what it knows, so that a graph may capture it."""
    prepared = module.cuda.Launch(NAME, [0] * SIZES, (1, 1, 1), 256, 60000)
    prepared(arrays())
    first = [call["call"] for call in module.runtime.calls]
    assert first[-1] == "cudaLaunchKernelExC"
    for _ in range(3):
        prepared(arrays())
    again = [call["call"] for call in module.runtime.calls][len(first) :]
    assert again == ["cudaLaunchKernelExC"] * 3


@pytest.mark.parametrize(("major", "ptx", "overlap", "attributes"), [
    (9, 90, True, {"6": 1}), (12, 100, True, {"6": 1}), (9, 90, False, {}), (8, 80, True, {}),
    (10, 80, True, {}),
])  # fmt: skip
def test_launches_overlap_where_the_code_waits_itself(linked, major, ptx, overlap, attributes):
    """Code compiled for 8.0 does not wait, wherever it runs."""
    index = ptx // 2  # a device for each, as what one has is asked once
    STREAMS[2, index] = 7
    linked.runtime.reset(major=major, ptx=ptx, devices=64)
    launch(linked, arrays(device=(2, index)), overlap=overlap)
    assert linked.runtime.launches[0]["attributes"] == attributes


def test_shared_memory_beyond_the_default_is_asked_for_once(module):
    name, count = "hadamard<2>", [0] * SIZES
    for shared in (100_000, 100_000, 50_000, 120_000, 0):
        module.cuda.launch(name, arrays(), count, (1, 1, 1), 256, shared)
    asked = [c["value"] for c in module.runtime.calls if c["call"] == "cudaFuncSetAttribute"]
    assert asked == [100_000, 120_000]
    assert [made["shared"] for made in module.runtime.launches][-2:] == [120_000, 0]


def test_more_shared_memory_than_there_is(module):
    module.runtime.reset(static_shared=448)
    message = f"{NAME}: needs 232448 bytes of shared memory, device 0 has 232000"
    with pytest.raises(DeviceError, match=f"^{message}$"):
        launch(module, shared=232448)


def test_the_stream_is_the_frameworks(module):
    launch(module)
    STREAMS[2, 0] = 5
    launch(module)
    launch(module, stream=17)
    launch(module, stream=0)
    assert [made["stream"] for made in module.runtime.launches] == [1000, 5, 17, 0]


def test_another_device_is_made_the_current_one_for_a_launch(module):
    launch(module, arrays(device=(2, 1)))
    (made,) = module.runtime.launches
    assert (made["device"], made["stream"]) == (1, 1001)
    switches = [call["device"] for call in module.runtime.calls if call["call"] == "cudaSetDevice"]
    assert switches[-2:] == [1, 0]


def test_load_brings_every_kernel(module):
    module.runtime.reset(devices=64)
    module.cuda.load(33)
    calls = [call["call"] for call in module.runtime.calls]
    assert calls.count("cudaFuncGetAttributes") == len(module.cuda.kernels())


REFUSED = {
    "has 4 arrays, needs 5": {"lent": arrays()[:4]},
    "has 8 sizes, needs 9": {"sizes": [0] * 8},
    "size 2147483648 is neither an int32 nor a float": {"sizes": [2**31] * SIZES},
    "size '1' is neither an int32 nor a float": {"sizes": ["1"] * SIZES},
    "array 1 is not on a CUDA device": {"lent": [arrays()[0], *arrays(device=(HOST, 0))[1:]]},
    "array 0 is not contiguous": {"lent": arrays(strides=(16, 1))},
    "array 2 is int, needs a CUDA array": {"lent": [None, None, 3, None, None]},
    "array 3 is on device 1, those before it are on 0": {
        "lent": [*arrays()[:3], *arrays(device=(2, 1))[3:]]
    },
    "shared_bytes is -1": {"shared": -1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused(module, message):
    with pytest.raises(ContractError) as refused:
        launch(module, **REFUSED[message])
    assert str(refused.value) == f"{NAME}: {message}"
    assert not module.runtime.launches


def test_threads_are_those_the_kernel_was_compiled_for(module):
    for threads in (0, 512):
        with pytest.raises(ContractError, match=rf"^{NAME}: has {threads} threads, needs 1 to 256"):
            module.cuda.launch(NAME, arrays(), [0] * SIZES, (1, 1, 1), threads, 0)
    with pytest.raises(KeyError, match="no CUDA kernel named hadamard<3>"):
        module.cuda.launch("hadamard<3>", [], [], (1, 1, 1), 1, 0)


def test_strides_of_one_element_do_not_matter(module):
    for shape, strides in (((1, 8), (99, 1)), ((0, 8), (1, 1)), ((), ())):
        launch(module, [Array(ADDRESS, shape, strides), *arrays()[1:]])
    assert len(module.runtime.launches) == 3


MACHINES = {
    "there is no NVIDIA driver on this machine": {"driver": 0},
    "the NVIDIA driver runs CUDA up to 12.4, this build needs 13.0: install a newer driver, or "
    "build hadamoe with CUDA 12": {"driver": 12040},
    "the NVIDIA driver (CUDA 13.0) sees no CUDA device": {"devices": 0},
}


@pytest.mark.parametrize("message", MACHINES)
def test_no_device_says_why(module, message):
    module.runtime.reset(**MACHINES[message])
    for ask in (lambda: launch(module), module.cuda.devices, lambda: module.cuda.device(0)):
        with pytest.raises(DeviceError) as refused:
            ask()
        assert str(refused.value) == f"CUDA: {message}"


def test_a_launch_that_fails_says_what_it_was(module):
    module.runtime.reset(launch_error=9)
    with pytest.raises(DeviceError) as refused:
        launch(module, shared=100)
    what = "3 x 2 x 1 groups of 256 threads, 100 bytes of shared memory"
    assert str(refused.value) == f"{NAME}: {what}: what went wrong (cudaErrorSome)"
    assert module.runtime.calls[-1]["call"] == "cudaGetLastError", "the next launch would report it"
    launch(module)


def test_no_code_for_the_device(module):
    module.runtime.reset(major=7, attributes_error=209, devices=9)
    with pytest.raises(DeviceError) as refused:
        module.cuda.load(8)
    have = f"device 8 has compute capability 7.0, this build has code for {ARCHITECTURE}-real"
    assert str(refused.value) == f"{module.cuda.kernels()[0]}: {have}"


def test_facts_of_a_device(module):
    assert module.cuda.devices() == ["Fake 0", "Fake 1"]
    assert module.cuda.device(1) == {
        "name": "Fake 1", "capability": (9, 0), "multiprocessors": 132,
        "memory": 141 << 20, "memory_free": 100 << 20, "l2_bytes": 50 << 20,
        "shared_bytes": 232448, "driver": (13, 0), "runtime": (13, 0),
    }  # fmt: skip
    with pytest.raises(DeviceError, match=r"^CUDA device 2: there are 2 devices$"):
        module.cuda.device(2)
