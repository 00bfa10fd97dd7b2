"""qwen2_moe and qwen3_moe through the library's class in the stand-in: rank files against transformers' own models."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import numpy as np
import pytest
from qwen_checkpoints import write_qwen_checkpoint
from torch_reference import load_reference
from trtllm.rank_faults import Fault, moved, off_by_a_bit, setting, times, values, with_fault, zero_at
from trtllm.ranks import Ranks, largest_difference, relative_difference, understood
from trtllm.references import answer_of, channelwise, groupwise, logits_of, reference_with

from cli.main import main
from export.errors import ExportError
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from export.trtllm.parallel import Parallelism
from trt_build.trtllm.questions.weights import RankFolder, ask_about_weights

BAR = 1e-4
QUANTISED_BAR = 1e-5  # over the largest logit
FAMILIES = ("qwen2_moe", "qwen3_moe")
BITS = {"int8": 8, "int4": 4}
# tp_size, moe_ep_size, pp_size. Two key/value heads: on four ranks each serves two.
SHARES = [(1, 1, 1), (2, 1, 1), (4, 2, 1), (2, 2, 2)]
SIZES = {"num_experts": 6, "experts_per_token": 3, "vocab_size": 372, "num_layers": 3, "num_heads": 4}
PACKABLE = {
    "num_experts": 4, "experts_per_token": 2, "vocab_size": 372, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "hidden_size": 256, "ffn_size": 384, "dtype": "float16",
}  # fmt: skip
IDS = np.random.default_rng(4).integers(0, 372, 48).tolist()


@pytest.fixture(scope="module", autouse=True)
def own_class(tensorrt_llm) -> ModuleType:
    """trt_build/trtllm/qwen3_moe.py, imported unchanged into the stand-in."""
    return importlib.import_module("trt_build.trtllm.qwen3_moe")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return {family: write_qwen_checkpoint(folder / family, family, seed=5, **SIZES) for family in FAMILIES}


@pytest.fixture(scope="module")
def packable(tmp_path_factory):
    """Sizes that the packed layouts take on two ranks."""
    folder = tmp_path_factory.mktemp("packable-qwen")
    shared = {"config": {"shared_expert_intermediate_size": 128}}
    return {
        "qwen2_moe": write_qwen_checkpoint(folder / "qwen2", "qwen2_moe", seed=3, **shared, **PACKABLE),
        "qwen3_moe": write_qwen_checkpoint(folder / "qwen3", "qwen3_moe", seed=3, head_dim=64, **PACKABLE),
    }


@pytest.fixture(scope="module")
def references(sources):
    return {family: load_reference(understood(source)) for family, source in sources.items()}


def parallel(tp: int, ep: int, pp: int) -> Parallelism:
    return Parallelism(tp_size=tp, moe_ep_size=ep, pp_size=pp)


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "ep", "pp"), SHARES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_random_model_are_transformers(rank_files, sources, references, family, tp, ep, pp):
    expected = logits_of(references[family], IDS)
    ranks = Ranks(rank_files(sources[family], precision="fp32", parallel=parallel(tp, ep, pp)))
    assert largest_difference(ranks.logits(IDS), expected) <= BAR


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_through_the_cache_are_transformers(rank_files, sources, references, family):
    ranks = Ranks(rank_files(sources[family], precision="fp32", parallel=parallel(2, 2, 1)))
    assert ranks.greedy(IDS[:12], 16)[0] == answer_of(references[family], IDS[:12], 16)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_chosen_experts_are_divided_by_their_sum_where_the_config_says_so(
    tmp_path, rank_files, family, normalised
):
    source = write_qwen_checkpoint(tmp_path / "mixture", family, seed=9, config={"norm_topk_prob": normalised}, **SIZES)
    ranks = Ranks(rank_files(source, precision="fp32"))
    expected = logits_of(load_reference(understood(source)), IDS)
    assert largest_difference(ranks.logits(IDS), expected) <= BAR


def test_the_norms_of_queries_and_keys_add_the_configs_epsilon(tmp_path, rank_files, own_class):
    """The library's class adds 1e-5 whatever config.json says."""
    from tensorrt_llm.models import MODEL_MAP, QWenForCausalLM

    source = write_qwen_checkpoint(tmp_path / "mixture", "qwen3_moe", seed=9, config={"rms_norm_eps": 0.2}, **SIZES)
    folder = rank_files(source, precision="fp32")
    expected = logits_of(load_reference(understood(source)), IDS)
    assert largest_difference(Ranks(folder).logits(IDS), expected) <= BAR
    MODEL_MAP[own_class.ARCHITECTURE] = QWenForCausalLM
    try:
        assert largest_difference(Ranks(folder).logits(IDS), expected) > 10 * BAR
    finally:
        MODEL_MAP[own_class.ARCHITECTURE] = own_class.Qwen3MoeForCausalLM


