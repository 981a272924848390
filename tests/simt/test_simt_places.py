"""Findings and errors of generated texts lead to the file that the text was made from."""

import numpy as np
import pytest

from simt import CompileError, metal, places

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
FILES = {
    "first.metal": """// A file.
METAL_FUNC float twice(float number) {
  return number + number;  // exact
}
""",
    "second.metal": """#include "first.metal"
METAL_FUNC float thrice(float number) {
  const float sum = twice(number);
  return number + number;
}
METAL_FUNC float past(const device float* numbers) {
  return numbers[4];
}
""",
}
GENERATED = """#define A0 float
#define A1 number
METAL_FUNC A0 twice(A0 A1){
return A1+A1;
}
METAL_FUNC A0 thrice(A0 A1){
const A0 sum=twice(A1);
return A1+A1;
}
METAL_FUNC A0 past(const device A0* numbers){
return numbers[4];
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "metal"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(places.Origins.__init__, "__defaults__", (folder,))
    return folder


def test_lines_are_found_again(folder):
    origins = places.Origins(GENERATED)
    found = {n: str(origins.origin(n)) for n in range(1, 13)}
    assert found == {
        **{n: "None" for n in (1, 2, 5, 9, 12)},
        3: "metal/first.metal:2",
        4: "metal/first.metal:3",
        6: "metal/second.metal:2",
        7: "metal/second.metal:3",
        8: "metal/second.metal:4",  # this text stands in both files
        10: "metal/second.metal:6",
        11: "metal/second.metal:7",
    }
    assert origins.origin(7).text == "const float sum = twice(number);"


@pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))
def test_findings_and_errors_name_the_file(folder):
    body = "kernel void k(const device float* x, device float* y) { y[0] = past(x); }\n"
    kernel = metal.compile_kernel(HEAD + GENERATED + body, "k", check=True)
    x, y = np.zeros(4, np.float32), np.zeros(1, np.float32)
    finding = kernel({0: x, 1: y}, (1, 1, 1), (1, 1, 1)).findings[0]
    assert (finding.origin, finding.code) == ("metal/second.metal:7", "return numbers[4];")
    assert "metal/second.metal:7 (kernel.metal:13)" in str(finding)
    broken = GENERATED.replace("twice(A0 A1)", "two(A0 A1)")
    with pytest.raises(CompileError, match=r"metal/second\.metal:3 \| const float sum"):
        metal.compile_kernel(HEAD + broken + body, "k")
