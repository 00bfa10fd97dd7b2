"""The streamed safetensors writer against the safetensors library."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from export.checkpoint.folder import open_checkpoint
from export.checkpoint.shard_writer import PlannedTensor, plan_shards, write_safetensors, write_sharded
from export.errors import OutputError

VALUES = {
    "b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a": np.arange(10, dtype=np.float16),
    "c": (np.arange(6) - 3).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "scalar": np.float32(7).reshape(()),
    "empty": np.zeros((0, 5), dtype=np.float16),
}
LABELS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def plan(values=VALUES):
    return [PlannedTensor(name=n, dtype=LABELS[v.dtype.name], shape=v.shape) for n, v in values.items()]


def rows_one_by_one(tensor):
    values = VALUES[tensor.name]
    return iter([values]) if values.ndim == 0 else (values[i : i + 1] for i in range(len(values)))


def test_the_library_reads_back_what_was_streamed_row_by_row(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, plan(), rows_one_by_one)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(VALUES)
        for name, values in VALUES.items():
            tensor = file.get_tensor(name)
            assert str(tensor.dtype) == f"torch.{values.dtype.name}"
            np.testing.assert_array_equal(tensor.float().numpy(), values.astype(np.float32))


def test_bytes_equal_those_of_the_library_for_one_dtype_in_its_order(tmp_path):
    values = {name: VALUES[name].astype(np.float32) for name in ("a", "b")}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, plan(values), lambda tensor: [values[tensor.name]])
    assert path.read_bytes() == save(values, metadata={"format": "pt"})


def test_one_shard_has_the_plain_name_and_no_index(tmp_path):
    paths = write_sharded(tmp_path, plan(), rows_one_by_one, max_shard_bytes=10**6)
    assert [path.name for path in paths] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_shards_are_numbered_and_indexed(tmp_path):
    paths = write_sharded(tmp_path, plan(), rows_one_by_one, max_shard_bytes=50)
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48 + 20 + 12 + 4}
    assert index["weight_map"] == {
        "b": paths[0].name, "a": paths[1].name, "c": paths[1].name, "scalar": paths[1].name, "empty": paths[1].name,
    }  # fmt: skip
    np.testing.assert_array_equal(load_file(paths[0])["b"], VALUES["b"])
    (tmp_path / "config.json").write_text("{}")
    assert set(open_checkpoint(tmp_path).tensors) == set(VALUES)


def test_no_shard_passes_the_limit_unless_one_tensor_does():
    tensors = [PlannedTensor(name=str(i), dtype="F16", shape=(size,)) for i, size in enumerate([10, 10, 40, 5, 5, 5])]
    shards = plan_shards(tensors, 40)
    assert [[tensor.name for tensor in shard] for shard in shards] == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_a_chunk_of_another_dtype_is_refused(tmp_path):
    tensors = [PlannedTensor(name="w", dtype="F16", shape=(2,))]
    with pytest.raises(OutputError, match="writing w: a chunk has dtype float32, the header says F16"):
        write_safetensors(tmp_path / "x", tensors, lambda _: [np.zeros(2, dtype=np.float32)])


def test_too_few_values_are_refused(tmp_path):
    tensors = [PlannedTensor(name="w", dtype="F16", shape=(2, 3))]
    with pytest.raises(OutputError, match=r"writing w: 8 bytes were given, \[2, 3\] takes 12"):
        write_safetensors(tmp_path / "x", tensors, lambda _: [np.zeros(4, dtype=np.float16)])


def test_a_disk_that_refuses_is_told_with_its_reason(tmp_path):
    with pytest.raises(OutputError, match=r"absent/model\.safetensors: No such file or directory"):
        write_safetensors(tmp_path / "absent" / "model.safetensors", plan(), rows_one_by_one)


def test_a_full_disk_is_told_as_such():
    from pathlib import Path

    with pytest.raises(OutputError, match="No space left on device"):
        write_safetensors(Path("/dev/full"), plan(), rows_one_by_one)
