"""Caches in files: all of them comes back, and a file that is wrong is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_cache import HEADS, LAYERS, LENGTHS, D, check_counts, contents, feed, new, plain, tokens

from hadamoe.errors import ContractError, FormatError
from hadamoe.kv_cache import KVCache


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"kv": "bf16"}, {"dtype": "float32"}])
@pytest.mark.parametrize("n", LENGTHS)
def test_files_bring_everything_back(n, options, tmp_path):
    x = np.concatenate([tokens(n), tokens(n, seed=1)], 2)
    more = np.concatenate([tokens(80, seed=2), tokens(80, seed=3)], 2)
    cache = new(batch=2, **options)
    feed(cache, x)
    cache = cache.fork([1, 0, 1])  # pages held twice
    more = np.concatenate([more, more[:, :, :1]], 2)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = KVCache.load(path)
    assert again.identity() == cache.identity()
    assert [contents(again, s) for s in range(3)] == [contents(cache, s) for s in range(3)]
    assert again.coded_bytes == cache.coded_bytes
    check_counts(again)
    np.testing.assert_array_equal(feed(again, more), feed(cache, more))
    fixed = KVCache.load(path, tokens=n + 80)
    assert fixed.tokens == n + 80
    with pytest.raises(ContractError, match="tokens is"):
        KVCache.load(path, tokens=n - 1 or None) if n > 1 else new(tokens=0)


def test_a_file_of_a_pass_under_way_has_only_what_is_there(tmp_path):
    cache = new(batch=2)
    cache.reserve([190, 300])
    cache.advance()
    cache.reserve(10)
    cache.reserve(10)  # once more, as after an error
    check_counts(cache)
    cache.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache")
    assert [contents(again, s) for s in (0, 1)] == [contents(cache, s) for s in (0, 1)]
    cache.advance()  # saving is no part of the pass
    assert cache.lengths.tolist() == [200, 310]


def test_vectors_and_scales_are_kept_and_checked(tmp_path):
    random = np.random.default_rng(0)
    vectors = np.float32(random.uniform(0.5, 2, (LAYERS, 4, HEADS, D)))
    cache = new(vectors=vectors, scales=[[2, 0.5]] * LAYERS)
    feed(cache, tokens(130))
    cache.save(tmp_path / "a")
    again = KVCache.load(tmp_path / "a")
    np.testing.assert_array_equal(again.vectors, vectors)
    np.testing.assert_array_equal(again.layer(1).scales, [2, 0.5])
    assert cache.identity() != new().identity()
    with pytest.raises(ContractError, match=r"vectors has \[4, 2, 64\], needs \[2, 4, 2, 64\]"):
        new(vectors=vectors[0])
    with pytest.raises(ContractError, match=r"balance has .* needs finite numbers above 0"):
        new(vectors=vectors - 1)
    with pytest.raises(ContractError, match="scales has nan to nan, needs finite numbers above 0"):
        new(scales=np.full((LAYERS, 2), np.nan))


def edit(path, change):
    """Rewrites the header of a safetensors file, and its data where change returns some."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    change(header, body)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def set_number(name, dtype, index, value):
    def change(header, body):
        begin = header[name]["data_offsets"][0]
        np.frombuffer(body, dtype, offset=begin)[index] = value

    return change


def set_fact(**facts):
    def change(header, _):
        known = json.loads(header["__metadata__"]["cache"])
        header["__metadata__"]["cache"] = json.dumps(known | facts)

    return change


def rename(old, new_name):
    return lambda header, _: header.update({new_name: header.pop(old)})


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda h, _: h["__metadata__"].update(kind="other"), "__metadata__"),
        (lambda h, _: h["__metadata__"].update(version="0"), "__metadata__"),
        (set_fact(heads=3), "layers.0.key_pages"),
        (set_fact(heads=0), "__metadata__"),
        (set_fact(head_dim=33), "__metadata__"),
        (set_fact(head_dim=128), "layers.0.key_pages"),
        (set_fact(dtype="float32"), "layers.0.raw_keys"),
        (set_fact(dtype=["float32"]), "__metadata__"),
        (set_fact(window="3"), "__metadata__"),
        (set_fact(formats=[["h4", "h3"]]), "layers.1.key_pages"),
        (set_fact(formats=[["h4", "h9"]] * 2), "__metadata__"),
        (set_fact(formats=[["h4", "h3"]] * 3), "layers.2.raw_keys"),
        (set_fact(more=1), "__metadata__"),
        (set_number("lengths", "<i8", 0, -1), "lengths"),
        (set_number("lengths", "<i8", 0, 1 << 50), "lengths"),
        (set_number("lengths", "<i8", 0, 190), "table"),
        (set_number("lengths", "<i8", 0, 320), "table"),
        (set_number("raw_from", "<i8", 0, 9), "raw_from"),
        (set_number("kept_from", "<i8", 0, 2), "table"),
        (set_number("table", "<i4", 1, 3), "table"),
        (set_number("table", "<i4", 1, -1), "table"),
        (set_number("table", "<i4", 0, 0), "table"),
        (set_number("table", "<i4", 1, 1), "layers.0.key_pages"),
        (set_number("layers.1.raw_values", "<u2", 0, 0x7F80), "layers.1.raw_values"),
        (rename("raw_from", "raw"), "raw_from"),
        (rename("layers.1.raw_keys", "layers.1.keys"), "layers.1.raw_keys"),
        (lambda h, b: b.extend(b"1234") or h.update(
            extra={"dtype": "U8", "shape": [4], "data_offsets": [len(b) - 4, len(b)]}), "extra"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_name_the_tensor(change, tensor, tmp_path):
    path = tmp_path / "cache"
    cache, _ = plain(tokens(260))
    cache.save(path)
    edit(path, change)
    with pytest.raises(FormatError) as e:
        KVCache.load(path)
    assert e.value.tensor == tensor
    assert e.value.file == str(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    cache, _ = plain(tokens(70))
    cache.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert path.read_bytes() == before
