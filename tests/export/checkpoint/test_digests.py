"""Digests taken while reading, against hashlib over the files as they lie on disk."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from safetensors.numpy import load_file

from export.checkpoint.digests import Run, range_digest, recorded, source_digests
from export.checkpoint.folder import file_digest, open_checkpoint
from export.checkpoint.safetensors_header import header_bytes
from export.errors import CheckpointError

FC1 = "transformer.h.0.moe.mlp.0.fc1.weight"  # [56, 40]
FC2 = "transformer.h.0.moe.mlp.0.fc2.weight"  # [40, 56]


@pytest.fixture
def checkpoint(tmp_path):
    return open_checkpoint(write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=3, experts_per_token=2))


def sha(data):
    return hashlib.sha256(data).hexdigest()


def test_a_tensor_read_in_pieces_from_start_to_end_is_one_run(checkpoint):
    counted = []
    reading = recorded(checkpoint, counted.append)
    for row in range(0, 56, 10):
        reading.read_float32(FC1, slice(row, min(row + 10, 56)))
    stored = load_file(checkpoint.shards[0])[FC1]
    assert reading.runs() == {FC1: (Run(bytes=56 * 40 * 4, sha256=sha(stored.tobytes())),)}
    assert counted == [1600] * 5 + [960]


HALF = 30 * 40 * 4  # the byte at which row 30 begins


def test_parts_read_in_another_order_are_runs_in_order_of_place(checkpoint):
    reading = recorded(checkpoint, lambda _: None, {FC1: [0, HALF]})
    for start, end in ((30, 40), (0, 10), (40, 56), (10, 30)):  # in turn, as gate and up rows are
        reading.read(FC1, slice(start, end))
    stored = load_file(checkpoint.shards[0])[FC1]
    first, second = (Run(bytes=part.nbytes, sha256=sha(part.tobytes())) for part in (stored[:30], stored[30:]))
    assert reading.runs() == {FC1: (first, second)}


def test_runs_do_not_depend_on_the_order_of_reading(checkpoint):
    runs = []
    for spans in (((0, 30), (30, 56)), ((30, 56), (0, 30))):
        reading = recorded(checkpoint, lambda _: None, {FC1: [0, HALF]})
        for start, end in spans:
            reading.read(FC1, slice(start, end))
        runs.append(reading.runs())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("spans", [[(0, 55)], [(0, 56), (0, 56)]])
def test_bytes_left_out_or_read_twice_are_noticed(checkpoint, spans):
    reading = recorded(checkpoint, lambda _: None)
    for start, end in spans:
        reading.read(FC1, slice(start, end))
    with pytest.raises(AssertionError, match=f"{FC1} was read in .*, expected each byte once"):
        reading.runs()


@pytest.mark.parametrize(("before", "wrong"), [(0, 1), (30, 29), (20, 21)])
def test_a_reading_that_begins_where_none_should_is_noticed(checkpoint, before, wrong):
    reading = recorded(checkpoint, lambda _: None)
    if before:
        reading.read(FC1, slice(0, before))
    with pytest.raises(AssertionError, match=f"{FC1} was read from byte {wrong * 160} on, expected the start of a run"):
        reading.read(FC1, slice(wrong, 56))


def by_hand(shard, cuts):
    """The module's formula over a shard's bytes; `cuts` gives the byte at which a tensor's second run begins."""
    data = shard.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:length]).items() if name != "__metadata__"}
    whole = hashlib.sha256(data[:length])
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = (length + offset for offset in entry["data_offsets"])
        cut = start + cuts.get(name, 0)
        for left, right in ((start, cut), (cut, end)):
            if left < right:
                whole.update(hashlib.sha256(data[left:right]).digest())
    return whole.hexdigest()


def test_a_shards_digest_is_its_header_and_its_tensors_in_order(checkpoint):
    [shard] = checkpoint.shards
    expected = {"config.json": file_digest(checkpoint.folder / "config.json"), "model.safetensors": by_hand(shard, {})}
    assert source_digests(checkpoint, {}) == expected


def test_runs_are_taken_as_they_are_or_read_again(checkpoint):
    [shard] = checkpoint.shards
    reading = recorded(checkpoint, lambda _: None, {FC1: [0, HALF]})
    for rows in (slice(30, 56), slice(0, 30)):
        reading.read(FC1, rows)
    reading.read(FC2)
    expected = by_hand(shard, {FC1: HALF})
    assert source_digests(checkpoint, reading.runs(), read=False)["model.safetensors"] == expected
    assert source_digests(checkpoint, reading.runs())["model.safetensors"] == expected
    data = bytearray(shard.read_bytes())
    data[checkpoint.tensors[FC2].offset] ^= 1
    shard.write_bytes(data)
    assert source_digests(checkpoint, reading.runs(), read=False)["model.safetensors"] == expected
    assert source_digests(checkpoint, reading.runs())["model.safetensors"] != expected


def test_another_header_over_the_same_values_is_another_digest(checkpoint):
    [shard] = checkpoint.shards
    before = source_digests(checkpoint, {})
    data = shard.read_bytes()
    at = len(header_bytes(shard)) - 1
    shard.write_bytes(data[:at].replace(FC1.encode(), FC1.replace("h.0", "h.9").encode()) + data[at:])
    assert source_digests(checkpoint, {})["model.safetensors"] != before["model.safetensors"]


def test_a_range_past_the_end_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    assert range_digest(path, 10, 90).hex() == sha(bytes(range(10, 100)))
    with pytest.raises(CheckpointError, match="the file ended 1 bytes early"):
        range_digest(path, 10, 91)


def test_a_value_that_is_not_finite_is_refused_while_recording(checkpoint):
    [shard] = checkpoint.shards
    data = bytearray(shard.read_bytes())
    at = checkpoint.tensors[FC1].offset
    data[at : at + 4] = np.float32(np.inf).tobytes()
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="1 of 2240 values are NaN or infinite"):
        recorded(checkpoint, lambda _: None).read_float32(FC1)


@pytest.mark.parametrize("kind", ["pipe", "nothing"])
def test_the_digest_of_a_file_that_has_gone_is_refused_at_once(tmp_path, kind):
    """As where config.json is replaced while a build reads the weights."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "config.json")
    reason = "expected a regular file" if kind == "pipe" else "does not exist"
    with pytest.raises(CheckpointError, match=reason):
        file_digest(tmp_path / "config.json")
