"""Opening shards: the safetensors library agrees, and every wrong header has its own message."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_checkpoint import Raw, header_bytes, stored, write_shard
from recorded import STDLIB, TINY, checkpoint

from hadamoe import FormatError
from hadamoe.checkpoint import HEADER_LIMIT, INDEX, Checkpoint

NAN_JSON = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":NaN}'


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", [*TINY, *STDLIB])
def test_same_tensors_and_bytes_as_the_safetensors_library(name):
    ck = Checkpoint.open(checkpoint(name))
    count = 0
    for shard in ck.shards:
        for tensor, info in safetensors.deserialize(shard.path.read_bytes()):
            t = ck.tensor(tensor)
            assert (t.dtype, list(t.shape)) == (info["dtype"], info["shape"])
            assert t.array.tobytes() == bytes(info["data"])
            assert t.array.base is shard.data
            count += 1
    assert count == len(ck) == len(ck.names())


def test_views_are_writable_and_never_reach_the_file(tmp_path):
    write_shard(tmp_path / "model.safetensors", {"a": stored(np.arange(4, dtype=np.float32))})
    t = Checkpoint.open(tmp_path).tensor("a")
    t.array[0] = 7
    assert Checkpoint.open(tmp_path).tensor("a").array[0] == 0


def test_claims(tmp_path):
    tensors = {n: stored(np.zeros(2, np.float32)) for n in "abc"}
    write_shard(tmp_path / "model.safetensors", tensors)
    ck = Checkpoint.open(tmp_path)
    ck.claim("b")
    assert ck.unclaimed() == ["a", "c"]
    assert "a" in ck
    assert "d" not in ck
    with pytest.raises(FormatError) as e:
        ck.tensor("d")
    assert str(e.value) == f"{tmp_path}: d: expected a tensor, found no such name"
    ck.close()
    assert len(ck) == 0


DTYPE_LIST = "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 U16 I16 F16 BF16 U32 I32 F32 U64 I64 F64"
#: file bytes -> message after the file's path
ATTACKS = {
    "empty": (b"", ": expected 8 bytes of header length, found 0 bytes"),
    "five bytes": (b"12345", ": expected 8 bytes of header length, found 5 bytes"),
    "not safetensors": (
        b"PK\x03\x04" + b"x" * 100,
        f": expected a header of at most {HEADER_LIMIT} bytes, found 8680820738615364432 "
        "(is this a safetensors file?)",
    ),
    "header over the limit": (
        struct.pack("<Q", HEADER_LIMIT + 1) + b"{}",
        f": expected a header of at most {HEADER_LIMIT} bytes, found {HEADER_LIMIT + 1} "
        "(is this a safetensors file?)",
    ),
    "header over the file": (
        struct.pack("<Q", 100) + b"{}",
        ": expected a header of 100 bytes, found 2 bytes after its length",
    ),
    "header 2^64-1": (
        b"\xff" * 8 + b"{}",
        f": expected a header of at most {HEADER_LIMIT} bytes, found {2**64 - 1} "
        "(is this a safetensors file?)",
    ),
    "not JSON": (
        header_bytes(b"{nope"),
        ": expected a JSON header, found Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    "no brace": (header_bytes(b' {"a":1}'), ": expected a header that starts with '{', "
                 "found b' {\"a\":1}'"),
    "not UTF-8": (
        header_bytes(b'{"\xff":1}'),
        ": expected a JSON header, found 'utf-8' codec can't decode byte 0xff in position 2: "
        "invalid start byte",
    ),
    "NaN in JSON": (header_bytes(NAN_JSON), ": expected a JSON header, found NaN is not JSON"),
    "deep nesting": (
        header_bytes(b'{"a":' + b"[" * 100_000),
        ": expected a JSON header, found nesting too deep",
    ),
    "repeated name": (
        header_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
        ": a: expected each key once, found it twice",
    ),
    "metadata of numbers": (
        header_bytes({"__metadata__": {"x": 1}}),
        ": __metadata__: expected a map of strings, found {'x': 1}",
    ),
    "entry without shape": (
        header_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}) + bytes(8),
        ": a: expected dtype, shape and data_offsets, "
        "found {'dtype': 'F32', 'data_offsets': [0, 8]}",
    ),
    "unknown dtype": (
        header_bytes({"a": entry("F31")}) + bytes(8),
        f": a: expected a dtype of {DTYPE_LIST}, found 'F31'",
    ),
    "dtype no string": (
        header_bytes({"a": entry(["F32"])}) + bytes(8),
        f": a: expected a dtype of {DTYPE_LIST}, found ['F32']",
    ),
    "negative size": (
        header_bytes({"a": entry(shape=(-2,))}) + bytes(8),
        ": a: expected a shape of at most 8 sizes 0 to 2^63-1, found [-2]",
    ),
    "fractional size": (
        header_bytes({"a": entry(shape=(2.0,))}) + bytes(8),
        ": a: expected a shape of at most 8 sizes 0 to 2^63-1, found [2.0]",
    ),
    "true for a size": (
        header_bytes({"a": entry(shape=(True, 2))}) + bytes(8),
        ": a: expected a shape of at most 8 sizes 0 to 2^63-1, found [True, 2]",
    ),
    "2^63 items": (
        header_bytes({"a": entry(shape=(2**63,))}) + bytes(8),
        f": a: expected a shape of at most 8 sizes 0 to 2^63-1, found [{2**63}]",
    ),
    "2^62 x 4: no wrap to 0": (
        header_bytes({"a": entry(shape=(2**62, 4), end=0)}),
        f": a: expected {2**66} bytes for F32 [{2**62}, 4], found 0 in [0, 0]",
    ),
    "2^62 x 2^62 x 2^62": (
        header_bytes({"a": entry(shape=(2**62,) * 3)}) + bytes(8),
        f": a: expected {2**188} bytes for F32 [{2**62}, {2**62}, {2**62}], found 8 in [0, 8]",
    ),
    "shape against span": (
        header_bytes({"a": entry(shape=(3,))}) + bytes(8),
        ": a: expected 12 bytes for F32 [3], found 8 in [0, 8]",
    ),
    "backward span": (
        header_bytes({"a": entry(begin=8, end=0)}) + bytes(8),
        ": a: expected data_offsets [begin, end], found [8, 0]",
    ),
    "truncated file": (
        header_bytes({"a": entry()}) + bytes(7),
        ": a: expected a span inside 7 bytes of data, found [0, 8]",
    ),
    "span out of the file": (
        header_bytes({"a": entry(begin=2**62, end=2**62 + 8)}) + bytes(8),
        f": a: expected a span inside 8 bytes of data, found [{2**62}, {2**62 + 8}]",
    ),
    "bytes after the data": (
        header_bytes({"a": entry()}) + bytes(9),
        ": expected 8 bytes of data, found 9",
    ),
    "gap": (
        header_bytes({"a": entry(begin=8, end=16)}) + bytes(16),
        ": a: expected a span that begins at 0, "
        "found [8, 16], which leaves a gap after the start of the data",
    ),
    "overlap": (
        header_bytes({"a": entry(), "b": entry(begin=4, end=12)}) + bytes(12),
        ": b: expected a span that begins at 8, found [4, 12], which overlaps a",
    ),
    "misaligned": (
        header_bytes({"a": entry("U8", (2,), 0, 2), "b": entry("F32", (1,), 2, 6)}) + bytes(6),
        ": b: expected an offset that is a multiple of 4, found 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_wrong_file(attack, tmp_path):
    data, message = ATTACKS[attack]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError) as e:
        Checkpoint.open(tmp_path)
    assert str(e.value) == f"{path}{message}"


def two_shards(path):
    return Raw({n: stored(np.zeros(2, np.float32)) for n in "abcd"}).write(path, shards=2)


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
#: what is done to a directory of two shards (a, c | b, d) -> message after the directory's path
DIRECTORY_ATTACKS = {
    "missing shard": (
        lambda d: (d / SECOND).unlink(),
        f"/{INDEX}: expected the file {SECOND}, found no such file",
    ),
    "missing shard, no index": (
        lambda d: ((d / SECOND).unlink(), (d / INDEX).unlink()),
        f": expected the file {SECOND}, found no such file",
    ),
    "tensor in another shard": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(a=SECOND)),
        f"/{INDEX}: a: expected it in {SECOND}, found {FIRST}",
    ),
    "index names a tensor that is not there": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(z=FIRST)),
        f"/{INDEX}: z: expected it in {FIRST}, found no such tensor",
    ),
    "tensor missing from the index": (
        lambda d: edit_index(d, lambda i: i["weight_map"].pop("a")),
        f"/{FIRST}: a: expected an entry in {INDEX}, found none",
    ),
    "file missing from the index": (
        lambda d: write_shard(d / "more.safetensors", {"z": stored(np.zeros(2, np.float32))}),
        f"/more.safetensors: expected an entry in {INDEX}, found none",
    ),
    "path out of the directory": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(a="../x.safetensors")),
        f"/{INDEX}: expected names of .safetensors files, found '../x.safetensors'",
    ),
    "no weight_map": (
        lambda d: edit_index(d, lambda i: i.pop("weight_map")),
        f"/{INDEX}: expected a weight_map of file names, found None",
    ),
    "same tensor twice": (
        lambda d: (
            (d / INDEX).unlink(),
            write_shard(d / SECOND, {"a": stored(np.zeros(2, np.float32))}),
        ),
        f"/{SECOND}: a: expected one tensor of this name, found another in {FIRST}",
    ),
    "numbered past the last": (
        lambda d: ((d / INDEX).unlink(), (d / SECOND).rename(d / FIRST.replace("1-of", "3-of"))),
        f": expected the file {SECOND}, found no such file",
    ),
    "one more than there are": (
        lambda d: ((d / INDEX).unlink(), (d / FIRST.replace("1-of", "3-of")).touch()),
        f"/{FIRST.replace('1-of', '3-of')}: expected a number from 1 to 2, found another",
    ),
    "a pipe for a shard": (
        lambda d: ((d / SECOND).unlink(), os.mkfifo(d / SECOND)),
        f"/{SECOND}: expected a file, found something else",
    ),
    "a link that leads nowhere": (
        lambda d: ((d / SECOND).unlink(), (d / SECOND).symlink_to(d / "gone")),
        f"/{SECOND}: expected a file, found none",
    ),
    "index nested without end": (
        lambda d: (d / INDEX).write_text('{"a":' * 900 + "1" + "}" * 900),
        f"/{INDEX}: expected at most 32 levels of nesting, found more",
    ),
    "no weights": (
        lambda d: [(d / f).unlink() for f in (FIRST, SECOND)],
        ": expected *.safetensors files, found none",
    ),
}


@pytest.mark.parametrize("attack", DIRECTORY_ATTACKS)
def test_wrong_directory(attack, tmp_path):
    change, message = DIRECTORY_ATTACKS[attack]
    change(two_shards(tmp_path))
    with pytest.raises(FormatError) as e:
        Checkpoint.open(tmp_path)
    assert str(e.value) == f"{tmp_path}{message}"


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(FormatError, match="expected a directory, found none"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="expected a directory, found a file"):
        Checkpoint.open(tmp_path / "file")


def test_stale_index_beside_a_single_file_is_ignored_and_noted(tmp_path):
    write_shard(tmp_path / "model.safetensors", {"a": stored(np.zeros(2, np.float32))})
    index = {"weight_map": {"a.weight": "model-00001-of-00026.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    ck = Checkpoint.open(tmp_path)
    assert ck.names() == ["a"]
    assert ck.notes == [f"{INDEX} names 1 files that do not exist: stale, ignored"]


def test_config_must_be_there(tmp_path):
    write_shard(tmp_path / "model.safetensors", {"a": stored(np.zeros(2, np.float32))})
    with pytest.raises(FormatError) as e:
        _ = Checkpoint.open(tmp_path).config
    path = tmp_path / "config.json"
    assert str(e.value) == f"{path}: expected a model config, found no file"
    path.write_text("[1]")
    with pytest.raises(FormatError) as e:
        _ = Checkpoint.open(tmp_path).config
    assert str(e.value) == f"{path}: expected a JSON object, found a list"


SIZES = st.one_of(
    st.integers(-2, 9), st.sampled_from([2**31, 2**62, 2**63, 2**64, True, 1.5, None])
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", 7, None]),
        "shape": st.lists(SIZES, max_size=9) | st.none(),
        "data_offsets": st.lists(st.integers(-1, 80) | SIZES, max_size=3),
        "extra": st.integers(),
    },
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES, max_size=4)
FUZZ = settings(
    max_examples=int(os.environ.get("HADAMOE_FUZZ", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def accepted_alike(path, data):
    """Opening raises nothing but FormatError, and what it takes the library takes with equal "
    "bytes."""
    (path / "model.safetensors").write_bytes(data)
    try:
        ck = Checkpoint.open(path)
    except FormatError:
        return
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == set(ck.names())
    for name, info in theirs.items():
        assert ck.tensor(name).array.tobytes() == bytes(info["data"])


@FUZZ
@given(header=HEADERS, data=st.binary(max_size=64))
def test_fuzz_headers(tmp_path, header, data):
    accepted_alike(tmp_path, header_bytes(header) + data)


@FUZZ
@given(text=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 250))
def test_fuzz_bytes(tmp_path, text, length):
    accepted_alike(tmp_path, length.to_bytes(8, "little") + text)


@FUZZ
@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 500),
)
def test_fuzz_a_valid_file(tmp_path, flips, cut):
    tensors = {n: stored(np.arange(6, dtype=np.float32).reshape(2, 3)) for n in ("a", "b.c", "d")}
    write_shard(tmp_path / "model.safetensors", tensors)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    for at, value in flips:
        data[at % len(data)] = value
    accepted_alike(tmp_path, bytes(data[: max(cut, 8)] if cut < 100 else data))
