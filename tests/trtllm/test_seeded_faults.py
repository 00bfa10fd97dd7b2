"""Faults put into whole rank files or into the ranks: each is caught, by a load that refuses or by logits that differ.

The control is the same harness without the fault, which passes.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_phixtral_checkpoint
from safetensors.torch import load_file, save_file
from torch_reference import load_reference
from trtllm.ranks import Ranks, largest_difference, relative_difference, understood
from trtllm.references import groupwise, logits_of, reference_with

from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint
from export.trtllm.parallel import Parallelism

BAR = 1e-4
IDS = np.random.default_rng(9).integers(0, 1000, 48).tolist()
TWO_RANKS = Parallelism(tp_size=2)
Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(scope="module")
def expected(trained_phixtral, trained_mixtral):
    """Family -> the reference's logits."""
    folders = {"phixtral": trained_phixtral, "mixtral": trained_mixtral}
    return {family: logits_of(load_reference(understood(folder)), IDS) for family, folder in folders.items()}


@pytest.fixture
def spoilt(tmp_path, rank_files, trained_phixtral, trained_mixtral):
    """(family, change of a rank's tensors) -> the changed copy of rank files on two ranks, float32."""

    def spoilt(family: str, change=lambda rank, tensors: None, config=lambda values: None) -> Path:
        source = {"phixtral": trained_phixtral, "mixtral": trained_mixtral}[family]
        folder = shutil.copytree(rank_files(source, precision="fp32", parallel=TWO_RANKS), tmp_path / "spoilt")
        for rank in range(2):
            path = folder / f"rank{rank}.safetensors"
            tensors = load_file(path)
            change(rank, tensors)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        values = json.loads((folder / "config.json").read_text())
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return spoilt


def of(tensors: Tensors, ending: str) -> list[str]:
    names = [name for name in tensors if name.endswith(ending)]
    assert names
    return names


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
def test_the_control_without_a_fault_passes(spoilt, expected, family):
    assert largest_difference(Ranks(spoilt(family)).logits(IDS), expected[family]) <= BAR


@pytest.mark.parametrize(("family", "sizes"), [("phixtral", (96, 96, 96)), ("mixtral", (64, 32, 32))])
@pytest.mark.parametrize("order", ["kqv", "qvk"])
def test_the_wrong_order_of_q_k_and_v_is_caught(spoilt, expected, family, sizes, order):
    def reorder(rank: int, tensors: Tensors) -> None:
        for kind in ("weight", "bias") if family == "phixtral" else ("weight",):
            for name in of(tensors, f"attention.qkv.{kind}"):
                parts = dict(zip("qkv", tensors[name].split(sizes), strict=True))
                tensors[name] = torch.cat([parts[letter] for letter in order])

    assert largest_difference(Ranks(spoilt(family, reorder)).logits(IDS), expected[family]) > 100 * BAR


def test_gate_before_up_is_caught(spoilt, expected):
    def swap(rank: int, tensors: Tensors) -> None:
        for name in of(tensors, "mlp.fc.weight"):
            up, gate = tensors[name].chunk(2, dim=1)
            tensors[name] = torch.cat([gate, up], dim=1)

    assert largest_difference(Ranks(spoilt("mixtral", swap)).logits(IDS), expected["mixtral"]) > 100 * BAR


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
def test_the_wrong_order_of_experts_is_caught(spoilt, expected, family):
    def roll(rank: int, tensors: Tensors) -> None:
        for ending in ("mlp.fc.weight", "mlp.proj.weight"):
            for name in of(tensors, ending):
                tensors[name] = tensors[name].roll(1, dims=0)

    assert largest_difference(Ranks(spoilt(family, roll)).logits(IDS), expected[family]) > 100 * BAR


def test_a_router_in_float16_is_caught(tmp_path, caplog):
    source = write_phixtral_checkpoint(tmp_path / "source", seed=2, num_experts=4, experts_per_token=2)
    write_checkpoint(understood(source), CheckpointOptions(precision="fp32"), tmp_path / "ranks")
    ids = [token % 263 for token in IDS]
    expected = logits_of(load_reference(understood(source)), ids)
    assert largest_difference(Ranks(tmp_path / "ranks").logits(ids), expected) <= BAR
    path = tmp_path / "ranks/rank0.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].half() for name in of(tensors, "mlp.router.weight")}, path)
    assert "but set to" not in caplog.text
    with caplog.at_level(logging.WARNING):
        ranks = Ranks(tmp_path / "ranks")
    assert "initialized as torch.float32 but set to torch.float16" in caplog.text
    assert largest_difference(ranks.logits(ids), expected) > BAR


