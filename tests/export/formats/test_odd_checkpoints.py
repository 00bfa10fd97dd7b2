"""Any settings and any tensors of a packed checkpoint are read or refused with one of our errors."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint
from packed_checkpoints import pack_awq, pack_compressed, pack_gptq, pack_int8, pack_nf4
from safetensors.numpy import load_file, save_file

from export.checkpoint.folder import open_checkpoint
from export.errors import MoeshipError
from export.families import read_model

PACKERS = {"gptq": pack_gptq, "awq": pack_awq, "compressed": pack_compressed, "int8": pack_int8, "nf4": pack_nf4}
ODD = [None, True, -1, 0, 7, 1 << 40, 1.5, "x", "", [], [1], ["x"], {}, {"x": 1}, {"x": {"weights": {}}}]
STEM = "model.layers.0.mlp.fc1"


@pytest.fixture(params=PACKERS)
def packed(request, tmp_path):
    folder = write_phi_checkpoint(
        tmp_path / "m", seed=1, hidden_size=64, num_heads=4, ffn_size=64, num_layers=1, vocab_size=260
    )
    return PACKERS[request.param](folder)


def is_read(folder):
    """Whether all weights of a checkpoint are read; False if they are refused. Other errors are raised."""
    try:
        model = read_model(open_checkpoint(folder))
        model.weights.grids()
        for name in model.weights.table:
            model.weights.load(name)
    except MoeshipError:
        return False
    return True


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))


def replaced(value, path, by):
    return by if not path else {**value, path[0]: replaced(value[path[0]], path[1:], by)}


def test_odd_settings(packed):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    assert is_read(packed)
    settings = config["quantization_config"]
    more = {"dynamic": {}, "sparsity_config": {}, "transform_config": {}, "weight_block_size": None, "adapter": None}
    refused = 0
    for place, odd in itertools.product(places({**settings, **more}), ODD):
        path.write_text(json.dumps({**config, "quantization_config": replaced({**settings, **more}, place, odd)}))
        refused += not is_read(packed)
    assert refused > 10


def test_odd_tensors(packed):
    stored = load_file(packed / "model.safetensors")
    rng = np.random.default_rng(1)
    edits = [
        lambda array: array[:0],
        lambda array: array[1:],
        lambda array: array[..., :-1],
        lambda array: array.reshape(-1),
        lambda array: array[None],
        lambda array: np.concatenate([array, array]),
        lambda array: array.astype(np.float32),
        lambda array: array.astype(np.int8),
        lambda array: array.reshape(-1)[0],
        lambda array: np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape),
        lambda array: np.full_like(array, -1 if array.dtype.kind in "if" else 255),
    ]
    parts = [name for name in stored if name.startswith(STEM)]
    refused = 0
    for name, edit in itertools.product(parts, edits):
        changed = np.array(edit(stored[name]))
        with np.errstate(all="ignore"):
            save_file({**stored, name: np.ascontiguousarray(changed)}, packed / "model.safetensors")
            refused += not is_read(packed)
    for name in parts:
        save_file({key: value for key, value in stored.items() if key != name}, packed / "model.safetensors")
        assert is_read(packed) is name.endswith(".g_idx")  # without it the groups are neighbours
    assert refused > 2 * len(parts)
