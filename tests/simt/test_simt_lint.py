"""What Metal refuses and clang does not is found by `metal.lint`."""

import pytest

from simt import metal

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))

HEAD = """#include <metal_stdlib>
using namespace metal;
"""
KERNEL = """kernel void k(const device float* in [[buffer(0)]], device float* out [[buffer(1)]],
              constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
"""
RECURSIVE = """float f(float x, int d);
float f(float x, int d) { return d ? f(x * 2.0f, d - 1) : x; }
"""
BROKEN = {
    "recursion": ("out[i] = f(in[i], 3);", "recursion", RECURSIVE),
    "a pointer without address space": (
        "float a[2] = {in[i], 1.0f}; float* p = a; out[i] = p[0];",
        "pointer p has no address space",
    ),
    "float to bfloat": ("bfloat b = in[i]; out[i] = float(b);", "implicitly to bfloat"),
    "a literal without suffix": ("out[i] = in[i] * 0.5;", "write 0.5f"),
    "a maybe uninitialised variable": (
        "float v; if (n > 3u) v = in[i]; out[i] = v;",
        "uninitialized",
    ),
    "std": ("out[i] = std::max(in[i], 0.0f);", "no C++ standard library"),
    "an initialised threadgroup variable": (
        "threadgroup float s[2] = {0}; s[n & 1u] = in[i]; out[i] = s[0];",
        "threadgroup variable with an initialiser",
    ),
    "max of two types": ("out[i] = max(in[i], 0);", "call to deleted function 'max'"),
    "a lambda": ("auto f = [&](float x) { return x; }; out[i] = f(in[i]);", "lambda"),
    "goto": ("if (n) goto end; out[i] = in[i]; end: return;", "no goto"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules(name):
    body, message, *before = BROKEN[name]
    issues = metal.lint(HEAD + "".join(before) + KERNEL + body + "\n}\n")
    assert any(message in str(issue) for issue in issues), [str(i) for i in issues]


def test_a_sound_kernel_has_no_issue():
    assert metal.lint(HEAD + KERNEL + "out[i] = in[i] * 2.0f;\n}\n") == []


def test_buffers():
    two = KERNEL.replace("buffer(2)", "buffer(1)").replace("[[buffer(0)]]", "[[buffer(31)]]")
    issues = [str(i) for i in metal.lint(HEAD + two + "out[i] = in[i];\n}\n")]
    assert "k: two parameters are buffer(1)" in issues
    assert "k: 3 buffers; Metal allows 31, numbered from 0" in issues
