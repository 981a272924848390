"""Apple-compiled kernels on the engine: what the Metal shim is compared with.

A .metallib holds AIR, which is LLVM bitcode for Apple's GPUs. clang reads and prints it; here its
text gets a target this machine has, the values of its function constants, bodies for the matrix
intrinsics and an entry the engine can call. `engine/air_rt.cpp` has the other intrinsics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Numbered as simt_air_builtin (engine/air_rt.cpp) numbers them.
BUILTINS = (
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "threads_per_simdgroup",
)


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel: a buffer, or a builtin input such as thread_position_in_grid."""

    name: str
    kind: str
    type: str  # LLVM's
    index: int  # [[buffer(index)]], or -1
    writable: bool


# ---------------------------------------------------------------- reading


def arguments(module: str, kernel: str) -> list[Argument]:
    """The parameters of ``kernel``, from its definition and from the metadata !air.kernel."""
    nodes = dict(re.findall(r"^(!\d+) = (?:distinct )?(!\{.*\})$", module, re.M))
    (root,) = re.findall(r"^!air\.kernel = !\{(!\d+)\}", module, re.M)
    _, inputs = re.findall(r"!\d+", nodes[root])[:2]
    facts = [nodes[node] for node in re.findall(r"!\d+", nodes[inputs])]
    types = parameter_types(module, kernel)
    if len(types) != len(facts):
        raise ValueError(f"{kernel}: {len(types)} parameters, {len(facts)} described")
    return [argument(fact, type) for fact, type in zip(facts, types, strict=True)]


def argument(fact: str, type: str) -> Argument:
    """One parameter from its metadata node."""
    words = re.findall(r'!"air\.(\w+)"', fact)
    kind = next(word for word in words if word != "function_constant")
    name = re.search(r'!"air\.arg_name", !"([^"]*)"', fact)
    index = re.search(r'!"air\.location_index", i32 (\d+)', fact)
    if kind != "buffer" and kind not in BUILTINS:
        raise NotImplementedError(f"parameter of kind {kind}")
    return Argument(
        name.group(1) if name else kind,
        kind,
        type,
        int(index.group(1)) if kind == "buffer" else -1,
        "read" not in words,
    )


def parameter_types(module: str, kernel: str) -> list[str]:
    """The LLVM types of a function's parameters."""
    start = re.search(rf'^define [^@\n]*@"?{re.escape(kernel)}"?\(', module, re.M)
    if not start:
        raise KeyError(kernel)
    depth, at, pieces = 1, start.end(), [""]
    while depth:
        letter = module[at]
        depth += (letter in "(<[{") - (letter in ")>]}")
        if letter == "," and depth == 1:
            pieces.append("")
        elif depth:
            pieces[-1] += letter
        at += 1
    return [re.match(r"\s*(ptr addrspace\(\d\)|<\d+ x \w+>|\w+)", p).group(1) for p in pieces]


# ---------------------------------------------------------------- rewriting


def lower(module: str, kernel: str, constants: dict[int, int]) -> str:
    """The module for this machine, its entry `simt_body` included."""
    text = re.sub(r"^target (triple|datalayout) .*\n", "", module, flags=re.M)
    text = re.sub(r"^!llvm\.module\.flags = .*\n", "", text, flags=re.M)
    text = re.sub(r"^@llvm\.compiler\.used = .*\n", "", text, flags=re.M)
    text = re.sub(r"^@llvm\.global_ctors = .*\[0 x .*\n", "", text, flags=re.M)
    text = re.sub(r"^(?:attributes|define|declare) .*", plain_attributes, text, flags=re.M)
    text = set_constants(text, constants)
    # Threadgroup variables: a definition needs a value here, and no linker may see the name.
    text = re.sub(
        r"^(@\S+ = internal )(?:unnamed_addr )?(addrspace\(3\) )global (.*?) undef",
        r"\1\2global \3 zeroinitializer",
        text,
        flags=re.M,
    )
    text, bodies = matrix_bodies(text)
    return text + bodies + entry(kernel, arguments(module, kernel))


def plain_attributes(line: re.Match) -> str:
    """A line of LLVM IR without the attributes only Apple's back end knows."""
    return re.sub(r'"(air-[\w-]+|target-cpu|frame-pointer)"(="[^"]*")?', "", line.group())


