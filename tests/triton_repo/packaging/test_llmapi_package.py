"""A checkpoint to a model on the LLM API: what is written, for one GPU and several, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file

from export.errors import CheckpointError, MoeshipError, OutputError
from export.trtllm.parallel import Parallelism
from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS
from triton_repo.errors import RepositoryError
from triton_repo.packaging.llmapi_package import LlmApiOptions, package_llmapi
from triton_repo.packaging.model_config import read_config
from triton_repo.serving.deployment import read_deployment
from triton_repo.serving.repository_check import check_repository

# Heads, key/value heads and experts divide among 2.
SIZES = {"num_heads": 6, "num_kv_heads": 2, "num_experts": 4, "max_positions": 640}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = write_mixtral_checkpoint(tmp_path_factory.mktemp("llmapi") / "mixtral", seed=5, **SIZES)
    (folder / "modeling_mixtral.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return folder


def options(checkpoint: Path, output: Path, **more) -> LlmApiOptions:
    return LlmApiOptions(**{"checkpoint": str(checkpoint), "name": "mixtral", "output": output / "repository", **more})


def test_the_model_is_written_whole_with_links_and_no_code_of_the_checkpoint(checkpoint, tmp_path):
    package = package_llmapi(options(checkpoint, tmp_path))
    version = tmp_path / "repository" / "mixtral" / "1"
    assert package.folder == version.parent
    assert (package.copied_bytes, package.steps) == (0, ())
    files = {path.name: path for path in (version / "checkpoint").iterdir()}
    assert sorted(files) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert files["model.safetensors"].samefile(checkpoint / "model.safetensors")
    assert package.engine_bytes == sum(path.stat().st_size for path in files.values())
    assert "class TritonPythonModel" in (version / "model.py").read_text()
    assert check_repository(tmp_path / "repository") == ("mixtral",)


def test_model_yaml_has_the_llms_arguments_and_tritons_settings(checkpoint, tmp_path):
    parallel = Parallelism(tp_size=2, pp_size=1, moe_ep_size=2)
    package = package_llmapi(
        options(checkpoint, tmp_path, parallel=parallel, kv_cache_fraction=0.8, max_seq_len=128, copy=True)
    )
    assert yaml.safe_load((package.folder / "1" / "model.yaml").read_text()) == {
        "model": "checkpoint", "backend": "pytorch", "tensor_parallel_size": 2, "pipeline_parallel_size": 1,
        "moe_tensor_parallel_size": 1, "moe_expert_parallel_size": 2, "max_seq_len": 128,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8},
        "triton_config": {"max_batch_size": 1, "decoupled": True, "cancellation_check_period_ms": 100},
        "moeship": {"end_token_ids": [2], "max_sequence": 128, "penalties": False},
    }  # fmt: skip
    assert package.copied_bytes == package.engine_bytes
    [model] = read_deployment(tmp_path / "repository").gpu_models
    assert (model.world_size, model.spawns, model.engine) == (2, True, None)


# NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt of 1.2: name, type, dims, optional.
UPSTREAM_INPUTS = """
text_input STRING -1 required
streaming BOOL 1 optional
sampling_param_best_of INT32 1 optional
sampling_param_temperature FP32 1 optional
sampling_param_top_k INT32 1 optional
sampling_param_top_p FP32 1 optional
sampling_param_frequency_penalty FP32 1 optional
sampling_param_presence_penalty FP32 1 optional
sampling_param_max_tokens INT32 1 optional
sampling_param_stop STRING -1 optional
sampling_param_seed UINT64 1 optional
sampling_param_exclude_input_from_output BOOL 1 optional
sampling_param_return_perf_metrics BOOL 1 optional
return_finish_reason BOOL 1 optional
return_stop_reason BOOL 1 optional
return_cumulative_logprob BOOL 1 optional
stop BOOL 1 optional
"""
UPSTREAM_OUTPUTS = """
text_output STRING -1
finish_reason STRING -1
stop_reason STRING -1
cumulative_logprob FP32 -1
kv_cache_reused_block INT32 -1
kv_cache_missed_block INT32 -1
kv_cache_alloc_new_blocks INT32 -1
kv_cache_alloc_total_blocks INT32 -1
kv_cache_hit_rate FP32 -1
arrival_time_ns INT64 1
first_scheduled_time_ns INT64 1
first_token_time_ns INT64 1
last_token_time_ns INT64 1
acceptance_rate FP32 1
total_accepted_draft_tokens INT32 1
total_draft_tokens INT32 1
"""


def described(tensors, *, outputs: bool) -> list[str]:
    from tritonclient.grpc import model_config_pb2

    lines = []
    for tensor in tensors:
        kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        need = "" if outputs else " optional" if tensor.optional else " required"
        lines.append(f"{tensor.name} {kind} {' '.join(map(str, tensor.dims))}{need}")
    return lines


def test_without_a_batch_dimension_the_tensors_are_upstreams(checkpoint, tmp_path):
    package = package_llmapi(options(checkpoint, tmp_path, max_batch_size=0))
    config = read_config(package.folder / "config.pbtxt")
    assert described(config.input, outputs=False) == UPSTREAM_INPUTS.strip().splitlines()
    assert described(config.output, outputs=True) == UPSTREAM_OUTPUTS.strip().splitlines()
    assert config.max_batch_size == 0
    assert config.model_transaction_policy.decoupled
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, config.instance_group[0].KIND_CPU)]


def test_with_one_the_wire_contract_is_served_beside_them(checkpoint, tmp_path):
    config = read_config(package_llmapi(options(checkpoint, tmp_path)).folder / "config.pbtxt")
    inputs, outputs = [t.name for t in config.input], [t.name for t in config.output]
    assert len(set(inputs)) == len(inputs)
    assert len(set(outputs)) == len(outputs)
    assert {tensor.name for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)} < set(inputs)
    assert {line.split()[0] for line in UPSTREAM_INPUTS.strip().splitlines()} < set(inputs)
    assert {tensor.name for tensor in (*OUTPUTS, *ADDED_OUTPUTS)} < set(outputs)
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    assert config.max_batch_size == 1


def refusal(*words, **more) -> str:
    with pytest.raises(MoeshipError) as caught:
        package_llmapi(options(*words, **more))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_phixtral_is_refused_with_the_way_that_serves_it(tiny_checkpoint, tmp_path):
    text = refusal(tiny_checkpoint, tmp_path)
    assert "it is a phixtral, which TensorRT-LLM's PyTorch backend lacks; build an engine with TensorRT-LLM 1.2" in text
    assert not (tmp_path / "repository").exists()


def test_what_tensorrt_llms_mixtral_would_not_load_or_compute_is_refused(tmp_path):
    folder = write_mixtral_checkpoint(
        tmp_path / "mixtral", seed=5, spelling="packed", config={"architectures": ["Other"], "sliding_window": 100},
        **SIZES,
    )  # fmt: skip
    text = refusal(folder, tmp_path, parallel=Parallelism(tp_size=4, moe_ep_size=3))
    assert "architectures is ['Other'] in config.json, expected ['MixtralForCausalLM']" in text
    assert "packed as transformers 5 packs them, and TensorRT-LLM looks for block_sparse_moe.experts" in text
    assert (
        "its attention sees 100 tokens back, TensorRT-LLM's sees all 640; ask for a max_seq_len of at most 100" in text
    )
    assert "6 attention heads cannot be divided evenly by tp_size 4" in text
    assert "4 experts cannot be divided evenly by moe_ep_size 3" in text


def test_forms_that_only_transformers_is_known_to_read_are_refused(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = {"rope_scaling": scaling, "tie_word_embeddings": True}
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=5, config=config, **SIZES)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"] = tensors.pop("model.norm.weight").astype(np.float64)
    save_file(tensors, file)
    text = refusal(folder, tmp_path)
    assert "its rotary embedding is scaled (linear, factor 2), and whether TensorRT-LLM's class gives" in text
    assert "its tensors have other names than those of the whole model, such as model.norm.weight; save it once" in text
    assert "it stores float64; save it in bfloat16 or float16" in text
    assert "config.json sets tie_word_embeddings, and the file has a head of its own" in text


def test_a_window_that_is_never_left_is_none(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=5, config={"sliding_window": 100}, **SIZES)
    assert package_llmapi(options(folder, tmp_path, max_seq_len=100)).name == "mixtral"


def test_unusable_options_are_told_together_before_the_checkpoint_is_opened(tmp_path):
    text = refusal(
        tmp_path / "none", tmp_path, name="-x", max_batch_size=-1, kv_cache_fraction=1.5, cancellation_check_period_ms=0
    )
    for problem in ("the name is '-x'", "max_batch_size is -1", "kv_cache_fraction is 1.5", "period_ms is 0"):
        assert problem in text


def test_nothing_is_overwritten_and_a_checkpoint_without_a_tokenizer_is_refused(checkpoint, tmp_path):
    package_llmapi(options(checkpoint, tmp_path))
    with pytest.raises(OutputError, match="mixtral exists already"):
        package_llmapi(options(checkpoint, tmp_path))
    bare = write_mixtral_checkpoint(tmp_path / "bare", seed=5, **SIZES)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        package_llmapi(options(bare, tmp_path, name="bare"))
    assert not (tmp_path / "repository" / "bare").exists()


def test_a_config_and_settings_that_disagree_are_seen(checkpoint, tmp_path):
    package = package_llmapi(options(checkpoint, tmp_path))
    config = package.folder / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "1"', 'string_value: "none"'))
    with pytest.raises(RepositoryError, match="moeship_gpus is 'none', expected a number of 1 or more"):
        read_deployment(tmp_path / "repository")
    assert json.loads((package.folder / "1" / "checkpoint" / "config.json").read_text())["model_type"] == "mixtral"
