"""CUDA source to C++: what no header can do.

Shared variables become references into the engine's arena, asm statements become calls of the PTX
interpreter. Everything else (keywords, types, intrinsics) is include/cuda. A macro's body is left
as it is: neither belongs in one.
"""

from __future__ import annotations

import re
from pathlib import Path

from .tokens import Tokens, is_blank, split_commas
from .toolchain import CompileError

_QUOTED = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.M)
_ALIGNMENT = re.compile(r"__align__\s*\([^)]*\)|alignas\s*\([^)]*\)")
_DECLARATOR = re.compile(r"\s*(.*?)(\w+)\s*((?:\[[^;]*\])*)\s*$", re.S)
_ASM_OPERAND = re.compile(r'\s*("[^"]*")\s*\((.*)\)\s*$', re.S)
_VOLATILE = ("volatile", "__volatile__")


def with_includes(text: str, name: str, folders: list[Path]) -> str:
    """``text`` with every #include "file" that lies in ``folders`` put in its place, once."""
    done: set[Path] = set()

    def one(text: str, name: str) -> str:
        def included(match: re.Match) -> str:
            path = next((f / match[1] for f in folders if (f / match[1]).is_file()), None)
            if path is None:
                return match[0]  # one of include/cuda, or the compiler says so
            line = text.count("\n", 0, match.start()) + 2
            body = "" if path in done else one(path.read_text(), path.name)
            done.add(path)
            return f'{body}\n#line {line} "{name}"'

        return f'#line 1 "{name}"\n' + _QUOTED.sub(included, text)

    return one(text, name)


def rewrite(text: str) -> str:
    """C++ that means here what the CUDA source means there, line for line."""
    tokens, out, i, shared = Tokens(text), [], 0, 0
    while i < len(tokens):
        token = tokens[i]
        if token == "extern" and tokens[tokens.after(i)] == "__shared__":
            end = tokens.until(i, ";")
            out.append(dynamic_shared(tokens.text(tokens.after(i) + 1, end)))
            i = end + 1
        elif token == "__shared__":
            end = tokens.until(i, ";")
            variables = static_shared(tokens.text(i + 1, end), shared)
            shared += len(variables)
            out.append(" ".join(variables) + "\n" * tokens.text(i, end).count("\n"))
            i = end + 1
        elif token in ("asm", "__asm__"):
            statement, end = assembly(tokens, i)
            lost = tokens.text(i, end).count("\n") - statement.count("\n")
            out.append(statement + "\n" * lost)
            i = end
        else:
            out.append(token)
            i += 1
    return "".join(out)


def declaration(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The type of a declaration, and its variables: name and [dimensions]."""
    first, *others = ("".join(part) for part in split_commas(Tokens(_ALIGNMENT.sub("", text)).all))
    found = _DECLARATOR.match(first)
    if not found or "=" in text:
        raise CompileError(f"a shared variable is declared without initialiser: {text.strip()}")
    type, name, dimensions = found.groups()
    parts = [_DECLARATOR.match(other) for other in others]
    return type.strip(), [(name, dimensions), *((p[2], p[3]) for p in parts)]


def static_shared(text: str, number: int) -> list[str]:
    """`__shared__ T a[N], b;`: one variable per block, keyed by type and number."""
    type, variables = declaration(text)
    lines = []
    for key, (name, dimensions) in enumerate(variables, number):
        alias = f"simt_type{key}_{name}"
        lines.append(
            f"typedef {type} {alias}{dimensions}; "
            f'{alias}& {name} = simt::shared<{alias}, {key}>("{name}");'
        )
    return lines


def dynamic_shared(text: str) -> str:
    """`extern __shared__ T a[];`: the bytes the launch asks for."""
    type, ((name, _),) = declaration(text)
    return f"{type}* {name} = ({type}*)simt::simt_dyn_shared(0);"


def assembly(tokens: Tokens, i: int) -> tuple[str, int]:
    """`asm volatile("text" : outputs : inputs : clobbers)` as a call, and the index after it."""
    start = tokens.after(i)
    if tokens[start] in _VOLATILE:
        start = tokens.after(start)
    if tokens[start] != "(":
        return tokens.text(i, start), start
    end = tokens.close(start)
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens[start + 1 : end]:
        depth += (token in ("(", "[", "{")) - (token in (")", "]", "}"))
        if depth == 0 and token in (":", "::"):
            parts += [[] for _ in token]
        else:
            parts[-1].append(token)
    outputs, inputs = [*parts, [], []][1:3]
    operands = [operand_list(p, n) for p, n in ((outputs, "output"), (inputs, "input"))]
    return f"simt_cuda::ptx({''.join(parts[0]).strip()}, {', '.join(operands)})", end + 1


def operand_list(tokens: list[str], kind: str) -> str:
    """`"=r"(x), "l"(p)` as a braced list of calls."""
    calls = []
    for part in split_commas([t for t in tokens if not is_blank(t) or t.isspace()]):
        found = _ASM_OPERAND.match("".join(part))
        if not found:
            raise CompileError(f"an asm operand is not understood: {''.join(part).strip()}")
        calls.append(f"simt_cuda::ptx_{kind}({found[1]}, {found[2]})")
    return "{" + ", ".join(calls) + "}"
