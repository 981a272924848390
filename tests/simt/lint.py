"""Rules of the Metal Shading Language that clang does not enforce."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import toolchain
from .msl import LANGUAGE, MLX_PREAMBLE, SOURCE_NAME, mlx_include, preprocess, translation_unit
from .rewrite import THREAD_METHOD, rewrite
from .session import MAX_BUFFERS
from .tokens import tokenize
from .unit import Unit

WORDS = {
    "double": "Metal has no double",
    "goto": "Metal has no goto",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no type information at run time",
    "typeid": "Metal has no type information at run time",
    "new": "Metal has no operator new",
    "thread_local": "Metal has no thread_local",
    "std": "Metal has no C++ standard library",
    "asm": "Metal has no inline assembly",
}
WARNINGS = ("-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized")


@dataclass(frozen=True)
class Issue:
    """A rule the source breaks. where: kernel.metal:line, or the name of what breaks it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def lint(source: str, name: str | None = None) -> list[Issue]:
    """What Metal would refuse, or what may differ there, in a source the simulator compiles.

    `source` is a whole Metal text, such as `Launch.source`; `name` its kernel, by default the last
    instance or kernel in it. MLX's types are known.
    """
    include = mlx_include()
    includes, preamble = ([include], MLX_PREAMBLE) if include else ([], "")
    text = preprocess(source, includes, (), preamble)
    unit = rewrite(text)
    issues = [Issue(SOURCE_NAME, message) for message in unit.lint]
    issues += word_rules(own_lines(text))
    issues += _buffer_rules(unit)
    names = [*unit.kernels, *unit.instances]
    whole, _ = translation_unit(unit, unit.instances.get(name or names[-1], name or names[-1]))
    whole = whole.replace(THREAD_METHOD, "__private ")
    errors = list(_compiler_rules(whole))
    issues += errors
    if not any("does not compile" in e.message for e in errors):
        issues += [*_pointer_rules(whole), *_call_rules(whole)]
    return list(dict.fromkeys(issues))


def own_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a preprocessed source that are the user's."""
    file, number = "", 0
    for line in text.splitlines():
        marker = re.match(r'#\s+(\d+)\s+"([^"]*)"', line)
        if marker:
            file, number = marker[2], int(marker[1]) - 1
            continue
        number += 1
        if file == SOURCE_NAME:
            yield number, line


def word_rules(lines: Iterable[tuple[int, str]], file: str = SOURCE_NAME) -> Iterator[Issue]:
    """The rules that need no compiler, for (number, text) of lines; comments are passed over."""
    for number, line in lines:
        where = f"{file}:{number}"
        for token in tokenize(line):
            if token in WORDS:
                yield Issue(where, WORDS[token])
            if re.fullmatch(r"(\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+", token):
                yield Issue(where, f"{token} has no suffix: write {token}f")
        if re.search(r"(?:^|[=(,{]|return)\s*\[[&=\w\s,]*\]\s*[({]", line):
            yield Issue(where, "Metal has no lambda expressions before version 4")


def _buffer_rules(unit: Unit) -> Iterator[Issue]:
    for kernel, params in unit.kernels.items():
        given = [p.argument for p in params if p.attribute == "buffer"]
        for index in sorted({g for g in given if given.count(g) > 1}):
            yield Issue(kernel, f"two parameters are buffer({index})")
        number = sum(p.is_buffer for p in params)
        if number > MAX_BUFFERS or any(int(g) >= MAX_BUFFERS for g in given if g.isdigit()):
            yield Issue(kernel, f"{number} buffers; Metal allows {MAX_BUFFERS}, numbered from 0")


def _clang(text: str, *flags: str) -> str:
    """What clang says about `text`."""
    command = [*(toolchain.clang() or ()), *LANGUAGE, *flags, "-"]
    done = toolchain.run(command, text)
    return done.stderr + done.stdout


def _compiler_rules(text: str) -> Iterator[Issue]:
    flags = ("-fsyntax-only", *WARNINGS)
    for line in _clang(text, *flags).splitlines():
        found = re.match(rf"({re.escape(SOURCE_NAME)}:\d+):\d+: (\w+(?: \w+)?): (.*)", line)
        if not found:
            continue
        where, kind, message = found.groups()
        if "error" in kind:
            yield Issue(where, "does not compile: " + message)
        elif "implicit conversion" in message and re.search(r"to '[^']*(bfloat|__bf16)", message):
            yield Issue(where, "Metal does not convert implicitly to bfloat: " + message)
        elif "uninitialized" in message and kind == "warning":
            yield Issue(where, message)


def _pointer_rules(text: str) -> Iterator[Issue]:
    """Pointers declared without device, threadgroup, constant or thread."""
    file, number = "", ""
    for line in _clang(text, "-fsyntax-only", "-w", "-Xclang", "-ast-dump").splitlines():
        for place in re.findall(r"<([^<>]*)>", line)[:1]:
            for part in place.split(", "):
                found = re.fullmatch(r"(?:line|(.+)):(\d+):\d+", part)
                if found:
                    file, number = found[1] or file, found[2]
        declared = re.search(r"\b(?:Parm)?VarDecl\b.*?(\w+) '([^']*)'", line)
        if declared and file == SOURCE_NAME and re.search(r"__generic [\w<> ,]*\*", declared[2]):
            message = f"pointer {declared[1]} has no address space"
            yield Issue(f"{SOURCE_NAME}:{number}", message)


def _call_rules(text: str) -> Iterator[Issue]:
    """Recursion, and calls through a pointer."""
    calls: dict[str, set[str]] = {}
    function = None
    for line in _clang(text, "-w", "-O0", "-S", "-emit-llvm", "-o", "-").splitlines():
        begun = re.match(r"define .*?@([\w.$]+)\(", line)
        if begun:
            function = begun[1]
            calls[function] = set()
        elif line.startswith("}"):
            function = None
        called = re.search(r"\bcall [^@%]*?([@%])([\w.$]+)\(", line)
        if not function or not called:
            continue
        if called[1] == "@":
            calls[function].add(called[2])
        elif "metal" not in function and "simt" not in function:
            yield Issue(function, "calls through a pointer")
    cycle = _cycle(calls)
    if cycle:
        yield Issue(cycle[0], "recursion: " + " -> ".join(cycle))


def _cycle(calls: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()
    path: list[str] = []

    def visit(function: str) -> list[str]:
        if function in path:
            return path[path.index(function) :]
        if function in done:
            return []
        done.add(function)
        path.append(function)
        for other in sorted(calls.get(function, ())):
            found = visit(other)
            if found:
                return found
        path.pop()
        return []

    return visit("simt_body")