def set_constants(text: str, constants: dict[int, int]) -> str:
    """[[function_constant(n)]] values, 0 unless given. KeyError for one the kernel has not."""
    left = set(constants)

    def defined(match: re.Match) -> str:
        name, number, type = match.groups()
        left.discard(int(number))
        value = int(constants.get(int(number), 0))
        return f"{name} = internal addrspace(2) constant {type} {value}, align"

    pattern = r"^(@\S*MTL_FC_INIT_(\d+)_\w+) = .*?constant (i\d+) undef.*?, align"
    text = re.sub(pattern, defined, text, flags=re.M)
    if left:
        raise KeyError(f"function constants {sorted(left)}")
    return text


def entry(kernel: str, arguments: list[Argument]) -> str:
    """`simt_body(ctx)`: calls the kernel with buffer addresses from ctx and builtin inputs."""
    lines, passed = [], []
    for i, a in enumerate(arguments):
        lines += load_buffer(i, a.type) if a.kind == "buffer" else load_builtin(i, a)
        passed.append(f"{a.type} %a{i}")
    return "\n".join(
        [
            "",
            "declare i32 @simt_air_builtin(i32, i32)",
            "define void @simt_body(ptr %ctx) {",
            *("  " + line for line in lines),
            f'  call void @"{kernel}"({", ".join(passed)})',
            "  ret void",
            "}",
            "",
        ]
    )


def load_buffer(i: int, type: str) -> list[str]:
    """Lines that set %a<i> to the i-th address."""
    return [
        f"%p{i} = getelementptr i64, ptr %ctx, i64 {i}",
        f"%v{i} = load i64, ptr %p{i}",
        f"%a{i} = inttoptr i64 %v{i} to {type}",
    ]


def load_builtin(i: int, a: Argument) -> list[str]:
    """Lines that set %a<i> to a builtin input, of a scalar or vector integer type."""
    vector = re.fullmatch(r"<(\d+) x (\w+)>", a.type)
    count, element = (int(vector.group(1)), vector.group(2)) if vector else (1, a.type)
    cast = "add i32 0, {}" if element == "i32" else f"trunc i32 {{}} to {element}"
    which, lines, whole = BUILTINS.index(a.kind), [], "poison"
    for c in range(count):
        lines.append(f"%c{i}.{c} = call i32 @simt_air_builtin(i32 {which}, i32 {c})")
        result = f"%t{i}.{c}" if vector else f"%a{i}"
        lines.append(f"{result} = " + cast.format(f"%c{i}.{c}"))
        if vector:
            name = f"%a{i}" if c == count - 1 else f"%w{i}.{c}"
            lines.append(f"{name} = insertelement {a.type} {whole}, {element} {result}, i32 {c}")
            whole = name
    return lines


# ---------------------------------------------------------------- matrix intrinsics

# A lane's two elements are the first two of AIR's <64 x T>; the other 62 are never looked at.
ELEMENT = {"f32": "float", "f16": "half", "bf16": "bfloat"}
PAIR = "<2 x i32> <i32 0, i32 1>"
WHOLE = "<64 x i32> <i32 0, i32 1" + ", i32 poison" * 62 + ">"


def matrix_bodies(text: str) -> tuple[str, str]:
    """``text`` without its declarations of simdgroup_matrix intrinsics, and their definitions."""
    makers = {
        r"multiply_accumulate\.v64(\w+)\.v64(\w+)\.v64(\w+)\.v64(\w+)": multiply_body,
        r"load\.v64(\w+)\.p(\d)\w+": load_body,
        r"store\.v64(\w+)\.p(\d)\w+": store_body,
        r"init_filled\.v64(\w+)\.\w+": fill_body,
    }
    bodies = [
        "declare void @simt_air_multiply(ptr)",
        "declare i64 @simt_air_element(i64, i64, i64, i1, i32)",
    ]
    for pattern, body in makers.items():
        declaration = rf"^declare .*@(air\.simdgroup_matrix_8x8_{pattern})\(.*\n"
        for found in re.finditer(declaration, text, re.M):
            bodies.append(body(*found.groups()))
        text = re.sub(declaration, "", text, flags=re.M)
    return text, "\n".join(bodies)


