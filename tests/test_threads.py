"""Native threads: apart from the caller, and free to run where the process may."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_CODE = """
import os, time
import numpy as np
from hadamoe import ops

def stat(thread):
    with open(f"/proc/self/task/{thread}/stat") as f:
        return f.read().rpartition(")")[2].split()

def cpu_of(thread):
    return int(stat(thread)[36])

everywhere, me = os.sched_getaffinity(0), os.getpid()
os.sched_setaffinity(0, {min(everywhere)})
x = np.ones((512, 2048), np.float32)
ops.set_threads(2)
before = set(os.listdir("/proc/self/task"))
ops.hadamard(x)  # starts the worker where we are
(worker,) = set(os.listdir("/proc/self/task")) - before
os.sched_setaffinity(int(worker), everywhere)
apart, end = 0, time.time() + 20
while apart < 20 and time.time() < end:
    ops.hadamard(x)
    apart += cpu_of(worker) != cpu_of(me)
while stat(worker)[0] != "S" and time.time() < end:  # it may still be on its way elsewhere
    time.sleep(0.001)
print(apart, sorted(os.sched_getaffinity(int(worker))) == sorted(everywhere))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells")
def test_a_worker_leaves_the_callers_processor():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    run = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True)
    assert run.stdout == "20 True\n", run.stdout + run.stderr