@pytest.mark.parametrize(
    ("family", "precision", "plain", "tp", "ep"),
    [
        ("qwen2_moe", "int4", False, 1, 1),
        ("qwen2_moe", "int4", False, 2, 2),
        ("qwen2_moe", "int8", False, 2, 1),
        ("qwen2_moe", "int4", True, 2, 1),
        ("qwen3_moe", "int4", False, 2, 1),
        ("qwen3_moe", "int8", True, 2, 2),
        ("qwen3_moe", "int4_gptq", False, 2, 2),
        ("qwen3_moe", "int4_awq", False, 2, 1),
    ],
)
def test_logits_are_those_of_the_dequantised_weights(rank_files, packable, family, precision, plain, tp, ep):
    folder = rank_files(packable[family], precision=precision, plain=plain, parallel=parallel(tp, ep, 1))
    group_size = json.loads((folder / "config.json").read_text())["quantization"].get("group_size")
    rounding = channelwise(BITS[precision]) if precision in BITS else groupwise(group_size)
    cuts = (tp, tp // ep) if plain else (1, 1)  # the library quantises what a rank holds
    expected = logits_of(reference_with(understood(packable[family]), rounding, *cuts), IDS)
    assert relative_difference(Ranks(folder).logits(IDS), expected) <= QUANTISED_BAR


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "precision", "share"),
    [
        ("qwen2_moe", "fp16", (2, 1, 2)),
        ("qwen2_moe", "int4", (1, 1, 1)),
        ("qwen2_moe", "int4", (2, 2, 1)),
        ("qwen3_moe", "fp16", (2, 2, 1)),
        ("qwen3_moe", "int8", (2, 1, 2)),
        ("qwen3_moe", "int4_gptq", (1, 1, 1)),
    ],
)
def test_sound_rank_files_are_the_checkpoints(rank_files, packable, family, precision, share):
    options = {"precision": precision, "parallel": parallel(*share)}
    plan = plan_checkpoint(understood(packable[family]), CheckpointOptions(**options))
    answer = ask_about_weights(RankFolder(plan=plan, folder=rank_files(packable[family], **options), max_sequence=64))
    assert answer.failures == ()
    assert answer.figures["num_weights"] >= sum(row.num_elements for row in plan.model.weights.table.values())


SHARED = "transformer.layers.1.mlp.shared_expert"
NORM = "transformer.layers.1.attention.k_layernorm.weight"


