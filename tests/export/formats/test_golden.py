"""Matrices that the field's own tools packed, against what the same tools dequantise them to (ci/packers)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


def cases():
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in json.loads(file.metadata()["cases"]):
                yield pytest.param(path, name, id=f"{path.stem}-{name}")


def open_case(folder, path, name):
    """The checkpoint of one case, its expected matrix in float32, and half a unit in the last place of that in the
    packer's own float type: what the packer's rounding of a product may change."""
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["cases"])[name]
        parts = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
    expected = parts.pop(f"{name}.expected")
    save_file(parts, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    half = torch.finfo(expected.dtype).eps * 2.0 ** expected.float().abs().clamp(min=1e-30).log2().floor() / 2
    return open_checkpoint(folder), expected.float().numpy(), half.numpy()


@pytest.mark.parametrize(("path", "name"), [*cases()])
def test_a_packed_matrix_has_the_packers_values(tmp_path, path, name):
    checkpoint, expected, half = open_case(tmp_path, path, name)
    found = checkpoint.read_float32(f"{name}.weight")
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= half).all()
    assert np.abs(found).max() > 0.05


@pytest.mark.parametrize(("text", "is_block"), [("16x32", True), ("16x", False), ("0x32", False), ("32", False)])
def test_the_structure_of_blocks_may_be_a_text(tmp_path, text, is_block):
    """As compressed-tensors wrote it up to 0.9."""
    checkpoint, expected, half = open_case(tmp_path, GOLDEN / "ct.safetensors", "float8_block")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["block_structure"] = text
    (tmp_path / "config.json").write_text(json.dumps(config))
    if is_block:
        found = open_checkpoint(tmp_path).read_float32("float8_block.weight")
        assert (found == checkpoint.read_float32("float8_block.weight")).all()
        assert (np.abs(found - expected) <= half).all()
    else:
        with pytest.raises(ConfigError, match=f"the block is '{text}', expected two numbers"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(("path", "name"), [*cases()])
def test_rows_are_read_alone_as_they_are_together(tmp_path, path, name):
    checkpoint, expected, _ = open_case(tmp_path, path, name)
    whole = checkpoint.read_float32(f"{name}.weight")
    for first, last in ((0, 1), (3, 17), (len(expected) - 9, len(expected))):
        assert (checkpoint.read_float32(f"{name}.weight", slice(first, last)) == whole[first:last]).all()
