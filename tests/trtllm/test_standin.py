"""The stand-in itself: its layout against the contract's closed form, its checks, its ranks, its swap of layers."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))
PACKING = CONTRACT["weight_only_packing"]
pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture
def folder(tmp_path, rank_files, packable_phixtral):
    """Rank files of one rank in float32, to be spoilt."""
    (source,) = rank_files(packable_phixtral, precision="fp32").glob("rank*")
    for path in (source, source.parent / "config.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def changed(folder: Path, change) -> Path:
    path = folder / "rank0.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def load(folder: Path):
    from tensorrt_llm.models import MODEL_MAP

    return MODEL_MAP["PhixtralForCausalLM"].from_checkpoint(str(folder))


# The layout of packed weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 64), (64, 192), (320, 128)])
@pytest.mark.parametrize(("form", "bits"), [("int4", 4), ("int4_sm90_dense", 4), ("int8", 8)])
def test_the_steps_give_the_contracts_closed_form(form, bits, rows, columns):
    from tensorrt_llm.quantization.functional import pack_codes

    codes = np.random.default_rng(1).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=np.int8)
    closed, words = PACKING["closed_form_derived"][form], np.zeros(rows * columns * bits // 32, dtype=np.uint32)
    k, n = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    names = {"k": k, "n": n, "K": rows, "N": columns, "q": codes.astype(np.int64)}
    place = eval(closed["nibble" if bits == 4 else "byte"], names)
    values = eval(closed["value"], names).astype(np.uint32) << (bits * place).astype(np.uint32)
    np.bitwise_or.at(words, eval(closed["word32"], names), values)
    packed = pack_codes(torch.from_numpy(codes), bits, interleaved=form != "int4_sm90_dense")
    assert packed.shape == (rows, columns * bits // 8)
    assert np.array_equal(packed.numpy().reshape(-1).view("<u4"), words)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_returns_the_codes_of_every_expert(bits):
    from tensorrt_llm.quantization.functional import pack_codes, unpack_codes

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 128, 64), dtype=torch.int8)
    packed = pack_codes(codes, bits, interleaved=True)
    assert torch.equal(unpack_codes(packed, bits, interleaved=True), codes)
    assert torch.equal(packed[1], pack_codes(codes[1], bits, interleaved=True))


def test_pairs_of_columns_come_with_the_even_one_low():
    from tensorrt_llm.quantization.functional import pack_codes, preprocess_weights_for_mixed_gemm

    codes = torch.randint(-8, 8, (64, 128), dtype=torch.int8)
    pairs = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
    packed = preprocess_weights_for_mixed_gemm(pairs, torch.quint4x2, torch.float16)
    assert torch.equal(packed, pack_codes(codes, 4, interleaved=True))


def test_quantising_at_load_rounds_halves_away_from_zero_and_keeps_zeros():
    from tensorrt_llm.quantization.functional import symmetric_quantize_last_axis_of_batched_matrix, unpack_codes

    weight = torch.zeros(64, 64, dtype=torch.float16)
    weight[:6, 0] = torch.tensor([-8.0, 7.9, 0.5, -0.5, 0.49, 2.5])
    packed, scale = symmetric_quantize_last_axis_of_batched_matrix(weight, torch.quint4x2)
    assert scale.dtype == torch.float16
    assert scale[:2].tolist() == [1.0, 0.0]
    codes = unpack_codes(packed, 4, interleaved=True)
    assert codes[:6, 0].tolist() == [-8, 7, 1, -1, 0, 3]
    assert not codes[:, 1:].any()


def test_a_shape_that_the_layout_does_not_fit_is_refused():
    from tensorrt_llm.quantization.functional import pack_codes

    with pytest.raises(ValueError, match=r"\[96, 64\]: both must be multiples of 64"):
        pack_codes(torch.zeros(96, 64, dtype=torch.int8), 4, interleaved=True)


# Loading ----------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_loads_without_a_word_about_its_tensors(folder, caplog):
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert [message for message in caplog.messages if not message.startswith("Implicitly setting")] == []


def test_a_missing_tensor_is_refused_by_name(folder):
    changed(folder, lambda tensors: tensors.pop("transformer.layers.1.mlp.fc.bias"))
    with pytest.raises(RuntimeError, match=r"Required but not provided tensors:.*layers\.1\.mlp\.fc\.bias"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused_by_name(folder):
    name = "transformer.ln_f.weight"
    changed(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(
        RuntimeError, match=r"not the same shape.*\(255,\), original: \(256,\).*transformer\.ln_f\.weight"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("transformer.layers.0.mlp.gate", torch.zeros(1), "Provided but not required tensors: "),
        ("transformer.ln_f.weight", torch.ones(256).half(), "initialized as torch.float32 but set to torch.float16"),
    ],
)
def test_a_tensor_too_many_or_of_another_dtype_is_told(folder, caplog, name, value, told):
    changed(folder, lambda tensors: tensors.update({name: value}))
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert told in caplog.text


def test_a_missing_head_is_taken_for_the_embedding(folder):
    # The library does not ask for it, and builds an engine whose head is the embedding.
    from tensorrt_llm.builder import BuildConfig, build

    changed(folder, lambda tensors: tensors.pop("lm_head.weight"))
    parameters = build(load(folder), BuildConfig()).parameters()
    assert torch.equal(parameters["lm_head.weight"], parameters["transformer.vocab_embedding.weight"])


@pytest.mark.parametrize("section", ["mapping", "quantization", "moe"])
def test_an_unknown_key_of_a_section_is_refused(folder, section):
    config = json.loads((folder / "config.json").read_text())
    config[section]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        load(folder)


def test_an_unknown_architecture_is_a_key_error():
    from tensorrt_llm.models import PretrainedConfig

    with pytest.raises(KeyError, match="PhixtralForCausalLMv2"):
        PretrainedConfig.from_dict({"architecture": "PhixtralForCausalLMv2"})


def test_awq_loses_biases_on_every_rank_but_the_first():
    from tensorrt_llm.models.convert_utils import preprocess_weights
    from tensorrt_llm.models.modeling_utils import PretrainedConfig

    names = ("layers.0.attention.dense.bias", "layers.0.mlp.proj.bias", "layers.0.mlp.fc.bias")
    for rank in range(2):
        config = PretrainedConfig(
            architecture="any", dtype="float16", hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
            mapping={"world_size": 2, "tp_size": 2, "moe_ep_size": 2, "rank": rank},
            quantization={"quant_algo": "W4A16_AWQ", "pre_quant_scale": True},
        )  # fmt: skip
        found = preprocess_weights({name: torch.ones(4) for name in names}, config)
        assert [bool(found[name].any()) for name in names] == [rank == 0, rank == 0, True]


# The swap of layers ----------------------------------------------------------------------------------------------


def quantised(network, **quantization):
    config = network.PhixtralConfig(
        architecture="PhixtralForCausalLM", dtype="float16", hidden_size=256, num_hidden_layers=1,
        num_attention_heads=4, vocab_size=64, hidden_act="gelu_new", intermediate_size=384, rotary_pct=0.5,
        rotary_base=10000.0, position_embedding_type="rope_gpt_neox", max_position_embeddings=32,
        moe={"num_experts": 4, "top_k": 2}, quantization=quantization,
    )  # fmt: skip
    model = network.PhixtralForCausalLM(config)
    layer = model.transformer.layers[0]
    modules = (layer.attention.qkv, layer.attention.dense, layer.mlp.router, model.lm_head)
    return [type(module).__name__ for module in modules], layer.mlp


@pytest.mark.parametrize(
    ("algo", "column", "row"),
    [
        ("W4A16", "WeightOnlyQuantLinear", "WeightOnlyQuantRowLinear"),
        ("W8A16", "WeightOnlyQuantLinear", "WeightOnlyQuantRowLinear"),
        ("W4A16_GPTQ", "WeightOnlyGroupwiseQuantLinear", "WeightOnlyGroupwiseQuantRowLinear"),
    ],
)
def test_linears_are_swapped_but_for_router_and_head(network, algo, column, row):
    kinds, mlp = quantised(network, quant_algo=algo, has_zero_point=algo == "W4A16_GPTQ")
    assert kinds == [column, row, "RowLinear", "Linear"]
    assert mlp.router.weight.dtype == torch.float32
    assert mlp.fc.bias.shape == (4, 384)
    if algo == "W4A16_GPTQ":
        assert (mlp.fc.weight.shape, mlp.fc.zero.shape) == ((4, 256, 96), (4, 2, 384))
    else:
        assert mlp.fc.weight.shape == (4, 256, 192 if algo == "W4A16" else 384)


def test_a_list_of_excluded_modules_replaces_the_librarys(network):
    kinds, mlp = quantised(network, quant_algo="W4A16", exclude_modules=["*mlp", "*lm_head"])
    assert kinds == ["WeightOnlyQuantLinear", "WeightOnlyQuantRowLinear", "WeightOnlyQuantRowLinear", "Linear"]
    assert mlp.fc.weight.shape == (4, 384, 256)  # the mixture is float again, and its router is quantised


# Ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1), (2, 1, 3), (8, 4, 2)])
def test_ranks_follow_the_contracts_rules(shape):
    from tensorrt_llm.mapping import Mapping

    tp_size, moe_ep_size, pp_size = shape
    rules = dict(rule.split(" = ", 1) for rule in CONTRACT["config_json"]["mapping_rules"] if "rank = " in rule)
    for rank in range(tp_size * pp_size):
        mapping = Mapping(tp_size * pp_size, rank, tp_size=tp_size, pp_size=pp_size, moe_ep_size=moe_ep_size)
        names = {"rank": rank, "tp_size": tp_size, "cp_size": 1, "moe_ep_size": moe_ep_size, "tp_rank": rank % tp_size}
        for name in ("tp_rank", "pp_rank", "moe_tp_rank", "moe_ep_rank"):
            assert getattr(mapping, name) == eval(rules[name], names), name


def test_ranks_layers_are_split_as_torch_splits_tensors():
    from tensorrt_llm.mapping import Mapping

    for num_layers, pp_size in [(7, 3), (32, 5), (3, 3)]:
        expected = [part.tolist() for part in torch.tensor_split(torch.arange(num_layers), pp_size)]
        found = [Mapping(pp_size, rank, pp_size=pp_size).pp_layers(num_layers) for rank in range(pp_size)]
        assert found == expected


def test_sums_over_ranks_are_taken_in_their_order():
    from tensorrt_llm.functional import allgather, allreduce
    from tensorrt_llm.world import World

    values = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert World(3).run(lambda rank: allreduce(values[rank], [0, 1, 2]).item()) == [0.0] * 3  # 1 is lost beside 1e8
    assert World(3).run(lambda rank: allreduce(values[rank], [0, 2, 1]).item()) == [1.0] * 3
    gathered = World(2).run(lambda rank: allgather(torch.tensor([[rank]]), [0, 1], gather_dim=-1).tolist())
    assert gathered == [[[0, 1]], [[0, 1]]]


def test_a_rank_that_fails_ends_the_meeting_of_all():
    from tensorrt_llm.functional import allreduce, recv
    from tensorrt_llm.world import World

    def work(rank):
        if rank == 1:
            raise ValueError("rank 1 is broken")
        return allreduce(torch.zeros(1), [0, 1, 2]) if rank == 0 else recv(torch.zeros(1), 1)

    with pytest.raises(ValueError, match="rank 1 is broken"):
        World(3).run(work)


def test_a_collective_without_other_ranks_is_refused():
    from tensorrt_llm.functional import allreduce

    with pytest.raises(RuntimeError, match=r"outside World\.run"):
        allreduce(torch.zeros(1), [0, 1])


def test_the_routers_topk_has_the_librarys_parameters_and_takes_the_lowest_of_equals():
    from tensorrt_llm.functional import topk
    from tensorrt_llm.layers import MOE, MoeConfig

    router = CONTRACT["router"]
    parameters = [
        [parameter.name] if parameter.default is parameter.empty else [parameter.name, parameter.default]
        for parameter in inspect.signature(topk).parameters.values()
    ]
    assert parameters == router["parameters"]
    mixture = MOE(MoeConfig(num_experts=4, top_k=2), 64, 64, "gelu_new", dtype="float32")
    experts, shares = mixture.route(torch.tensor(router["logits"]))
    assert experts.tolist() == router["top_2"]
    assert shares.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("activation", CONTRACT["activation_names"]["rejected_by_key_error"])
def test_an_activation_that_the_plugin_lacks_is_a_key_error(activation):
    from tensorrt_llm.layers import MOE, MoeConfig

    mixture = MOE(MoeConfig(num_experts=2, top_k=1), 64, 64, activation, bias=False, dtype="float32")
    with pytest.raises(KeyError, match=activation):
        mixture.apply_experts(torch.zeros(1, 64), torch.zeros(1, 1), torch.zeros(1, 1))


def test_attention_refuses_a_keyword_that_the_library_does_not_know():
    from tensorrt_llm.functional import AttentionMaskType, PositionEmbeddingType
    from tensorrt_llm.layers import Attention

    settings = {"attention_mask_type": AttentionMaskType.causal, "local_layer_idx": 0, "hidden_size": 64,
                "position_embedding_type": PositionEmbeddingType.rope_gpt_neox, "num_attention_heads": 2}  # fmt: skip
    with pytest.raises(TypeError, match="unexpected keyword argument 'rotary_percentage'"):
        Attention(**settings, rotary_percentage=0.4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm_before_bmm2'"):
        Attention(**settings)(torch.zeros(1, 64), norm_before_bmm2=True)
    with pytest.raises(AssertionError, match="Plugin only support masked MHA"):
        Attention(**{**settings, "attention_mask_type": AttentionMaskType.padding})(torch.zeros(1, 64))