def store_pair(source: str, type: str, at: int) -> list[str]:
    """Lines that put the pair of matrix %<source> into slots at, at + 1 of %m, as f32."""
    lines = [f"%{source}2 = shufflevector <64 x {type}> %{source}, <64 x {type}> poison, {PAIR}"]
    value = f"%{source}2"
    if type != "float":
        lines.append(f"%{source}f = fpext <2 x {type}> {value} to <2 x float>")
        value = f"%{source}f"
    lines.append(f"%{source}p = getelementptr float, ptr %m, i32 {at}")
    lines.append(f"store <2 x float> {value}, ptr %{source}p, align 4")
    return lines


def function(head: str, lines: list[str]) -> str:
    """One inlined function; clang keeps no 256-byte value in registers across a call."""
    return "\n".join([f"define {head} alwaysinline {{", *("  " + x for x in lines), "}"])


def multiply_body(name: str, d: str, a: str, b: str, c: str) -> str:
    """D = A * B + C through the engine, which sees all lanes' elements."""
    d, a, b, c = (ELEMENT[x] for x in (d, a, b, c))
    lines = ["%m = alloca [8 x float]"]
    for slot, (source, type) in enumerate(zip("abc", (a, b, c), strict=True)):
        lines += store_pair(source, type, 2 * slot)
    lines += [
        "call void @simt_air_multiply(ptr %m)",
        "%dp = getelementptr float, ptr %m, i32 6",
        "%df = load <2 x float>, ptr %dp, align 4",
    ]
    pair = "%df"
    if d != "float":
        lines.append(f"%d2 = fptrunc <2 x float> %df to <2 x {d}>")
        pair = "%d2"
    lines.append(f"%d = shufflevector <2 x {d}> {pair}, <2 x {d}> poison, {WHOLE}")
    lines.append(f"ret <64 x {d}> %d")
    head = f"<64 x {d}> @{name}(<64 x {a}> %a, <64 x {b}> %b, <64 x {c}> %c)"
    return function(head, lines)


def addresses(type: str, space: str) -> list[str]:
    """Lines that set %g0 and %g1 to the places of this lane's elements."""
    lines = [f"%{n} = extractelement <2 x i64> %o, i32 {i}" for i, n in enumerate("xy")]
    for i in range(2):
        parameters = f"i64 %stride, i64 %x, i64 %y, i1 %transposed, i32 {i}"
        lines.append(f"%at{i} = call i64 @simt_air_element({parameters})")
        lines.append(f"%g{i} = getelementptr {type}, ptr addrspace({space}) %p, i64 %at{i}")
    return lines


def load_body(name: str, element: str, space: str) -> str:
    """A matrix from memory."""
    type, pointer = ELEMENT[element], f"ptr addrspace({space})"
    lines = addresses(type, space)
    lines += [
        f"%e0 = load {type}, {pointer} %g0",
        f"%e1 = load {type}, {pointer} %g1",
        f"%r0 = insertelement <64 x {type}> poison, {type} %e0, i32 0",
        f"%r1 = insertelement <64 x {type}> %r0, {type} %e1, i32 1",
        f"ret <64 x {type}> %r1",
    ]
    head = f"<64 x {type}> @{name}({pointer} %p, i64 %stride, <2 x i64> %o, i1 %transposed)"
    return function(head, lines)


def store_body(name: str, element: str, space: str) -> str:
    """A matrix to memory."""
    type, pointer = ELEMENT[element], f"ptr addrspace({space})"
    lines = addresses(type, space)
    for i in range(2):
        lines.append(f"%e{i} = extractelement <64 x {type}> %v, i32 {i}")
        lines.append(f"store {type} %e{i}, {pointer} %g{i}")
    lines.append("ret void")
    parameters = f"<64 x {type}> %v, {pointer} %p, i64 %stride, <2 x i64> %o, i1 %transposed"
    return function(f"void @{name}({parameters})", lines)


def fill_body(name: str, element: str) -> str:
    """A matrix of one number."""
    type = ELEMENT[element]
    lines = [
        f"%r0 = insertelement <64 x {type}> poison, {type} %v, i32 0",
        f"%r1 = insertelement <64 x {type}> %r0, {type} %v, i32 1",
        f"ret <64 x {type}> %r1",
    ]
    return function(f"<64 x {type}> @{name}({type} %v)", lines)
