"""Runners of the core without Python: one process per target, shared by the session."""

from __future__ import annotations

import shutil

import pytest

from . import build
from .backend import Runner, qemu

#: Name: build target, emulator prefix, instruction sets the runner must offer.
RUNNERS = {
    "sanitized": ("sanitized", [], None),
    "amx": ("amx", [], None),
    "neon": ("aarch64", build.emulator("aarch64"), ["generic", "neon"]),
    "m1": ("m1", build.emulator("m1"), ["generic", "neon"]),
    "nehalem": ("native", qemu("Nehalem"), ["generic"]),
    "haswell": ("native", qemu("Haswell"), ["generic", "avx2"]),
}


def start(name: str) -> Runner:
    """The runner of that name; skips, saying what to install, where it cannot exist."""
    target, emulator, isas = RUNNERS[name]
    if not build.available(target):
        pytest.skip(build.missing(target))
    if emulator and (not shutil.which(emulator[0]) or (target == "native" and not build.X86)):
        pytest.skip(f"{emulator[0]} is not installed or not for this machine (Debian: qemu-user)")
    runner = Runner(target, emulator)
    assert isas is None or runner.isas() == isas
    return runner


@pytest.fixture(scope="session", params=RUNNERS)
def runner(request):
    """Every runner in turn."""
    one = start(request.param)
    one.set_threads(2)
    yield one
    one.close()


@pytest.fixture(scope="session")
def racing():
    """A runner under ThreadSanitizer; its `close` fails where it found a race."""
    if not build.available("threads"):
        pytest.skip("ThreadSanitizer does not work here (Debian: libtsan2)")
    one = Runner("threads")
    yield one
    one.close()
