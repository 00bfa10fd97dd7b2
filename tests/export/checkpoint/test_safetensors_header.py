"""The header of a safetensors file: what the safetensors library refuses is refused here, and by name."""

from __future__ import annotations

import json

import pytest
import safetensors
from fuzz_readers import READERS, checkpoints
from fuzzing import inputs_of

from export.checkpoint.safetensors_header import read_header
from export.errors import CheckpointError


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def file_of(header, num_bytes=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def library_refuses(data):
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return True
    return False


def refusal(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.encode()) <= 2000
    return text


TWO = {"a": entry(), "b": entry(begin=8, end=16)}
# What both refuse, with what is said here.
REFUSED_BY_BOTH = {
    "bytes after the last tensor": (
        file_of({"a": entry()}, 12),
        "4 bytes after a, the last tensor, belong to no tensor",
    ),
    "bytes of no tensor at all": (file_of({}, 4), "4 bytes after the header"),
    "a hole": (
        file_of({"a": entry(), "b": entry(begin=12, end=20)}, 20),
        "4 bytes between a and b belong to no",
    ),
    "a hole before the first": (file_of({"a": entry(begin=4, end=12)}, 12), "4 bytes between the header and a"),
    "an overlap": (file_of({"a": entry(), "b": entry(begin=4, end=12)}, 12), "a and b overlap"),
    "an overlap of one byte": (
        file_of({"a": entry("U8", (4,), 0, 4), "b": entry("U8", (4,), 3, 7)}, 7),
        "a and b overlap",
    ),
    "a hole of one byte": (
        file_of({"a": entry("U8", (4,), 0, 4), "b": entry("U8", (4,), 5, 9)}, 9),
        "1 bytes between a and b belong to no",
    ),
    "one byte after the last tensor": (file_of(TWO, 17), "1 bytes after b, the last tensor"),
    "a tensor past the end": (file_of(TWO, 12), "truncated"),
    "a tensor one byte past the end": (file_of(TWO, 15), "truncated"),
    "offsets turned": (file_of({"a": entry(begin=8, end=0)}), "should take 8 bytes, its offsets span -8"),
    "another size": (file_of({"a": entry(shape=(3,))}), "should take 12 bytes, its offsets span 8"),
    "part of a byte": (file_of({"a": entry("F4", (3,), 0, 2)}, 2), "should take 12 bits, its offsets span 2"),
    "UTF-16": (file_of(json.dumps(TWO).encode("utf-16"), 16), "is not UTF-8"),
    "UTF-16 without a mark": (file_of(json.dumps(TWO).encode("utf-16-le"), 16), "its header is not JSON"),
    "UTF-32": (file_of(json.dumps(TWO).encode("utf-32"), 16), "is not UTF-8"),
    "a byte-order mark": (file_of(json.dumps(TWO).encode("utf-8-sig"), 16), "begins with a byte-order mark"),
    "metadata that is a text": (file_of({"__metadata__": "pt", **TWO}, 16), "__metadata__ is 'pt', expected an object"),
    "metadata that is a list": (file_of({"__metadata__": [], **TWO}, 16), "__metadata__ is [], expected an object"),
    "metadata of a number": (file_of({"__metadata__": {"format": 1}, **TWO}, 16), "__metadata__ has 1 under format"),
    "metadata twice": (
        file_of(b'{"__metadata__":{},"__metadata__":{},' + json.dumps(TWO).encode()[1:], 16),
        "the key '__metadata__' occurs twice",
    ),
    "a dtype twice": (
        file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
        "the key 'dtype' occurs twice",
    ),
    "300 dimensions": (file_of({"a": entry(shape=[2**63 - 1] * 300)}), "the header entry of a is malformed"),
    "a size beyond 64 bits": (file_of({"a": entry(shape=(0, 2**64), end=0)}, 0), "the header entry of a is malformed"),
    "a size of -0": (
        file_of(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0),
        "-0 is not a whole number",
    ),
    "NaN": (file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', 0), "NaN is not a number in JSON"),
    "an unknown dtype": (file_of({"a": entry("I4", (2,), 0, 1)}, 1), "has dtype 'I4', which the format does not have"),
    "bytes after the JSON": (file_of(json.dumps(TWO).encode() + b"\0", 16), "its header is not JSON"),
    "half of a surrogate pair": (file_of(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}"), "surrogate"),
    "deep nesting": (file_of(b'{"a":' * 50_000 + b"}" * 50_000, 0), "nested too deeply"),
}
# What the library takes and moeship does not.
REFUSED_HERE_ALONE = {
    "a tensor twice": (
        file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
        "the key 'a' occurs twice",
    ),
    "another key in an entry": (file_of({"a": entry(note=1)}), "the header entry of a is malformed"),
    "metadata that is null": (file_of({"__metadata__": None, **TWO}, 16), "__metadata__ is None, expected an object"),
    "3000 dimensions of 1": (file_of({"a": entry(shape=[1] * 3000, end=4)}, 4), "the header entry of a is malformed"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "reason"), REFUSED_BY_BOTH.values(), ids=REFUSED_BY_BOTH)
def test_what_the_library_refuses_is_refused_by_name(tmp_path, data, reason):
    assert library_refuses(data)
    assert reason in refusal(tmp_path, data)


@pytest.mark.parametrize(("data", "reason"), REFUSED_HERE_ALONE.values(), ids=REFUSED_HERE_ALONE)
def test_what_no_writer_writes_is_refused_by_name(tmp_path, data, reason):
    assert not library_refuses(data)
    assert reason in refusal(tmp_path, data)


def test_what_is_taken_is_what_the_library_takes_over_damaged_headers(tmp_path):
    [reader] = [reader for reader in READERS if reader.name == "safetensors header"]
    path, taken = tmp_path / "model.safetensors", 0
    for data in inputs_of(reader, seed=4, count=600):
        path.write_bytes(data)
        try:
            found = read_header(path)
        except CheckpointError:
            continue
        taken += 1
        expected = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in safetensors.deserialize(data)}
        assert {stored.name: (stored.dtype, stored.shape) for stored in found} == expected
    assert taken >= 5  # else the damage is too great for the comparison to mean much


def test_every_dtype_of_the_format_is_known_with_its_bits(tmp_path):
    bits_of = {
        "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
        "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    }  # fmt: skip
    path = tmp_path / "model.safetensors"
    for dtype, bits in bits_of.items():
        data = file_of({"a": entry(dtype, (8,), 0, bits)}, bits)
        assert not library_refuses(data)
        path.write_bytes(data)
        assert [(stored.dtype, stored.num_bytes) for stored in read_header(path)] == [(dtype, bits)]


def test_a_large_header_is_read_in_seconds_or_refused(tmp_path):
    many = {f"t{index}": entry(begin=8 * index, end=8 * index + 8) for index in range(60_000)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(many, 8 * len(many)))
    assert len(read_header(path)) == 60_000
    assert "its header is not JSON (it holds more than" in refusal(
        tmp_path, file_of({"a": entry(shape=[0] * 1_100_000)}, 0)
    )
    huge = (64 << 20).to_bytes(8, "little") + b" " * (64 << 20)
    assert "its header takes 67108864 bytes, moeship reads at most" in refusal(tmp_path, huge)


def test_good_files_are_read_whole():
    for folder in checkpoints():
        data = (folder / "model.safetensors").read_bytes()
        assert {stored.name for stored in read_header(folder / "model.safetensors")} == {
            name for name, _ in safetensors.deserialize(data)
        }
