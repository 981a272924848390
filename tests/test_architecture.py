"""The rules of DESIGN.md that no compiler checks: layers, stems, sizes, names, documentation."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "hadamoe"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    p
    for d in ("core", "cpu", "bind")
    for p in (ROOT / "csrc" / d).glob("*")
    if p.suffix in (".h", ".cpp")
)
TEXT = sorted(
    p
    for d in ("python", "csrc", "tests", "bench", "examples", ".ci")
    for p in (ROOT / d).rglob("*")
    if p.is_file() and p.suffix in (".py", ".pyi", ".h", ".cpp", ".md", ".toml", "")
)
CODE = sorted(
    p
    for d in ("python", "csrc", "cuda", "metal", "tests", "bench", "examples", ".ci")
    for p in (ROOT / d).rglob("*")
    if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".metal") and not p.is_symlink()
)
FRAMEWORKS = {"torch": "torch_", "transformers": "torch_", "mlx": "mlx_", "mlx_lm": "mlx_"}

# Lowest layer first. A module imports from lower rows (or its own row, where marked with itself).
LAYERS = [
    {"errors", "bf16"},
    {"weight", "constants", "strict_json"},
    {"checkpoint"},
    {"formats"},
    {"_cpu", "_cuda", "_mlx_built", "reference"},
    {"packed", "resident", "machine", "kv", "gpu_plan"},
    {
        "roles",
        "torch_cache",
        "reference_kv_peers",
        "gpu_weight",
        "metal_plan",
        "cuda_plan",
        "gpu_kv",
    },
    {"cuda_tiles"},
    {"metal_products", "cuda_products"},
    {
        "reference_kv",
        "kv_ops",
        "metal_moe",
        "metal_delta",
        "metal_kv",
        "cuda_moe",
        "cuda_delta",
        "cuda_kv",
    },
    {"gpu_calls"},
    {"torch_operators"},
    {"torch_gpu"},
    {"torch_mps", "torch_cuda"},
    {"mlx_metal", "mlx_cuda"},
    {"mlx_gpu"},
    {"mlx_gpu_products", "mlx_gpu_delta", "mlx_gpu_moe", "mlx_gpu_kv"},
    {"mlx_host"},
    {"ops", "torch_ops", "mlx_ops", "kv_pool", "kv_file"},
    {"mlx", "mlx_kv"},
    {"kv_cache", "mlx_pages"},
    {"kv_prefix", "torch_kv", "mlx_cache"},
    {"torch_cuda_kv"},
    {"torch_layers", "mlx_layers", "mlx_static", "verify", "inspect", "synth"},
    {"torch_blocks", "mlx_blocks", "torch_cuda_blocks"},
    {"torch_decode"},
    {"torch_cuda_decode"},
    {"torch_cuda_cache"},
    {"torch_cuda_model"},
    {"torch_model", "mlx_model"},
    {"torch_run", "import_hook"},
    {"transformers_hook", "mlx_lm_hook"},
    {"mlx_lm"},
    {"profile", "terminal", "cli_options"},
    {"bench", "torch_bench"},
    {"cli_bench"},
    {"cli"},
    {"__init__", "__main__"},
]
# ops picks a front end by the type of its arguments; each hands back to the same calls.
MUTUAL = {("ops", "torch_ops"), ("ops", "mlx_ops"), ("torch_ops", "ops"), ("mlx_ops", "ops")}


def stem_of(path: Path) -> str:
    """The layer name of a module: its file name, or the folder it is in."""
    return path.parent.name if path.parent != PACKAGE else path.stem


def rank(stem: str) -> int:
    ranks = [i for i, row in enumerate(LAYERS) if stem in row]
    assert ranks, f"{stem} is in no layer: add it to LAYERS in {Path(__file__).name}"
    return ranks[0]


def imports(path: Path) -> set[tuple[str, str]]:
    """(kind, name) of every import: ("own", sibling module) or ("other", top-level package)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {("other", a.name.split(".")[0]) for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(("other", (node.module or "").split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            home = path.parent if node.level == 1 else path.parent.parent
            names = [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
            for name in names:
                found.add(("own", home.name if home != PACKAGE else name))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_layers(path):
    me = stem_of(path)
    for kind, name in sorted(imports(path)):
        if kind == "own" and name != me and (me, name) not in MUTUAL:
            known = (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()
            if not known and name not in ("_cpu", "_cuda"):
                continue  # a name defined in __init__
            assert rank(name) < rank(me), f"{me} imports {name}, which is not below it"
        if kind == "other":
            assert name != "tests", f"{me} imports tests"
            prefix = FRAMEWORKS.get(name)
            assert prefix is None or path.name.startswith(prefix) or me == name, (
                f"{me} imports {name}: only {prefix}*.py may"
            )


def test_import_pulls_no_framework():
    names = sorted(FRAMEWORKS)
    code = f"import sys, hadamoe; print([m for m in {names} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", "import hadamoe imported a framework"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_include_directions(path):
    allowed = {
        "core": {"core"},
        "cpu": {"core", "cpu"},
        "bind": {"core", "cpu", "bind", "cuda"},
    }[path.parent.name]
    for name in re.findall(r'#include "([^"]+)"(?!.*made by CMake)', path.read_text()):
        target = (path.parent / name).resolve()
        if not target.exists():
            target = next(
                (
                    ROOT / "csrc" / d / Path(name).name
                    for d in ("core", "cpu", "bind")
                    if (ROOT / "csrc" / d / Path(name).name).exists()
                ),
                target,
            )
        assert target.exists(), f"{path.name} includes {name}, which does not exist"
        assert target.parent.name in allowed, f"{path.parent.name}/{path.name} includes {name}"


def leaf_headers() -> list[Path]:
    """ISA files and every header of ours they reach."""
    seen: list[Path] = []
    todo = sorted((ROOT / "csrc" / "cpu").glob("isa_*.cpp"))
    while todo:
        path = todo.pop()
        if path in seen or not path.exists():
            continue
        seen.append(path)
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            here = (path.parent / name).resolve()
            todo.append(here if here.exists() else ROOT / "csrc" / "core" / Path(name).name)
    return seen


def test_isa_files_include_no_cpp_headers():
    """A library's inline function compiled with AVX-512 could be the copy the linker keeps."""
    allowed = re.compile(
        r"(std(int|def|arg)|string|math|float)\.h|(imm|arm_neon|x86)\w*\.h|arm_neon\.h"
    )
    for path in leaf_headers():
        for name in re.findall(r"#include <([^>]+)>", path.read_text()):
            assert allowed.fullmatch(name), f"{path.name} includes <{name}>"


@pytest.mark.parametrize("isa", sorted(p.stem for p in (ROOT / "csrc" / "cpu").glob("isa_*.cpp")))
def test_isa_objects_have_no_weak_symbols(isa, tmp_path):
    from native import build

    if isa == "isa_neon" and not build.available("aarch64"):
        pytest.skip(build.missing("aarch64"))
    obj = build.compile_one(
        ROOT / "csrc" / "cpu" / f"{isa}.cpp", "aarch64" if isa == "isa_neon" else "native"
    )
    nm = shutil.which("nm") or pytest.skip("nm is not installed (Debian: binutils)")
    lines = subprocess.run(
        [nm, "-C", str(obj)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weak = [line for line in lines if re.match(r"\S*\s+[WVuw] ", line)]
    assert not weak, f"{isa} has weak symbols, a linker may keep them for every CPU:\n" + "\n".join(
        weak
    )


def test_stems_are_equal_everywhere():
    cpu = ROOT / "csrc" / "cpu"
    table = (cpu / "ops.cpp").read_text()
    stems = set(re.findall(r'\{"(\w+)", hm::op_\w+\}', table))
    stems |= set(re.findall(r"hm::(\w+)_op\b", table))
    stems -= {"read_bytes"}  # measures memory, computes nothing
    kernels = {"hadamard", "dequantize", "qmatmul", "moe_decode", "attention", "gated_delta"}
    blocks = {"moe_block", "attention_block", "gated_delta_block"}
    fused = blocks | {"qmatmul_top"}  # of kernels that have files
    paged = {"kv_encode", "kv_decode", "kv_scores", "kv_attend", "kv_attention_block"}
    assert stems == kernels | fused | paged
    for stem in paged:  # kv_encode.h has the codecs both ways, kv_attend.h all that reads pages
        assert f"\ndef {stem}(" in (PACKAGE / "kv_ops.py").read_text(), f"kv_ops.{stem} is missing"
        assert stem in "".join(p.read_text() for p in (ROOT / "tests" / "kv").glob("*.py"))
    stems -= paged
    kernels |= {"kv_encode", "kv_attend"}
    tests = ROOT / "tests" / "ops"
    assert all(stem in (tests / "test_blocks.py").read_text() for stem in blocks)
    for stem in stems - blocks:
        assert (tests / f"test_{stem}.py").exists(), f"no tests/ops/test_{stem}.py"
    for stem in kernels:
        for name in (f"{stem}.h", f"{stem}.cpp"):
            assert (cpu / name).exists(), f"no csrc/cpu/{name}"
    for stem in stems:
        assert f"\ndef {stem}(" in (PACKAGE / "ops.py").read_text(), f"ops.{stem} is missing"
        assert f"\ndef {stem}(" in (PACKAGE / "reference.py").read_text(), (
            f"reference.{stem} is missing"
        )
    for backend in ("metal", "cuda"):
        folder = ROOT / "csrc" / backend
        if folder.exists():
            for stem in kernels:
                assert list(folder.glob(f"{stem}.*")), f"{backend} has no {stem}"


def test_files_stay_small():
    lengths = {p.relative_to(ROOT): p.read_text().count("\n") for p in CODE}
    assert {p: lines for p, lines in lengths.items() if lines > 400} == {}, "the limit is 400 lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_functions_stay_small_and_documented(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 80, f"{node.name} has {lines} lines, the limit is 80"
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_cpp_functions_stay_small(path):
    """A body is what lies between a line that ends in ') {' (or similar) and its closing brace."""
    start = indent = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if start is None:
            m = re.match(r"( *)[\w:<>~&*,\[\] ]+\(.*\)( const| noexcept| override)* \{$", line)
            if m and not re.match(r" *(if|for|while|switch|else|do|return)\b", line):
                start, indent = number, m.group(1)
        elif line.startswith(indent + "}"):
            assert number - start < 80, (
                f"{path.name}:{start} is a function of {number - start + 1} lines"
            )
            start = None


def test_no_machine_paths():
    for path in TEXT:
        if path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        m = re.search(r"(?<![\w.])/(home|root|work|Users|opt|mnt)/\w+", text)
        assert not m, f"{path.relative_to(ROOT)} names a path of one machine: {m.group(0)}"
        assert "shared/" not in text or path.suffix == ".md", (
            f"{path.relative_to(ROOT)} names shared/"
        )


def test_readme_support_table_is_generated():
    import readme_table

    table = readme_table.table()
    assert table in (ROOT / "README.md").read_text(), (
        f"README's support table should be:\n\n{table}"
    )


def test_type_stub_names_what_the_module_has():
    from hadamoe import _cpu

    stub = ast.parse((PACKAGE / "_cpu.pyi").read_text())
    named = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    named |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)}
    real = {n for n in dir(_cpu) if not n.startswith("_")}
    assert named == real, (
        f"_cpu.pyi lacks {sorted(real - named)}, has too many {sorted(named - real)}"
    )
    assert (PACKAGE / "py.typed").exists()
