"""The Metal text MLX writes round the body given to `mx.fast.metal_kernel` (0.32.x)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}
#: Attributes MLX adds as parameters when their name occurs in the body, in its order.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
SMALL = 8  # an input with fewer elements lies in `constant` memory


@dataclass(frozen=True)
class KernelText:
    """A generated source and the name of its kernel; which shape parameters each input has."""

    name: str
    source: str
    shape_parameters: list[tuple[bool, bool, bool]]


def _template_value(value) -> str:
    if not isinstance(value, (bool, int)) and value not in TYPES:
        raise ValueError(
            "[metal_kernel] Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`."
        )
    return str(int(value)) if isinstance(value, (bool, int)) else TYPES[value]


def _template_kind(value) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _kernel_name(name, inputs, output_dtypes, template) -> str:
    full = "custom_kernel_" + name
    if template:
        full += "_" + "".join("_" + _template_value(v).replace("-", "_") for _, v in template)
    for a in inputs:
        full += "_" + TYPES[a.dtype] + ("s" if a.ndim == 0 else "c" if a.size < SMALL else "")
    return full + "".join("_" + TYPES[d] for d in output_dtypes)


def generate(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple] = (),
    atomic_outputs: bool = False,
) -> KernelText:
    """What MLX would compile; `inputs` need shapes and dtypes only."""
    kernel = _kernel_name(name, inputs, output_dtypes, template)
    text = header
    if template:
        parameters = ", ".join(f"{_template_kind(v)} {n}" for n, v in template)
        text += f"template <{parameters}>\n"
    text += f"[[kernel]] void {kernel}(\n"
    shape_parameters, buffers = [], []
    for n, a in zip(input_names, inputs, strict=True):
        space = "constant" if a.size < SMALL else "device"
        buffers.append(f"const {space} {TYPES[a.dtype]}{'&' if a.ndim == 0 else '*'} {n}")
        kinds = {
            "_shape": "const constant int* ",
            "_strides": "const constant int64_t* ",
            "_ndim": "const constant int& ",
        }
        used = tuple(a.ndim > 0 and n + suffix in source for suffix in kinds)
        buffers += [k + n + s for (s, k), u in zip(kinds.items(), used, strict=True) if u]
        shape_parameters.append(used)
    text += "".join(f"  {b} [[buffer({i})]],\n" for i, b in enumerate(buffers))
    attributes = [f"  {kind} {a} [[{a}]]" for a, kind in ATTRIBUTES.items() if a in source]
    last = len(inputs) + len(output_names) - 1
    for i, (n, d) in enumerate(zip(output_names, output_dtypes, strict=True), len(buffers)):
        kind = f"atomic<{TYPES[d]}>" if atomic_outputs else TYPES[d]
        # MLX forgets the shape parameters when it looks for the last output: without attributes,
        # several outputs and a shape give a text that does not compile, here as there.
        more = attributes or i < last
        text += f"  device {kind}* {n} [[buffer({i})]]" + (",\n" if more else ") {\n")
    text += ",\n".join(attributes) + (") {\n" if attributes else "") + source + "\n}\n"
    if template:
        instance = f"{kernel}<{', '.join(_template_value(v) for _, v in template)}>"
        text += (
            f'\ntemplate [[host_name("{kernel}")]] [[kernel]] decltype({instance}) {instance};\n'
        )
    return KernelText(kernel, text, shape_parameters)
