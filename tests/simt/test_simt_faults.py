"""Every kind of fault the checker knows, planted, beside a twin of the kernel without it."""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from simt import CompileError, metal

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))

HEAD = """
#include <metal_stdlib>
using namespace metal;
kernel void k(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
              constant uint& n [[buffer(2)]], device atomic_uint* counter [[buffer(3)]],
              uint i [[thread_position_in_grid]], uint l [[thread_position_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]]) {
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass
class Case:
    """kind: what is found in `body`; the clean twin has `good` where the body has `bad`."""

    kind: str
    body: str
    bad: str = ""
    good: str = ""


REVERSE = f"threadgroup float s[64]; s[l] = in[i]; {BARRIER} out[i] = s[63 - l];"
LOOP = f"""threadgroup float s[64]; float a = in[i];
for (int q = 0; q < 3; q++) {{ s[l] = a; {BARRIER} a += s[(l + 1) % 64]; /*here*/ }}
out[i] = a;"""
FAULTS = {
    "no barrier": Case("race", REVERSE.replace(BARRIER, "/*here*/"), "/*here*/", BARRIER),
    "a simdgroup's barrier between simdgroups": Case(
        "race",
        REVERSE.replace(BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "63 - l",
        "l ^ 31",
    ),
    "a simdgroup's barrier without memory": Case(
        "race",
        "threadgroup float s[64]; s[l] = in[i]; simdgroup_barrier(mem_flags::mem_none);"
        "out[i] = s[l ^ 31];",
        "mem_none",
        "mem_threadgroup",
    ),
    "a barrier without memory": Case(
        "race", REVERSE.replace("mem_threadgroup", "mem_none"), "mem_none", "mem_threadgroup"
    ),
    "a barrier for device memory": Case(
        "race", REVERSE.replace("mem_threadgroup", "mem_device"), "mem_device", "mem_threadgroup"
    ),
    "no barrier at the end of a loop": Case("race-write-read", LOOP, "/*here*/", BARRIER),
    "lanes that rely on lock-step": Case(
        "race",
        "threadgroup float s[64]; s[l] = in[i]; float a = simd_sum(in[i]); out[i] = s[l ^ 1] + a;",
        "float a",
        "simdgroup_barrier(mem_flags::mem_threadgroup); float a",
    ),
    "two threadgroups write one number": Case("race-write-write", "out[l] = in[i];", "[l]", "[i]"),
    "a threadgroup reads what another wrote": Case(
        "race", "out[i] = in[i]; out[i] += out[127 - i];", "out[127 - i]", "out[i]"
    ),
    "uninitialised threadgroup memory": Case(
        "uninitialised-read",
        f"threadgroup float s[64]; if (l < 32) s[l] = in[i]; {BARRIER} out[i] = s[l];",
        "if (l < 32) ",
        "",
    ),
    "reads an output nobody wrote": Case(
        "uninitialised-read", "out[i] = out[i] + 1.0f;", "= out[i]", "= in[i]"
    ),
    "reads past the end": Case("out-of-bounds", "out[i] = in[i + 1];", "i + 1", "i"),
    "reads before the start": Case("out-of-bounds", "out[i] = in[(int)i - 1];", "- 1", "- 0"),
    "writes past the end": Case("out-of-bounds", "out[i + 1] = in[i];", "i + 1", "i"),
    "between threadgroup variables": Case(
        "out-of-bounds",
        f"threadgroup float s[64]; threadgroup float t[64]; threadgroup float* p = s;"
        f"p[l + 1] = t[l] = in[i]; {BARRIER} out[i] = p[l + 1];",
        "l + 1",
        "l",
    ),
    "past a threadgroup array": Case(
        "array-bounds",
        f"threadgroup float s[64]; s[l + 1] = in[i]; {BARRIER} out[i] = s[l];",
        "l + 1",
        "l",
    ),
    "past a private array": Case(
        "array-bounds",
        "float a[4]; for (int q = 0; q <= 4; q++) a[q] = in[i]; out[i] = a[l & 3];",
        "<= 4",
        "< 4",
    ),
    "returns before a barrier": Case(
        "divergent-barrier", "if (l >= 40) return; " + REVERSE, "l >= 40", "n == 0"
    ),
    "two barriers for one": Case(
        "divergent-barrier",
        f"threadgroup float s[64]; s[l] = in[i];\nif (l < 32)\n{BARRIER}\nelse\n{BARRIER}\n"
        "out[i] = s[l];",
        "l < 32",
        "n < 32",
    ),
    "simd_sum of half the lanes": Case(
        "divergent-simd-op",
        "float v = in[i]; if (lane < 16) v = simd_sum(v); out[i] = v;",
        "16",
        "32",
    ),
    "a shuffle from a lane that is elsewhere": Case(
        "shuffle-inactive-lane",
        "float v = in[i]; if (lane < 16) v = simd_shuffle(v, 20); out[i] = v;",
        "16",
        "32",
    ),
    "a shuffle from no lane": Case(
        "shuffle-inactive-lane", "out[i] = simd_shuffle(in[i], 40);", "40", "4"
    ),
    "too much threadgroup memory": Case(
        "threadgroup-memory-limit",
        f"threadgroup float s[8193]; s[l] = in[i]; {BARRIER} out[i] = s[l];",
        "8193",
        "8192",
    ),
    "a misaligned vector": Case(
        "misaligned",
        "device const float4* p = (device const float4*)(in + 1); out[i] = i < 31 ? p[i].x : 0.0f;",
        "in + 1",
        "in + 0",
    ),
    "writes a const buffer": Case(
        "write-to-const",
        "((device float*)in)[i] = 1.0f; out[i] = 0.0f;",
        "(device float*)in",
        "out",
    ),
    "divides by zero": Case(
        "integer-division", "out[i] = float(7 / int(i - i * n / 128));", "i - i", "1 + i"
    ),
    "an atomic beside a plain write": Case(
        "race",
        "atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);\n"
        "device uint* c = (device uint*)counter; if (l == 1) c[0] = 0u; out[i] = in[i];",
        "l == 1",
        "n == 1",
    ),
    "a pointer to another thread's variable": Case(
        "private-escape",
        f"float v = in[i]; threadgroup ulong s[64]; s[l] = (ulong)&v; {BARRIER}"
        f"thread float* p = (thread float*)s[l ^ 1]; out[i] = *p; {BARRIER}",
        "l ^ 1",
        "l",
    ),
}


def run(body, grid=128, threadgroup=64, **options):
    kernel = metal.compile_kernel(HEAD + body + "\n}\n", "k", check=True)
    buffers = {0: np.arange(128, dtype=np.float32), 1: np.zeros(128, np.float32)}
    buffers |= {2: np.array([128], np.uint32), 3: np.zeros(1, np.uint32)}
    sizes = ((threadgroup, 1, 1), (grid, 1, 1))
    return kernel(buffers, *sizes, outputs={1}, **options)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_its_twin_is_clean(name):
    case = FAULTS[name]
    found = run(case.body).findings
    assert any(case.kind in f.kind for f in found), [str(f) for f in found]
    finding = next(f for f in found if case.kind in f.kind)
    assert re.fullmatch(r"kernel\.metal:(8|9|1\d)", finding.where), finding
    assert finding.code in HEAD + case.body
    assert case.bad in case.body
    clean = case.body.replace(case.bad, case.good)
    assert [str(f) for f in run(clean).findings] == []


def test_a_finding_names_its_thread_and_its_memory():
    past = run("out[i] = in[i + 1];").findings[0]
    assert (past.buffer, past.offset) == ("in", 512)
    assert (past.group, past.thread) == ((1, 0, 0), (63, 0, 0))
    assert (past.simdgroup, past.lane, past.count) == (1, 31, 1)
    text = str(past)
    for word in (
        "out-of-bounds",
        "kernel.metal:8",
        "in at byte 512",
        "lane 31",
        "out[i] = in[i + 1]",
    ):
        assert word in text
    race = run(FAULTS["no barrier"].body).findings
    assert {f.buffer for f in race} == {"s"}
    over = run(FAULTS["too much threadgroup memory"].body).findings[0]
    assert "32772 bytes" in over.message
    assert "limit is 32768" in over.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("thread float* p = (in); out[i] = *p;", "cannot initialize"),
        ("in[i] = 1.0f;", "read-only"),
        ("double d = in[i]; out[i] = d;", "double"),
        ("threadgroup float s[4]; device float* p = s; out[i] = p[0];", "cannot initialize"),
        ("out[i] = unknown(in[i]);", "undeclared identifier 'unknown'"),
        ("bfloat b = in[i]; out[i] = float(b);", "not in Metal: implicit conversion"),
        ("out[i] = max(in[i], 0);", "call to deleted function 'max'"),
        ("out[i] = clamp(in[i], 0, 1);", "call to deleted function 'clamp'"),
    ],
)
def test_what_metal_refuses_is_refused_with_its_line(body, message):
    with pytest.raises(CompileError, match=message) as refused:
        metal.compile_kernel(HEAD + body + "\n}\n", "k")
    assert f"8 | {body}" in str(refused.value)


def test_a_kernel_that_is_not_there():
    with pytest.raises(CompileError, match="no kernel other; it has: k"):
        metal.compile_kernel(HEAD + "}\n", "other")


def test_edge_groups_are_smaller():
    assert run("out[i] = in[i];", grid=100).findings == []


def test_the_limit_of_threadgroup_memory_can_be_lowered():
    body = FAULTS["too much threadgroup memory"].body.replace("8193", "4097")
    assert run(body).findings == []
    assert run(body, threadgroup_limit=16384).findings[0].kind == "threadgroup-memory-limit"


def test_without_the_checker_a_fault_is_a_finding_too():
    kernel = metal.compile_kernel(HEAD + "out[i] = in[i + n];\n}\n", "k")
    buffers = {0: np.zeros(128, np.float32), 1: np.zeros(128, np.float32)}
    buffers |= {2: np.array([4096], np.uint32), 3: np.zeros(1, np.uint32)}
    found = kernel(buffers, (64, 1, 1), (128, 1, 1)).findings
    assert [f.kind for f in found] == ["memory-fault"]
    assert (found[0].buffer, found[0].where) == ("in", "kernel.metal:8")


@pytest.mark.parametrize("check", [False, True])
def test_a_kernel_that_never_ends(check):
    body = "volatile device float* o = out; while (o[i] == 0.0f) o[i] = in[0]; out[i] = 2.0f;"
    kernel = metal.compile_kernel(HEAD + body + "\n}\n", "k", check=check)
    buffers = {0: np.zeros(128, np.float32), 1: np.zeros(128, np.float32)}
    buffers |= {2: np.zeros(1, np.uint32), 3: np.zeros(1, np.uint32)}
    found = kernel(buffers, (64, 1, 1), (128, 1, 1), seconds=1).findings
    assert [(f.kind, f.where) for f in found] == [("endless", "kernel.metal:8")]


@pytest.mark.parametrize("schedule", ["ascending", "descending", "random"])
def test_what_threads_do_first_shows_without_the_checker(schedule):
    """A missing barrier gives another answer than the right one, whatever runs first."""
    kernel = metal.compile_kernel(HEAD + LOOP + "\n}\n", "k")
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    rest = {2: np.array([128], np.uint32), 3: np.zeros(1, np.uint32)}
    kernel({0: x, 1: y, **rest}, (64, 1, 1), (128, 1, 1), schedule=schedule)
    right = x.reshape(2, 64)
    for _ in range(3):
        right = right + np.roll(right, -1, axis=1)
    assert not np.array_equal(y, right.reshape(-1))
