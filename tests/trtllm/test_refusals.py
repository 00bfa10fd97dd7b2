"""What is refused before work is spent: every refusal that contract.json lists has a case here, each with its message.

A case is a build up to some stage on a machine that is told of; nothing is written.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from trtllm.weight_layout import CONTRACT

from export.errors import ConfigError, ExportError, QuantizationError
from export.trtllm.parallel import Parallelism
from trt_build.errors import EngineError
from trt_build.machine.readings import Gpu, Machine
from trt_build.trtllm.build import build_trtllm
from trt_build.trtllm.options import TrtllmOptions

REFUSALS = {row["id"]: row for row in CONTRACT["refusals"]["rows"]}
FOLDER = Path(__file__).parent
PHIXTRAL = {"hidden_size": 192, "num_heads": 6, "ffn_size": 448, "num_layers": 2, "rotary_dim": 16, "vocab_size": 263}
NOBODY = Machine(gpus=None)


def machine(*sms: int, library: str | None = "1.2.0", visible: int | None = None) -> Machine:
    gpus = tuple(Gpu(index=index, name=f"GPU {index}", sm=sm) for index, sm in enumerate(sms))
    return Machine(gpus=gpus, visible=visible, tensorrt_llm=library)


class Case(NamedTuple):
    """Of which checkpoint an engine is asked for, with which options and where, and what is said to it."""

    family: str
    options: dict[str, Any]
    told: str
    error: type[Exception] = ExportError
    where: Machine = NOBODY
    until: str = "plan"


# Of the contract; several cases of one refusal are numbered.
CASES = {
    "integer weights on SM 100 to 119": Case(
        "phixtral", {"gpu_sm": 100},
        r"SM 100 \(Blackwell\) has no products of integer weights .*; build fp16 or bf16 there, or int4 for another",
    ),
    "integer weights on SM 100 to 119: this machine's": Case(
        "phixtral", {"precision": "int8"}, "SM 103 .* or int8 for another GPU", where=machine(103),
    ),
    "bfloat16 below SM 80": Case(
        "phixtral", {"precision": "bf16", "gpu_sm": 75}, "SM 75 has no bfloat16; build with --dtype float16",
    ),
    "bfloat16 below SM 80: beside integers": Case(
        "phixtral", {"dtype": "bfloat16"}, "SM 70 has no bfloat16; build with --dtype float16", where=machine(70),
    ),
    "GPUs below SM 70": Case(
        "phixtral", {"precision": "fp16", "gpu_sm": 61},
        "SM 61 is older than TensorRT-LLM's kernels, which begin with SM 70",
    ),
    "packed matrices for another GPU": Case(
        "phixtral", {"gpu_sm": 90},
        r"--gpu-sm is 90 and this machine has GPU 0 \(SM 80\), GPU 1 \(SM 86\): an engine is built on the GPU that it "
        "is for; leave --gpu-sm out, or stop with --until checkpoint",
        EngineError, machine(80, 86), "engine",
    ),
    "K and N not multiples of 64": Case(
        "odd", {},
        r"attention.qkv of a rank has 120 outputs, expected a multiple of 64, which the library's packed layout"
        "(?s:.*)mlp.fc of a rank has 56 outputs, .*; share the model among fewer ranks, or build fp16",
    ),
    "K and N not multiples of 64: of eight bits": Case(
        "odd", {"precision": "int8"}, "mlp.proj of a rank has 56 inputs, expected a multiple of 64",
    ),
    "K and N not multiples of 64: of a rank": Case(
        "mixtral", {"tp_size": 2}, "mlp.proj of a rank has 96 inputs, expected a multiple of 64",
    ),
    "sizes that are rounded up": Case(
        "even", {"tp_size": 2, "moe_ep_size": 2},
        "attention.dense of a rank has 192 outputs, expected a multiple of 128",
    ),
    "group sizes other than 64 and 128": Case(
        "phixtral", {"precision": "int4_gptq", "group_size": 32},
        "the group size is 32, expected 128 or 64, the library's own",
    ),
    "groups that do not divide a rank's inputs": Case(
        "phixtral", {"precision": "int4_awq", "group_size": 128},
        r"groups of 128 do not divide the features of a rank \(attention.qkv 576 outputs, attention.qkv 192 inputs, .*"
        r"mlp.fc 192 inputs, mlp.proj 448 inputs\); use fewer ranks",
    ),
    "experts that do not divide among ep": Case(
        "phixtral", {"precision": "fp16", "tp_size": 2, "moe_ep_size": 2},
        "5 experts cannot be divided evenly by moe_ep_size 2",
    ),
    "expert rows that do not divide among moe_tp": Case(
        "phixtral", {"precision": "fp16", "tp_size": 3},
        "448 rows of an expert cannot be divided evenly by moe_tp_size 3",
    ),
    "moe_tp times moe_ep is not tp": Case(
        "mixtral", {"precision": "fp16", "tp_size": 4, "moe_tp_size": 2, "moe_ep_size": 4},
        "moe_tp_size 2 times moe_ep_size 4 is not tp_size 4",
    ),
    "moe_tp times moe_ep is not tp: more blocks than ranks": Case(
        "mixtral", {"precision": "fp16", "tp_size": 2, "moe_ep_size": 4},
        "moe_tp_size 1 times moe_ep_size 4 is not tp_size 2",
    ),
    "heads that do not divide among tp": Case(
        "phixtral", {"precision": "fp16", "tp_size": 4}, "6 attention heads cannot be divided evenly by tp_size 4",
    ),
    "key/value heads that neither divide nor repeat": Case(
        "mixtral", {"precision": "fp16", "tp_size": 3},
        "2 key/value heads can be neither divided among nor repeated over tp_size 3",
    ),
    "pipeline parallelism of a Phi network": Case(
        "phixtral", {"precision": "fp16", "pp_size": 2},
        "pp_size is 2: TensorRT-LLM's Phi networks cannot be cut between layers; use tp_size",
    ),
    "more pipeline ranks than layers": Case(
        "mixtral", {"precision": "fp16", "pp_size": 3}, "pp_size is 3, expected at most the number of layers, 2",
    ),
    "workers that do not know the class": Case(
        "phixtral", {"workers": 2},
        "--workers is 2: trtllm-build starts workers that do not know moeship's own PhixtralForCausalLM; "
        "use --workers 1, which builds the ranks one after the other",
        EngineError,
    ),
    "a vocabulary that is filled up without a bias": Case(
        "uneven", {"precision": "fp16", "tp_size": 2},
        "the vocabulary of 371 rows is padded to 372 for tp_size 2, and this model's head has no bias .*; use a "
        "tp_size that divides 371",
        EngineError,
    ),
    "biases that loading W4A16_AWQ clears": Case(
        "wide", {"precision": "int4_awq", "tp_size": 2, "moe_ep_size": 2},
        "moe_ep_size is 2: when TensorRT-LLM loads W4A16_AWQ it clears the biases of the experts that are not on the "
        "first rank; use moe_ep_size 1, or int4_gptq",
    ),
    "group-wise int8 experts": Case(
        "mixtral", {"precision": "int8_gptq"},
        r"choosing the precision: 'int8_gptq' is unknown; did you mean int4_gptq\? TensorRT-LLM has: fp32, fp16, bf16, "
        "int8, int4, int4_gptq, int4_awq",
        QuantizationError,
    ),
    "FP8 experts with biases": Case(
        "phixtral", {"precision": "fp8"}, "choosing the precision: 'fp8' is unknown. TensorRT", QuantizationError,
    ),
    "releases without engines": Case(
        "phixtral", {},
        "TensorRT-LLM 1.3.0 is installed, engines are built with 1.0 to 1.2, the last releases that build engines; "
        "use one of these, or 'moeship package --backend llmapi' for later releases",
        EngineError, machine(80, library="1.3.0"),
    ),
    "releases without engines: before the first": Case(
        "phixtral", {}, "TensorRT-LLM 0.21.0 is installed, engines are built with 1.0 to 1.2", EngineError,
        machine(80, library="0.21.0"),
    ),
    "sequences beyond the model's positions": Case(
        "phixtral", {"max_seq_len": 65}, "found 65 tokens, expected 1 to 64, the model's own", ConfigError,
    ),
    "a sliding window": Case(
        "sliding", {"precision": "fp16"},
        "the model's attention sees only the last 48 positions, and the engine's network sees all positions; build it "
        "with --max-seq-len 48 or less, where that is the same",
        EngineError,
    ),
    "an epsilon that PhiForCausalLM does not read": Case(
        "fine", {"precision": "fp16"},
        "norms add 1e-06 to the variance, and TensorRT-LLM's PhiForCausalLM adds 1e-05 whatever config.json says; "
        "build for onnxruntime",
    ),
    "key/value heads that PhiForCausalLM does not read": Case(
        "shared", {"precision": "fp16"},
        "2 key/value heads serve 6 attention heads, and TensorRT-LLM's PhiForCausalLM needs one for each; build for",
    ),
    "a mixture of one expert": Case(
        "one", {"precision": "fp16", "experts_per_token": 1},
        "one expert can be chosen, and TensorRT-LLM's MixtralForCausalLM takes a mixture of one for a dense model, "
        "whose tensors have other names; build for onnxruntime",
    ),
    "a batch larger than its tokens": Case(
        "phixtral", {"max_batch_size": 64, "max_num_tokens": 63},
        "--max-num-tokens is 63, expected at least --max-batch-size 64: every sequence of a step adds a token",
        EngineError,
    ),
}  # fmt: skip
# Refusals of what an earlier run left, or of values that only reading shows.
ELSEWHERE = {
    "an engine of another release": ("test_build_stages.py", "test_an_engine_of_another_release_is_refused"),
    "an engine for another GPU": ("test_build_stages.py", "test_an_engine_that_was_built_otherwise_is_refused"),
    "float16 that does not hold a value": ("test_resumed_checkpoint.py", "test_a_value_beyond_float16_is_refused"),
}
# Ours alone: values that mean nothing, and requests that contradict themselves.
OWN = {
    "no ranks": Case("phixtral", {"precision": "fp16", "tp_size": 0}, "tp_size is 0, expected 1 or more"),
    "no pipeline": Case("mixtral", {"precision": "fp16", "pp_size": -1}, "pp_size is -1, expected 1 or more"),
    "no blocks of experts": Case("mixtral", {"precision": "fp16", "moe_ep_size": 0}, "moe_ep_size is 0, expected 1"),
    "no slices of experts": Case("mixtral", {"precision": "fp16", "moe_tp_size": 0}, "moe_tp_size is 0, expected 1"),
    "experts of a dense model": Case(
        "phi", {"precision": "fp16", "tp_size": 2, "moe_ep_size": 2},
        "moe_tp_size and moe_ep_size are for mixtures; this model is dense",
    ),
    "rows of a dense model": Case(
        "phi", {"precision": "fp16", "tp_size": 3}, "448 rows of the MLP cannot be divided evenly by tp_size 3"
    ),
    "plain floats": Case(
        "phixtral", {"precision": "fp16", "plain_weights": True},
        "plain weights are for int8 and int4, which the library quantises; found fp16",
    ),
    "plain groups": Case(
        "phixtral", {"precision": "int4_gptq", "plain_weights": True},
        "plain weights are for int8 and int4, .*; found int4_gptq",
    ),
    "groups of channels": Case(
        "phixtral", {"group_size": 64}, "a group size is for int4_gptq and int4_awq; found int4",
    ),
    "an unknown precision": Case(
        "phixtral", {"precision": "W9"}, "choosing the precision: 'W9' is unknown. TensorRT-LLM has: fp32",
        QuantizationError,
    ),
    "a dtype of no weights": Case(
        "phixtral", {"dtype": "float32"},
        "choosing the dtype: 'float32' with --precision int4, expected float16 or bfloat16", QuantizationError,
    ),
    "two dtypes": Case(
        "phixtral", {"precision": "bf16", "dtype": "float16"},
        "choosing the dtype: 'float16' with --precision bf16, expected bfloat16", QuantizationError,
    ),
    "an unknown stage": Case(
        "phixtral", {"gpu_sm": 90}, "--until is 'serve', expected plan, checkpoint, engine, verify", EngineError,
        machine(80), "serve",
    ),
    "no sequences": Case("phixtral", {"max_batch_size": 0}, "--max-batch-size is 0, expected 1 or more", EngineError),
    "no tokens": Case("phixtral", {"max_num_tokens": 0}, "--max-num-tokens is 0, expected 1 or more", EngineError),
    "no workers": Case("phixtral", {"workers": 0}, "--workers is 0, expected 1 or more", EngineError),
    "no cache": Case(
        "phixtral", {"kv_cache_fraction": 0.0}, "--kv-cache-fraction is 0.0, expected a number between 0 and 1",
        EngineError,
    ),
    "nothing but a cache": Case("phixtral", {"kv_cache_fraction": 1.0}, "--kv-cache-fraction is 1.0", EngineError),
    "a sequence of one token": Case(
        "phixtral", {"max_seq_len": 1}, "--max-seq-len is 1, expected 2 to 64, the model's own", EngineError,
    ),
    "nothing to compare": Case(
        "phixtral", {"verify_tokens": 3},
        "3 tokens would be compared with the reference, expected at least 4; ask for more with --verify-tokens, or for "
        "longer sequences, or stop with --until engine",
        EngineError, until="verify",
    ),
    "sequences too short to compare": Case(
        "phixtral", {"max_seq_len": 4}, "3 tokens would be compared with the reference", EngineError, until="verify",
    ),
    "steps too short to compare": Case(
        "phixtral", {"max_num_tokens": 2, "max_batch_size": 1}, "2 tokens would be compared", EngineError,
        until="verify",
    ),
    "GPUs of several kinds": Case(
        "phixtral", {"precision": "fp16", "gpu_sm": 86},
        r"this machine has GPU 0 \(SM 80\), GPU 1 \(SM 86\), and CUDA chooses on which of them an engine is built; "
        "make GPUs of one kind visible, by their UUIDs in CUDA_VISIBLE_DEVICES",
        EngineError, machine(80, 86), "engine",
    ),
    "ranks that no GPU is there to run": Case(
        "phixtral", {"precision": "fp16", "tp_size": 2},
        r"an engine of 2 ranks needs 2 GPUs, and this machine has GPU 0 \(SM 80\): stop with --until engine, "
        "and run the same command without that flag on a machine with enough GPUs",
        EngineError, machine(80), "verify",
    ),
    "ranks that too few GPUs are visible to": Case(
        "phixtral", {"precision": "fp16", "tp_size": 2}, "an engine of 2 ranks needs 2 GPUs", EngineError,
        machine(80, 80, visible=1), "verify",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("sources")
    mixture = {"seed": 1, "num_experts": 5, "experts_per_token": 2}
    wide = {**PHIXTRAL, "hidden_size": 256, "num_heads": 4, "ffn_size": 256}
    grouped = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 192, "num_experts": 4}
    fine = write_phi_checkpoint(parent / "fine", seed=1, **PHIXTRAL)
    config = json.loads((fine / "config.json").read_text())
    (fine / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    one = {**grouped, "num_experts": 1, "experts_per_token": 1}
    return {
        "phixtral": write_phixtral_checkpoint(parent / "phixtral", **mixture, **PHIXTRAL),
        "odd": write_phixtral_checkpoint(parent / "odd", **mixture),
        "wide": write_phixtral_checkpoint(parent / "wide", **{**mixture, "num_experts": 4}, **wide),
        "phi": write_phi_checkpoint(parent / "phi", seed=1, **PHIXTRAL),
        "fine": fine,
        "shared": write_phi_checkpoint(parent / "shared", seed=1, num_kv_heads=2, **PHIXTRAL),
        "one": write_mixtral_checkpoint(parent / "one", seed=1, **one),
        "even": write_phixtral_checkpoint(parent / "even", **{**mixture, "num_experts": 4}, **PHIXTRAL),
        "mixtral": write_mixtral_checkpoint(parent / "mixtral", seed=1, vocab_size=372, **grouped),
        "uneven": write_mixtral_checkpoint(parent / "uneven", seed=1, vocab_size=371, **grouped),
        "sliding": write_mixtral_checkpoint(parent / "sliding", seed=1, config={"sliding_window": 48}, **grouped),
    }


@pytest.fixture
def on(monkeypatch):
    """(machine) -> builds take place there."""
    return lambda where: monkeypatch.setattr("trt_build.trtllm.build.read_machine", lambda: where)


@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_it_is_refused_before_anything_is_written(tmp_path, sources, on, name):
    case = {**CASES, **OWN}[name]
    on(case.where)
    output = tmp_path / "engine"
    options = TrtllmOptions(checkpoint=str(sources[case.family]), output=output, until=case.until, **case.options)
    with pytest.raises(case.error, match=case.told):
        build_trtllm(options)
    assert not list(tmp_path.iterdir())


def test_every_refusal_of_the_contract_has_a_case():
    assert {name.partition(":")[0] for name in CASES} | set(ELSEWHERE) == set(REFUSALS)
    for row in REFUSALS.values():
        assert row["what"]
        assert row["source"]
    for file, function in ELSEWHERE.values():
        tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert any(name.startswith(function) for name in names), function


ACCEPTED = {
    "float16 on Blackwell": ("phixtral", {"precision": "fp16", "gpu_sm": 100}, NOBODY, "plan"),
    "integers on SM 120": ("phixtral", {"gpu_sm": 120}, NOBODY, "plan"),
    "bfloat16 on SM 80": ("phixtral", {"precision": "bf16"}, machine(80), "plan"),
    "SM 70": ("phixtral", {"gpu_sm": 70}, NOBODY, "plan"),
    "a plan for one of several kinds": ("phixtral", {"gpu_sm": 86}, machine(80, 86), "plan"),
    "a checkpoint for a GPU that is elsewhere": ("phixtral", {"gpu_sm": 90}, machine(80), "plan"),
    "odd sizes in floats": ("odd", {"precision": "fp16"}, NOBODY, "plan"),
    "groups of 64": ("phixtral", {"precision": "int4_gptq"}, NOBODY, "plan"),
    "key/value heads on several ranks": ("mixtral", {"precision": "fp16", "tp_size": 6, "pp_size": 2}, NOBODY, "plan"),
    "workers of the library's own class": ("mixtral", {"precision": "fp16", "workers": 2}, NOBODY, "plan"),
    "a vocabulary that is filled up with a bias": ("phixtral", {"precision": "fp16", "tp_size": 2}, NOBODY, "plan"),
    "a sequence within the window": ("sliding", {"precision": "fp16", "max_seq_len": 48}, NOBODY, "plan"),
    "every line that has engines": ("phixtral", {}, machine(80, library="1.0.3.2510"), "plan"),
    "the last of them": ("phixtral", {}, machine(80, library="1.2.1+cu130"), "plan"),
    "ranks that are built one after the other": ("phixtral", {"precision": "fp16", "tp_size": 2}, machine(80), "plan"),
    "a dense model": ("phi", {"precision": "int4"}, NOBODY, "plan"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_next_to_a_refusal_is_accepted(tmp_path, sources, on, name):
    family, options, where, until = ACCEPTED[name]
    on(where)
    made = build_trtllm(
        TrtllmOptions(checkpoint=str(sources[family]), output=tmp_path / "engine", until=until, **options)
    )
    assert made.plan.rank_bytes
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_told_at_once(tmp_path, sources):
    options = {"workers": 2, "max_batch_size": 0, "kv_cache_fraction": 2.0, "until": "serve"}
    with pytest.raises(EngineError) as caught:
        build_trtllm(TrtllmOptions(checkpoint=str(sources["phixtral"]), output=tmp_path / "engine", **options))
    told = str(caught.value)
    assert told.startswith(f"planning a TensorRT-LLM engine of {sources['phixtral']}:")
    assert told.count("\n  - ") == 4


def test_how_experts_are_shared_follows_from_what_is_given():
    for given, expected in (
        ({}, (4, 1)), ({"moe_ep_size": 2}, (2, 2)), ({"moe_tp_size": 1}, (1, 4)), ({"moe_tp_size": 4}, (4, 1)),
    ):  # fmt: skip
        parallel = Parallelism(tp_size=4, **given)
        assert (parallel.moe_tp, parallel.moe_ep) == expected
