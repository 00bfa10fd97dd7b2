"""Checkpoint in, model of a Triton repository out, which TensorRT-LLM's LLM API serves without an engine.

    package_llmapi(LlmApiOptions(checkpoint="mistralai/Mixtral-8x7B-v0.1", name="mixtral", output=Path("repository")))

    repository/mixtral/config.pbtxt       complete: Triton's auto-completion is not needed
    repository/mixtral/1/model.py         a copy of triton_repo/models/llmapi.py
    repository/mixtral/1/model.yaml       the arguments of tensorrt_llm.LLM and our settings
    repository/mixtral/1/checkpoint/      hard links to config, weights and tokenizer, or copies; none of the
                                          checkpoint's code

This layout works with TensorRT-LLM from 1.0 on. TensorRT-LLM after 1.2 has no engines and needs it. Mixtrals, qwen2_moe
and qwen3_moe can be served: the PyTorch backend of TensorRT-LLM has no phixtral (tensorrt_llm/_torch/models).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checkpoint.file_table import INDEX_FILE
from export.checkpoint.safetensors_header import read_header
from export.errors import listing, named, with_article
from export.trtllm.parallel import Parallelism
from triton_repo.contracts.llmapi import LLMAPI_INPUTS, LLMAPI_OUTPUTS, METRICS
from triton_repo.contracts.llmapi_settings import SETTINGS_FILE, LlmSettings, TextSettings, TritonSettings
from triton_repo.contracts.model_parameters import GPUS_KEY, MODEL_FILE
from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS, WireTensor
from triton_repo.errors import RepositoryError
from triton_repo.packaging.ensemble_package import MODELS_FOLDER, VERSION
from triton_repo.packaging.model_config import CONFIG_FILE, config_text, declare, messages, set_parameters
from triton_repo.packaging.package import Package, check_output, name_problems
from triton_repo.packaging.staging import place, staged_models
from trt_build.source import SourceModel, open_source

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CHECKPOINT_FOLDER = "checkpoint"
CONFIG_JSON = "config.json"
_MODEL_SOURCE = MODELS_FOLDER / "llmapi.py"


@dataclass(frozen=True, kw_only=True)
class LlmApiOptions:
    """What a caller chooses.

    `max_batch_size` is Triton's. 1 gives the model the wire contract's tensors as well as the LLM API's. 0 gives it
    only the LLM API's tensors, in upstream's shapes.
    """

    checkpoint: str  # a folder or a hub id
    name: str
    output: Path
    parallel: Parallelism = field(default_factory=Parallelism)
    max_seq_len: int | None = None  # tokens of prompt and output together; None: the model's own limit
    max_batch_size: int = 1
    kv_cache_fraction: float | None = None  # of the GPU memory that the weights leave; None: the library's default
    cancellation_check_period_ms: int = 100
    guided_decoding_backend: str | None = None  # None: answers are kept to no guides
    copy: bool = False  # copy the checkpoint's files instead of linking them


def package_llmapi(options: LlmApiOptions) -> Package:
    """Write the model. Raises RepositoryError for what the LLM API cannot serve, CheckpointError, ConfigError,
    OutputError.
    """
    problems = [*name_problems(options.name), *_option_problems(options)]
    if problems:
        raise RepositoryError(f"packaging {options.checkpoint}:{listing(problems)}")
    check_output(options.output)
    source = open_source(options.checkpoint, None, options.max_seq_len)
    _check_model(options, source)
    settings = _settings(options, source)
    with staged_models(options.output, (options.name,)) as staging:
        folder = staging / options.name
        (folder / CONFIG_FILE).write_text(config_text(llmapi_config(options.name, settings)), encoding="utf-8")
        version = folder / VERSION
        (version / CHECKPOINT_FOLDER).mkdir(parents=True)
        shutil.copyfile(_MODEL_SOURCE, version / MODEL_FILE)
        (version / SETTINGS_FILE).write_text(settings.to_yaml(), encoding="utf-8")
        target = version / CHECKPOINT_FOLDER
        copied = sum(place(path, target / path.name, copy=options.copy) for path in _model_files(source))
        texts: list[int] = []
        source.settings.write(target, lambda path, made: texts.append(place(path, made, copy=options.copy)))
        num_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Package(
        folder=options.output / options.name,
        name=options.name,
        steps=(),
        engine_bytes=num_bytes,
        copied_bytes=copied + sum(texts),
    )


def llmapi_config(name: str, settings: LlmSettings) -> ModelConfig:
    """The ModelConfig of a model on the LLM API: decoupled, one instance for all of its GPUs. With a batch dimension
    the model has the wire contract's tensors as well as the LLM API's.
    """
    pb = messages()
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=settings.triton.max_batch_size)
    # A request in the LLM API's tensors sends sampling_param_max_tokens in place of max_tokens.
    wire_inputs = [replace(tensor, optional=tensor.name != "text_input") for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)]
    batched = settings.triton.max_batch_size > 0
    declare(
        config,
        _once([*(wire_inputs if batched else ()), *LLMAPI_INPUTS]),
        _once([*((*OUTPUTS, *ADDED_OUTPUTS) if batched else ()), *LLMAPI_OUTPUTS, *METRICS]),
    )
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    config.model_transaction_policy.decoupled = True
    num_gpus = settings.llm["tensor_parallel_size"] * settings.llm["pipeline_parallel_size"]
    set_parameters(config, {GPUS_KEY: str(num_gpus)})
    return config


def _once(tensors: Sequence[WireTensor]) -> list[WireTensor]:
    """The tensors without those that repeat an earlier name."""
    return list({tensor.name: tensor for tensor in reversed(tensors)}.values())[::-1]


def _option_problems(options: LlmApiOptions) -> Iterator[str]:
    if options.max_batch_size < 0:
        yield f"max_batch_size is {options.max_batch_size}, expected 0 or more"
    if options.kv_cache_fraction is not None and not 0 < options.kv_cache_fraction <= 1:
        yield f"kv_cache_fraction is {options.kv_cache_fraction}, expected above 0, up to 1"
    if options.cancellation_check_period_ms < 1:
        yield f"cancellation_check_period_ms is {options.cancellation_check_period_ms}, expected 1 or more"


def _check_model(options: LlmApiOptions, source: SourceModel) -> None:
    """Raise RepositoryError for a checkpoint that TensorRT-LLM's own class of the family (tensorrt_llm/_torch/models)
    would not load, or would compute differently.
    """
    family, facts = source.model.family, source.model.architecture
    if family.llm_api is None:
        raise RepositoryError(
            f"packaging {options.checkpoint}: it is {with_article(family.name)}, which TensorRT-LLM's PyTorch backend "
            "lacks; build an engine with TensorRT-LLM 1.2 or an ONNX Runtime engine, and package that"
        )
    config = source.checkpoint.config
    problems = options.parallel.problems(facts, pipeline=True)
    expected = [family.llm_api.architecture]
    if config.get("architectures") != expected:
        problems.append(f"architectures is {config.get('architectures')} in {CONFIG_JSON}, expected {expected}")
    problems += family.llm_api.problems(facts, source.checkpoint.tensors)
    if facts.sliding_window is not None and facts.sliding_window < source.max_sequence:
        problems.append(
            f"its attention sees {facts.sliding_window} tokens back, TensorRT-LLM's sees all {source.max_sequence}; "
            f"ask for a max_seq_len of at most {facts.sliding_window}"
        )
    problems += _form_problems(source)
    if not source.end_ids:
        problems.append(
            "no file names an end token, and the LLM API takes no request without one; add eos_token_id to "
            "generation_config.json"
        )
    if problems:
        raise RepositoryError(f"packaging {options.checkpoint} for TensorRT-LLM's LLM API:{listing(problems)}")


def _form_problems(source: SourceModel) -> Iterator[str]:
    """Forms of a checkpoint that moeship and transformers read, and that TensorRT-LLM's class, which reads the same
    files by itself, is not known to read."""
    facts, checkpoint = source.model.architecture, source.checkpoint
    if facts.rotary_scaling is not None:
        yield (
            f"its rotary embedding is scaled ({facts.rotary_scaling.described}), and whether TensorRT-LLM's class "
            "gives transformers' numbers then is not known; build an ONNX Runtime engine"
        )
    if checkpoint.packed:
        return
    stored = {tensor.name for shard in checkpoint.shards for tensor in read_header(shard)}
    other = sorted(set(checkpoint.tensors) - stored)
    if other:
        yield (
            f"its tensors have other names than those of the whole model, such as {named(other[0])}; save it once with "
            "transformers' save_pretrained"
        )
    if "F64" in source.model.weights.stored_dtypes():
        yield "it stores float64; save it in bfloat16 or float16"
    if bool(checkpoint.config.get("tie_word_embeddings")) is not facts.tied_head:
        yield (
            "config.json sets tie_word_embeddings, and the file has a head of its own, which transformers uses; set "
            "tie_word_embeddings to false"
        )


def _settings(options: LlmApiOptions, source: SourceModel) -> LlmSettings:
    parallel = options.parallel
    llm: dict[str, Any] = {
        "model": CHECKPOINT_FOLDER,
        "backend": "pytorch",
        "tensor_parallel_size": parallel.tp_size,
        "pipeline_parallel_size": parallel.pp_size,
        "moe_tensor_parallel_size": parallel.moe_tp,
        "moe_expert_parallel_size": parallel.moe_ep,
        "max_seq_len": source.max_sequence,
    }
    if options.kv_cache_fraction is not None:
        llm["kv_cache_config"] = {"free_gpu_memory_fraction": options.kv_cache_fraction}
    if options.guided_decoding_backend is not None:
        llm["guided_decoding_backend"] = options.guided_decoding_backend
    return LlmSettings(
        llm=llm,
        triton=TritonSettings(
            max_batch_size=options.max_batch_size,
            cancellation_check_period_ms=options.cancellation_check_period_ms,
        ),
        text=TextSettings(end_token_ids=source.end_ids, max_sequence=source.max_sequence),
    )


def _model_files(source: SourceModel) -> Iterator[Path]:
    """config.json, the weights and their index."""
    folder = source.checkpoint.folder
    yield folder / CONFIG_JSON
    if (folder / INDEX_FILE).is_file():
        yield folder / INDEX_FILE
    yield from source.checkpoint.shards