def halves_swapped(_, tensors):
    for ending in ("weight", "per_channel_scale"):
        name = f"{SHARED}.fc.{ending}"
        if name in tensors:
            flat = tensors[name].reshape(-1)
            tensors[name] = np.roll(flat, flat.size // 2).reshape(tensors[name].shape)


OWN_FAULTS = {
    "the shared expert's first times 1.03": ("qwen2_moe", times(f"{SHARED}.fc", 1.03)),
    "the shared expert's first moved": ("qwen2_moe", moved(f"{SHARED}.fc")),
    "gate before up": ("qwen2_moe", Fault(halves_swapped, needs=f"{SHARED}.fc.weight")),
    "the shared expert's second of zeros": ("qwen2_moe", times(f"{SHARED}.proj", 0.0)),
    "the shared expert's share of zeros": ("qwen2_moe", times(f"{SHARED}_gate", 0.0)),
    "one bias of zero": ("qwen2_moe", values("transformer.layers.1.attention.qkv.bias", zero_at(3))),
    "a narrower shared expert": ("qwen2_moe", setting("moe_shared_expert_intermediate_size", 64)),
    "a class without a shared expert": ("qwen2_moe", setting("qwen_type", "qwen3_moe")),
    "no biases": ("qwen2_moe", setting("attn_bias", False)),
    "a norm of keys off by a bit": ("qwen3_moe", values(NORM, off_by_a_bit)),
    "biases": ("qwen3_moe", setting("attn_bias", True)),
    "narrower experts": ("qwen3_moe", setting("moe_intermediate_size", 192)),
}


@pytest.mark.parametrize("name", OWN_FAULTS)
def test_each_fault_of_what_these_families_have_is_found(rank_files, packable, tmp_path, name):
    family, fault = OWN_FAULTS[name]
    options = {"precision": "int4", "parallel": parallel(2, 1, 1)}
    plan = plan_checkpoint(understood(packable[family]), CheckpointOptions(**options))
    folder = with_fault(rank_files(packable[family], **options), tmp_path / "faulty", fault)
    assert folder is not None
    assert ask_about_weights(RankFolder(plan=plan, folder=folder, max_sequence=64)).failures


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_layers_without_experts_are_refused_by_name(tmp_path, family, layers):
    source = write_qwen_checkpoint(tmp_path / "mixed", family, seed=1, config=layers, **SIZES)
    told = r"dense_layers is \(.*\), which TensorRT-LLM's Qwen.MoeForCausalLM does not compute; build for onnxruntime"
    with pytest.raises(ExportError, match=told):
        plan_checkpoint(understood(source), CheckpointOptions(precision="fp16"))


@pytest.mark.parametrize("precision", ["int4_gptq", "int4_awq"])
def test_group_wise_codes_are_refused_where_the_library_loses_the_shared_expert(packable, precision):
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig

    with pytest.raises(
        ExportError, match=f"{precision}: when TensorRT-LLM quantises in groups it makes a mixture with"
    ):
        plan_checkpoint(understood(packable["qwen2_moe"]), CheckpointOptions(precision=precision))
    config = dict(plan_checkpoint(understood(packable["qwen2_moe"]), CheckpointOptions()).config)
    config["quantization"] = dict(
        plan_checkpoint(understood(packable["qwen3_moe"]), CheckpointOptions(precision=precision)).config[
            "quantization"
        ]
    )
    model = MODEL_MAP["Qwen2MoeForCausalLM"](PretrainedConfig.from_dict(config))
    assert not [name for name, _ in model.named_parameters() if "shared_expert" in name]


def test_a_shared_expert_that_ranks_cannot_share_is_refused(tmp_path):
    wide = {"shared_expert_intermediate_size": 90}
    source = write_qwen_checkpoint(tmp_path / "odd", "qwen2_moe", seed=1, config=wide, **SIZES)
    with pytest.raises(
        ExportError, match="90 rows of the expert beside the others cannot be divided evenly by tp_size 4"
    ):
        plan_checkpoint(understood(source), CheckpointOptions(precision="fp16", parallel=parallel(4, 1, 1)))


def test_sizes_of_a_shared_expert_that_the_library_would_round_up_are_refused(tmp_path):
    wide = {"shared_expert_intermediate_size": 96}
    source = write_qwen_checkpoint(tmp_path / "odd", "qwen2_moe", seed=1, config=wide, **PACKABLE)
    with pytest.raises(ExportError, match="mlp.shared_expert.proj of a rank has 96 inputs, expected a multiple of 64"):
        plan_checkpoint(understood(source), CheckpointOptions())


# From the checkpoint to a repository ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tp"), [("qwen2_moe", 1), ("qwen3_moe", 2)])
def test_an_engine_is_planned_built_verified_and_packaged(
    packable, tmp_path, trtllm_build, capfd, monkeypatch, family, tp
):
    monkeypatch.setenv("STANDIN_GPUS", str(tp))
    source, engine = packable[family], tmp_path / "engine"
    flags = ["--checkpoint", str(source), "--precision", "int8", "--tp-size", str(tp), "--output", str(engine)]
    assert main(["plan", *flags, "--backend", "tensorrt-llm", "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)
    assert main(["build", *flags, "--backend", "tensorrt-llm", "--until", "engine"]) == 0
    folder = engine.with_name("engine.checkpoint")
    for rank in range(tp):
        name = f"rank{rank}.safetensors"
        assert planned["files"][name] == (folder / name).stat().st_size
    moved_away = folder.rename(tmp_path / "elsewhere")
    capfd.readouterr()
    words = ["--reference", str(source), "--tokens", "24", "--trtllm-checkpoint", str(moved_away), "--json"]
    assert main(["verify", str(engine), *words]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [answer["passed"] for answer in found["questions"]] == [True] * 3
    assert found["questions"][1]["logits"] <= 1e-5
    assert main(["package", str(engine), "--name", "served", "--output", str(tmp_path / "repository")]) == 0
    assert len(list((tmp_path / "repository").rglob("rank*.engine"))) == tp


@pytest.mark.parametrize(("family", "normalised"), [("qwen2_moe", True), ("qwen3_moe", False)])
def test_the_llm_api_serves_what_its_class_computes(tmp_path, sources, capsys, family, normalised):
    words = ["--backend", "llmapi", "--name", "mixture"]
    assert main(["package", str(sources[family]), *words, "--output", str(tmp_path / "repository")]) == 0
    assert (tmp_path / "repository/mixture/1/model.yaml").is_file()
    other = {"norm_topk_prob": normalised, "mlp_only_layers": [0]}
    source = write_qwen_checkpoint(tmp_path / "other", family, seed=1, config=other, **SIZES)
    assert main(["package", str(source), *words, "--output", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert f"router is Router(score='softmax', normalise={normalised}" in told
    assert "dense_layers is (0,), which TensorRT-LLM's Qwen" in told
    packed = write_qwen_checkpoint(tmp_path / "packed", family, seed=1, spelling="packed", **SIZES)
    assert main(["package", str(packed), *words, "--output", str(tmp_path / "none")]) == 2
    assert "its experts are packed as transformers 5 packs them" in capsys.readouterr().err
