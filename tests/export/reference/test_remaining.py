"""The reference without some experts: transformers' logits of the model whose gates and experts lack them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file
from torch_reference import load_reference, run_model

from export.checkpoint.folder import open_checkpoint
from export.checkpoint.tensor_table import Role
from export.families import read_model
from export.reference.model import Reference
from export.reference.remaining import RemainingReference
from export.reference.variants import Part, Variants
from export.routing import below_the_kept

WINDOWS = [np.random.default_rng(3).integers(0, 200, 60).tolist(), list(range(20))]


def phixtral(folder):
    return write_phixtral_checkpoint(folder, seed=1, num_experts=5, experts_per_token=2)


def mixtral(folder):
    return write_mixtral_checkpoint(folder, seed=1)


def granitemoe(folder):
    return write_granitemoe_checkpoint(folder, seed=1)


def without_the_last(source, folder, key):
    """A copy of a checkpoint whose layers lack their last expert."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    last = config[key] - 1
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {key: last}))
    kept = {}
    for name, values in load_file(source / "model.safetensors").items():
        stacked = values.ndim == 3 and values.shape[0] == last + 1
        if ".gate.weight" in name or "router.layer.weight" in name or stacked:
            kept[name] = np.ascontiguousarray(values[:last])
        elif f".experts.{last}." not in name and f".moe.mlp.{last}." not in name:
            kept[name] = values
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("write", [phixtral, mixtral, granitemoe])
def test_the_logits_are_those_of_a_model_that_lacks_the_expert(tmp_path, write):
    whole = read_model(open_checkpoint(write(tmp_path / "whole")))
    smaller = read_model(open_checkpoint(without_the_last(tmp_path / "whole", tmp_path / "less", "num_local_experts")))
    layers = whole.architecture.mixture_layers
    dropped = dict.fromkeys(layers, (whole.architecture.num_experts - 1,))
    torch_model = load_reference(smaller)
    found = RemainingReference(Reference(whole), layers, dropped).run(WINDOWS)
    for window, (logits, routed) in zip(WINDOWS, found, strict=True):
        expected, expected_routed = run_model(torch_model, window)
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(routed[..., :-1], expected_routed, atol=1e-4)
        assert (routed[..., -1] < routed[..., :-1].min(axis=-1)).all()


def test_variants_are_those_of_the_model_without_the_experts(tmp_path):
    model = read_model(open_checkpoint(phixtral(tmp_path / "model")))
    dropped = {0: (1,), 2: (0, 4)}
    variants = Variants(model, model.weights, [Part(role=Role.HEAD), Part(role=None)], dropped)
    logits = np.concatenate([part.copy() for part in variants.run(WINDOWS)], axis=-1)
    remaining = RemainingReference(Reference(model), model.architecture.mixture_layers, dropped)
    expected = np.concatenate([one for one, _ in remaining.run(WINDOWS)])
    for one in logits:
        np.testing.assert_allclose(one, expected, atol=1e-5)
    whole = np.concatenate([one for one, _ in Reference(model).run(WINDOWS)])
    assert np.abs(whole - expected).max() > 0.01


def test_logits_of_dropped_experts_lie_below_the_others_and_are_finite():
    logits = np.random.default_rng(1).standard_normal((2, 7, 5)).astype(np.float32)
    found = below_the_kept(logits, (1, 3))
    np.testing.assert_array_equal(found[..., [0, 2, 4]], logits[..., [0, 2, 4]])
    assert (found[..., [1, 3]].max(axis=-1) < found[..., [0, 2, 4]].min(axis=-1)).all()
    assert np.isfinite(found).all()
    assert below_the_kept(logits, ()) is logits
