"""dequantize: the same bits as the reference, for every instance on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from support import at_page_end, weight_at_page_ends

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.verify.samples import groups_of, random_part, random_weight
from hadamoe.weight import Instance, Part, Rotation, Weight

INSTANCES = ops.instances()
#: Widths round the steps of the kernel: 8 codes, 32 of a GGUF block, 256 of a span.
COLUMNS = (1, 7, 8, 32, 43, 96, 255, 256, 300, 544)


def run(weight: Weight, rows, dtype=np.float32) -> np.ndarray:
    """The native op on NaN-filled memory."""
    w = ops.pack(weight_at_page_ends(weight))
    y = np.full((len(rows), w.columns), np.nan, dtype)
    _cpu.call("dequantize", [w.parts, at_page_end(rows), *w.buffers], [y], [w.columns], [])
    return y


def widths(instance: Instance):
    if instance.table == "e2m1_gguf":
        return [(k, 32) for k in COLUMNS if k % 32 == 0]
    return [(k, g) for k in COLUMNS for g in groups_of(instance, k) if k % g == 0]


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_same_bits_as_the_reference(isa, rng, instance):
    for columns, group in widths(instance):
        weight = random_weight(rng, instance, 5, columns, group=group, experts=2, kind="gaussian")
        rows = np.array([9, 0, 4, 5, 5, 3])
        want = reference.dequantize(weight, rows)
        for dtype in (np.float32, np.float16):
            assert np.array_equal(run(weight, rows, dtype), want.astype(dtype)), (columns, group)


def test_parts_of_different_width_in_one_weight(isa, rng):
    kinds = (
        Instance("linear", 3, "bf16"),
        Instance("plain", 16, "f16"),
        Instance("codebook", 2, "f16"),
    )
    parts = [random_part(rng, i, n, 64, 64) for i, n in zip(kinds, (3, 1, 4), strict=True)]
    weight = Weight(64, ((parts[0], parts[1], parts[2]), (parts[2], parts[2])))
    rows = np.arange(16)
    assert np.array_equal(run(weight, rows), reference.dequantize(weight, rows))


def test_every_scale_and_code_of_mxfp4(isa, golden):
    want = golden("mxfp4_decode_table")["ocp_f32"]  # [scale, code]; 255 is NaN
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
    scale = np.arange(256, dtype=np.uint8)[:, None]
    plain = Part(Instance("e2m1", 4, "e8m0"), 256, 32, codes[:, ::2] | codes[:, 1::2] << 4, scale)
    blocks = np.concatenate([scale, codes[:, :16] | codes[:, 16:] << 4], 1)
    gguf = Part(Instance("e2m1_gguf", 4, "e8m0"), 256, 32, blocks)
    for part in (plain, gguf):
        y = run(Weight(32, ((part,),)), np.arange(256))
        assert np.array_equal(y, np.tile(want, 2), equal_nan=True)


def test_bf16_result_is_the_f32_result_rounded_to_even(isa, rng):
    torch = pytest.importorskip("torch")
    weight = random_weight(rng, Instance("linear", 4, "bf16"), 3, 77, group=77)
    packed, rows = ops.pack(weight), np.arange(3)
    y = torch.full((3, 77), torch.nan, dtype=torch.bfloat16)
    _cpu.call("dequantize", [packed.parts, rows, *packed.buffers], [y], [77], [])
    assert torch.equal(y, torch.from_numpy(reference.dequantize(weight, rows)).bfloat16())


def test_same_bits_for_any_number_of_threads(isa, rng):
    weight = random_weight(rng, Instance("linear", 5, "bf16"), 64, 1024, group=64)
    rows, before = rng.integers(0, 64, 300), ops.threads()
    first = run(weight, rows)
    for count in (1, 2, 5):
        ops.set_threads(count)
        assert np.array_equal(run(weight, rows), first)
    ops.set_threads(before)


def test_no_rows(rng):
    weight = random_weight(rng, Instance("linear", 4, "bf16"), 2, 32, group=32)
    assert run(weight, np.empty(0, np.int64)).shape == (0, 32)


#: hm_part, csrc/core/abi.h
FIELDS = (
    *("rows", "instance", "group", "row_bytes", "codes_buffer", "codes_offset"),
    *("scale_buffer", "scale_offset", "bias_buffer", "bias_offset"),
    *("codebook_buffer", "codebook_offset"),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "parts[0,0] has rows=-1, needs a positive number"),
        ({"rows": 0}, "parts[0] has 0 rows, needs at least 1"),
        ({"instance": 99}, "parts[0,0] has instance 99, needs 0..33"),
        ({"instance": -1}, "parts[0,0] has instance -1, needs 0..33"),
        ({"group": 0}, "parts[0,0] has group=0, needs a positive number"),
        ({"row_bytes": 15}, "parts[0,0] has row_bytes=15, needs at least 16"),
        ({"codes_buffer": 4}, "parts[0,0] has codes in buffer 4, needs 0..3"),
        ({"codes_offset": 1},
         "parts[0,0] has codes at byte 1, needs 64 bytes from there, the buffer has 64"),
        ({"codes_offset": -1},
         "parts[0,0] has codes at byte -1, needs 64 bytes from there, the buffer has 64"),
        ({"rows": 5},
         "parts[0,0] has codes at byte 0, needs "
         "80 bytes from there, the buffer has 64"),
        ({"scale_buffer": -1}, "parts[0,0] has scale in buffer -1, needs 0..3"),
        ({"group": 16},
         "parts[0,0] has scale at byte 0, needs "
         "32 bytes from there, the buffer has 16"),
        ({"bias_offset": 2},
         "parts[0,0] has bias at byte 2, needs "
         "16 bytes from there, the buffer has 16"),
        ({"codebook_offset": 4, "instance": 30},
         "parts[0,0] has codebook at byte 4, needs 64 bytes from there, the buffer has 64"),
    ],
)  # fmt: skip
def test_rejects_a_part_outside_its_buffers(changes, message):
    codes, other = np.zeros(64, np.uint8), np.zeros(16, np.uint8)
    # 4 rows of 32 4-bit codes in buffer 0, one f32 scale and bias a row in 1 and 2
    row = {
        "rows": 4,
        "group": 32,
        "row_bytes": 16,
        "instance": INSTANCES.index(("linear", 4, "f32")),
    }
    row |= {"codes_buffer": 0, "scale_buffer": 1, "bias_buffer": 2, "codebook_buffer": 3}
    if "codebook_offset" in changes:
        changes = changes | {"instance": INSTANCES.index(("codebook", 4, "f32"))}
    parts = np.zeros((1, 1, len(FIELDS)), np.int64)
    for name, value in (row | changes).items():
        parts[0, 0, FIELDS.index(name)] = value
    y = np.full((1, 32), np.nan, np.float32)
    buffers = [codes, other, other.copy(), codes.copy()]
    with pytest.raises(ContractError) as error:
        _cpu.call("dequantize", [parts, np.zeros(1, np.int64), *buffers], [y], [32], [])
    assert str(error.value) == f"dequantize: {message} [k=32 m=1]"
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.array([0, 8])}, "rows[1] is 8, needs 0..7 [k=32 m=2]"),
        ({"rows": np.array([-1])}, "rows[0] is -1, needs 0..7 [k=32 m=1]"),
        ({"rows": np.zeros(1, np.int32)}, "rows is i32, needs i64 [k=32 m=1]"),
        ({"rows": np.zeros((1, 1), np.int64)}, "rows has 2 dimensions, needs 1 [k=32]"),
        ({"y": np.full((2, 31), np.nan, np.float32)}, "y has k=31, needs 32 [k=32 m=2]"),
        ({"y": np.full((3, 32), np.nan, np.float32)}, "y has m=3, needs 2 [k=32 m=2]"),
        ({"y": np.full((2, 32), np.nan)}, "y is f64, needs f32 bf16 f16 [k=32 m=2]"),
        ({"y": np.full((2, 64), np.nan, np.float32)[:, ::2]},
         "y is not contiguous, needs row-major [k=32 m=2]"),
        ({"columns": 0}, "columns is 0, needs a positive number"),
        ({"parts": np.zeros((1, 1, 11), np.int64)}, "parts is not [experts, parts, 12] [k=32 m=2]"),
        ({"parts": np.zeros((1, 1, 12), np.int32)}, "parts is i32, needs i64 [k=32 m=2]"),
        ({"buffer": np.zeros((2, 2), np.uint8)}, "buffers[0] has 2 dimensions, needs 1 [k=32 m=2]"),
        ({"buffer": np.zeros(4, np.int8)}, "buffers[0] is i8, needs u8 [k=32 m=2]"),
    ],
)  # fmt: skip
def test_rejects_other_arguments(rng, changes, message):
    weight = random_weight(rng, Instance("linear", 4, "bf16"), 4, 32, group=32, experts=2)
    packed = ops.pack(weight)
    rows = changes.get("rows", np.array([0, 7]))
    y = changes.get("y", np.full((len(rows), 32), np.nan, np.float32))
    buffers = list(packed.buffers)
    if "buffer" in changes:
        buffers[0] = changes["buffer"]
    with pytest.raises(ContractError) as error:
        _cpu.call("dequantize", [changes.get("parts", packed.parts), rows, *buffers], [y],
                  [changes.get("columns", 32)], [])  # fmt: skip
    assert str(error.value) == f"dequantize: {message}"
    assert np.isnan(y).all()


def test_rejects_experts_of_different_height(rng):
    part = random_part(rng, Instance("linear", 4, "bf16"), 4, 32, 32)
    packed = ops.pack(Weight(32, ((part, part), (part, part))))
    parts = packed.parts.copy()
    parts[1, 1, 0] = 0
    y = np.full((1, 32), np.nan, np.float32)
    with pytest.raises(ContractError) as error:
        _cpu.call("dequantize", [parts, np.zeros(1, np.int64), *packed.buffers], [y], [32], [])
    assert str(error.value) == "dequantize: parts[1] has 4 rows, needs 8 [k=32 m=1]"


def test_undoes_the_rotation_to_the_recorded_bits(isa, golden):
    """JANGTQ scales before it rotates back, as dequantize does: its tool's own decoded weights."""
    z = golden("hadamard")
    d = z["jangtq.signs"].size
    part = Part(Instance("codebook", 2, "f16"), 3, d, z["jangtq.packed"], z["jangtq.norms"], None,
                z["jangtq.codebook"])  # fmt: skip
    weight = Weight(d, ((part,),), Rotation(None, pre=z["jangtq.signs"]))
    assert np.array_equal(ops.dequantize(weight), z["jangtq.w_hat"])