@pytest.mark.parametrize("ending", ["attention.qkv.bias", "attention.dense.bias", "mlp.fc.bias", "mlp.proj.bias"])
def test_a_bias_missing_on_a_rank_is_caught(spoilt, ending):
    def lose(rank: int, tensors: Tensors) -> None:
        if rank == 1:
            del tensors[of(tensors, ending)[0]]

    with pytest.raises(RuntimeError, match=f"Required but not provided tensors:.*{ending}"):
        Ranks(spoilt("phixtral", lose))


@pytest.mark.parametrize("ending", ["attention.qkv.bias", "mlp.fc.bias"])
def test_a_bias_of_zeros_on_a_rank_is_caught(spoilt, expected, ending):
    def clear(rank: int, tensors: Tensors) -> None:
        for name in of(tensors, ending) if rank == 1 else ():
            tensors[name] = torch.zeros_like(tensors[name])

    assert largest_difference(Ranks(spoilt("phixtral", clear)).logits(IDS), expected["phixtral"]) > BAR


def test_experts_output_bias_added_by_every_rank_is_caught(monkeypatch, spoilt, expected):
    from tensorrt_llm.mapping import Mapping

    folder = spoilt("phixtral")
    monkeypatch.setattr(Mapping, "moe_tp_rank", property(lambda self: 0))  # each takes itself for the first
    assert largest_difference(Ranks(folder).logits(IDS), expected["phixtral"]) > BAR


def test_attentions_output_bias_added_by_every_rank_of_a_group_wise_product_is_caught(
    tmp_path, rank_files, packable_phixtral
):
    folder = shutil.copytree(
        rank_files(packable_phixtral, precision="int4_gptq", parallel=TWO_RANKS), tmp_path / "spoilt"
    )
    ids = [token % 277 for token in IDS]
    expected = logits_of(reference_with(understood(packable_phixtral), groupwise(64)), ids)
    assert relative_difference(Ranks(folder).logits(ids), expected) <= 1e-5
    first, second = (load_file(folder / f"rank{rank}.safetensors") for rank in range(2))
    biases = of(second, "attention.dense.bias")
    assert not any(second[name].any() for name in biases)
    save_file(second | {name: first[name] for name in biases}, folder / "rank1.safetensors")
    assert relative_difference(Ranks(folder).logits(ids), expected) > 1e-3


def test_a_config_without_rotary_pct_is_refused(spoilt):
    folder = spoilt("phixtral", config=lambda values: values.pop("rotary_pct"))
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'rotary_pct'"):
        Ranks(folder)


def test_heads_turned_as_a_whole_are_caught(spoilt, expected):
    def whole(values: dict) -> None:
        values |= {"rotary_pct": 1.0, "rotary_embedding_dim": 32}

    assert largest_difference(Ranks(spoilt("phixtral", config=whole)).logits(IDS), expected["phixtral"]) > 100 * BAR


def test_another_rotary_base_is_caught(spoilt, expected):
    folder = spoilt("mixtral", config=lambda values: values.update(rotary_base=10000.0))
    assert largest_difference(Ranks(folder).logits(IDS), expected["mixtral"]) > 100 * BAR


def test_softmax_before_the_choice_of_experts_is_caught(spoilt, expected):
    folder = spoilt("phixtral", config=lambda values: values["moe"].update(normalization_mode=0))
    assert largest_difference(Ranks(folder).logits(IDS), expected["phixtral"]) > 100 * BAR


def test_ranks_in_the_wrong_order_are_caught(spoilt, expected):
    folder = spoilt("phixtral")
    paths = [folder / f"rank{rank}.safetensors" for rank in range(2)]
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    # Sums do not care; what is gathered, the vocabulary, does.
    assert largest_difference(Ranks(folder).logits(IDS), expected["phixtral"]) > 100 * BAR
