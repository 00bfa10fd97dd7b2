"""Quantised rank files in the stand-in: what their bytes say, unpacked by other code than packed them, against the
reference with dequantised weights.

W4A16 and W8A16 come packed (the writer's codes) or plain (floats, which the library quantises when it loads them);
the group-wise forms come packed for GPTQ, as pairs of rows for AWQ.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mixtral_checkpoints import write_mixtral_checkpoint
from trtllm.ranks import Ranks, relative_difference, shares, understood
from trtllm.references import channelwise, groupwise, logits_of, reference_with

from export.errors import ExportError
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint, write_checkpoint
from export.trtllm.parallel import Parallelism

BAR = 1e-5  # the largest difference of a logit over the largest logit: both sides sum in float32
BITS = {"int8": 8, "int4": 4}
IDS = np.random.default_rng(8).integers(0, 277, 48).tolist()
SHARES = [(1, 1), (2, 1), (1, 2), (2, 2)]  # moe_tp_size, moe_ep_size
pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(scope="module")
def packable_mixtral(tmp_path_factory):
    """A random Mixtral whose sizes the packed layouts take on up to two ranks; N * D is not H."""
    folder = tmp_path_factory.mktemp("packable") / "mixtral"
    sizes = {"hidden_size": 128, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 256, "num_layers": 3}
    return write_mixtral_checkpoint(folder, seed=6, num_experts=4, vocab_size=371, dtype="float16", **sizes)


@pytest.mark.parametrize(("moe_tp", "moe_ep"), SHARES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_phixtral_gives_the_logits_of_its_dequantised_weights(
    rank_files, packable_phixtral, precision, moe_tp, moe_ep
):
    ranks = Ranks(rank_files(packable_phixtral, precision=precision, parallel=shares(moe_tp, moe_ep)))
    expected = logits_of(reference_with(understood(packable_phixtral), channelwise(BITS[precision])), IDS)
    assert relative_difference(ranks.logits(IDS), expected) <= BAR


@pytest.mark.parametrize(("moe_tp", "moe_ep"), SHARES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_plain_phixtral_is_quantised_when_it_is_loaded(rank_files, packable_phixtral, precision, moe_tp, moe_ep):
    parallel = shares(moe_tp, moe_ep)
    ranks = Ranks(rank_files(packable_phixtral, precision=precision, parallel=parallel, plain=True))
    rounding = channelwise(BITS[precision])
    expected = logits_of(reference_with(understood(packable_phixtral), rounding, parallel.tp_size, moe_tp), IDS)
    assert relative_difference(ranks.logits(IDS), expected) <= BAR


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_plain_and_packed_are_the_same_parameters_on_one_rank(rank_files, packable_phixtral, precision):
    packed, plain = (
        Ranks(rank_files(packable_phixtral, precision=precision, plain=plain)).models[0] for plain in (False, True)
    )
    found = dict(plain.named_parameters())
    for name, parameter in packed.named_parameters():
        assert torch.equal(parameter.value, found[name].value), name


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("precision", ["int8", "int4", "int4_gptq"])
def test_matrices_are_laid_out_for_the_gpu_that_reads_them(monkeypatch, rank_files, packable_phixtral, precision, sm):
    expected = Ranks(rank_files(packable_phixtral, precision=precision, sm=80)).logits(IDS)
    folder = rank_files(packable_phixtral, precision=precision, sm=sm)
    monkeypatch.setenv("STANDIN_SM", str(sm))
    assert np.array_equal(Ranks(folder).logits(IDS), expected)
    monkeypatch.setenv("STANDIN_SM", str(170 - sm))
    assert relative_difference(Ranks(folder).logits(IDS), expected) > 0.1  # bytes for another GPU are noise


def test_awq_is_laid_out_when_it_is_loaded_whatever_the_gpu(monkeypatch, rank_files, packable_phixtral):
    folder = rank_files(packable_phixtral, precision="int4_awq")
    expected = Ranks(folder).logits(IDS)
    monkeypatch.setenv("STANDIN_SM", "90")
    assert np.array_equal(Ranks(folder).logits(IDS), expected)


@pytest.mark.parametrize(
    ("precision", "moe_tp", "moe_ep"),
    [*(("int4_gptq", *share) for share in SHARES), ("int4_awq", 1, 1), ("int4_awq", 2, 1)],
)
def test_group_wise_phixtral_gives_the_logits_of_its_dequantised_weights(
    rank_files, packable_phixtral, precision, moe_tp, moe_ep
):
    folder = rank_files(packable_phixtral, precision=precision, parallel=shares(moe_tp, moe_ep))
    group_size = json.loads((folder / "config.json").read_text())["quantization"]["group_size"]
    expected = logits_of(reference_with(understood(packable_phixtral), groupwise(group_size)), IDS)
    assert relative_difference(Ranks(folder).logits(IDS), expected) <= BAR


def test_awq_with_expert_parallel_biases_is_refused_since_the_library_clears_them(packable_phixtral, packable_mixtral):
    options = CheckpointOptions(precision="int4_awq", parallel=shares(1, 2))
    with pytest.raises(ExportError, match=r"moe_ep_size is 2: .* clears the biases .* use moe_ep_size 1, or int4_gptq"):
        plan_checkpoint(understood(packable_phixtral), options)
    plan_checkpoint(understood(packable_mixtral), options)  # has none to lose


@pytest.mark.parametrize(
    ("precision", "sizes", "told"),
    [
        ("int4", {"hidden_size": 192}, "attention.qkv of a rank has 192 inputs, expected a multiple of 128"),
        ("int8", {"hidden_size": 192}, "attention.dense of a rank has 192 outputs, expected a multiple of 128"),
        ("int4_gptq", {"hidden_size": 192}, "attention.dense of a rank has 192 outputs, expected a multiple of 128"),
    ],
)
def test_sizes_that_the_library_would_round_up_are_refused(tmp_path, precision, sizes, told):
    """Its linears want the side that is not cut to be a multiple of 64 * tp_size too, or ask for larger tensors."""
    from tensorrt_llm.quantization.layers import WeightOnlyQuantRowLinear

    assert WeightOnlyQuantRowLinear(256, 192, tp_size=2).out_features == 256
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 256, "num_experts": 4}
    source = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1, **heads, **sizes)
    with pytest.raises(ExportError, match=told):
        plan_checkpoint(understood(source), CheckpointOptions(precision=precision, parallel=shares(2, 1)))
    plan_checkpoint(understood(source), CheckpointOptions(precision=precision))


@pytest.mark.parametrize(
    ("hidden", "group_size"),
    [(256, 128), (128, 64)],  # two ranks: groups of 128 want H a multiple of 256
)
def test_the_group_size_is_one_that_the_library_does_not_round_sizes_up_for(tmp_path, hidden, group_size):
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 256, "num_experts": 4}
    source = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1, hidden_size=hidden, dtype="float16", **heads)
    options = CheckpointOptions(precision="int4_gptq", parallel=shares(2, 1))
    write_checkpoint(understood(source), options, tmp_path / "ranks")
    assert json.loads((tmp_path / "ranks/config.json").read_text())["quantization"]["group_size"] == group_size
    expected = logits_of(reference_with(understood(source), groupwise(group_size)), IDS)
    assert relative_difference(Ranks(tmp_path / "ranks").logits(IDS), expected) <= BAR


@pytest.mark.parametrize("precision", ["int8", "int4", "int4_gptq", "int4_awq"])
def test_the_trained_phixtral_gives_the_logits_of_its_dequantised_weights(rank_files, trained_phixtral, precision):
    ranks = Ranks(rank_files(trained_phixtral, precision=precision))
    rounding = channelwise(BITS[precision]) if precision in BITS else groupwise(64)
    expected = logits_of(reference_with(understood(trained_phixtral), rounding), IDS)
    assert relative_difference(ranks.logits(IDS), expected) <= BAR


@pytest.mark.parametrize(("tp", "ep", "pp"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("precision", ["int8", "int4", "int4_gptq", "int4_awq"])
def test_mixtral_gives_the_logits_of_its_dequantised_weights(rank_files, packable_mixtral, precision, tp, ep, pp):
    parallel = Parallelism(tp_size=tp, moe_ep_size=ep, pp_size=pp)
    folder = rank_files(packable_mixtral, precision=precision, parallel=parallel)
    group_size = json.loads((folder / "config.json").read_text())["quantization"].get("group_size")
    rounding = channelwise(BITS[precision]) if precision in BITS else groupwise(group_size)
    expected = logits_of(reference_with(understood(packable_mixtral), rounding), IDS)
    assert relative_difference(Ranks(folder).logits(IDS), expected) <= BAR


@pytest.mark.parametrize("precision", ["int4", "int4_gptq", "int4_awq"])
def test_the_trained_mixtral_in_bfloat16_gives_the_logits_of_its_dequantised_weights(
    rank_files, trained_mixtral, precision
):
    folder = rank_files(trained_mixtral, precision=precision, dtype="bfloat16")
    group_size = json.loads((folder / "config.json").read_text())["quantization"].get("group_size")
    dtype = torch.bfloat16
    rounding = channelwise(BITS[precision], dtype) if precision in BITS else groupwise(group_size, dtype)
    expected = logits_of(reference_with(understood(trained_mixtral), rounding), IDS)
    assert relative_difference(Ranks(folder).logits(IDS), expected) <= BAR


def test_a_code_of_one_expert_moved_by_one_is_seen(rank_files, packable_phixtral):
    folder = rank_files(packable_phixtral, precision="int4")
    expected = Ranks(folder).logits(IDS)
    ranks = Ranks(folder)
    weight = ranks.models[0].transformer.layers[0].mlp.fc.weight
    weight.value[2, 0, 0] ^= 1
    assert not np.array_equal(ranks.logits(IDS), expected)
