"""The four models of an ensemble as protobuf messages: an engine's facts in, each model's ModelConfig out.

    ensemble_config("phixtral", max_batch, ...) platform ensemble, with the tensors of contracts/wire.py
    text_model_config(PREPROCESSING, ...)       Python backend
    text_model_config(POSTPROCESSING, ...)      Python backend, decoupled, one instance that holds all answers
    onnxruntime_config(...)                     tensorrt_llm on the Python backend, or
    tensorrt_llm_config(...)                    tensorrt_llm on TensorRT-LLM's C++ backend

An ensemble is decoupled if one of its steps is. All outputs of ours come from the last step, which sends no output for
some responses of the engine. The last step takes inputs only from the engine: outputs of earlier steps would reach it
only with the engine's first response (triton-inference-server/core, src/ensemble_scheduler/ensemble_scheduler.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from triton_repo.contracts.ensemble import (
    ADDED_ENGINE_NAMES,
    ADDED_TOKEN_INPUTS,
    ADDED_TOKEN_NAMES,
    ADDED_TOKEN_OUTPUTS,
    ANSWER_KEY,
    ANSWER_OUTPUTS,
    CANCELLED,
    ENGINE_CANCELLED,
    ENGINE_KEY_INPUT,
    ENGINE_KEY_OUTPUT,
    ENGINE_NAMES,
    ENGINE_PROBE,
    POSTPROCESSING,
    POSTPROCESSING_INPUTS,
    POSTPROCESSING_OUTPUTS,
    PREPROCESSING,
    PREPROCESSING_INPUTS,
    PREPROCESSING_OUTPUTS,
    PROBE,
    QUERY_NAMES,
    TEXT_NAMES,
    TOKEN_ENGINE,
    TOKEN_INPUTS,
    TOKEN_NAMES,
    TOKEN_OUTPUTS,
)
from triton_repo.contracts.model_parameters import TRITON_BACKEND, ModelParameters, TextParameters
from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters
from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS
from triton_repo.packaging.model_config import declare, messages, set_parameters
from triton_repo.runtime.steps.token_request import TAKEN_INPUTS

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_NEWEST = -1  # the newest version of a step's model
_COUNTS = ("num_input_tokens", "num_output_tokens")


def ensemble_config(name: str, max_batch: int, *, echoes_keys: bool) -> ModelConfig:
    """The model that clients ask. `echoes_keys`: ONNX Runtime runs the engine, which has more tensors than upstream's
    and sends the key of an answer back with each response."""
    config = messages().ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch)
    declare(config, (*INPUTS, *COMPATIBILITY_INPUTS), (*OUTPUTS, *ADDED_OUTPUTS))
    # Tensors between steps. Their names differ from those of the ensemble's own tensors.
    prepared = {tensor.name: f"_{tensor.name}" for tensor in PREPROCESSING_OUTPUTS}
    names = ENGINE_NAMES | ADDED_ENGINE_NAMES if echoes_keys else ENGINE_NAMES
    registered = {name: f"_REGISTERED_{name}" for name in names}
    to_engine = {engine_name: registered[name] for name, engine_name in names.items()}
    from_engine = dict(TOKEN_NAMES)
    if echoes_keys:
        registered[ANSWER_KEY.name] = to_engine[ENGINE_KEY_INPUT.name] = f"_REGISTERED_{ANSWER_KEY.name}"
        from_engine |= ADDED_TOKEN_NAMES | {
            ENGINE_KEY_OUTPUT.name: ANSWER_KEY.name,
            ENGINE_CANCELLED.name: CANCELLED.name,
            ENGINE_PROBE.name: PROBE.name,
        }
    tokens = {name: f"_TOKENS_{name}" for name in from_engine.values()}
    _add_step(config, PREPROCESSING, {name: wire_name for wire_name, name in QUERY_NAMES.items()}, prepared)
    _add_step(config, POSTPROCESSING, prepared, registered)
    _add_step(config, TOKEN_ENGINE, to_engine, {engine_name: tokens[name] for engine_name, name in from_engine.items()})
    _add_step(config, POSTPROCESSING, tokens, {name: wire_name for wire_name, name in TEXT_NAMES.items()})
    return config


def text_model_config(name: str, max_batch: int, parameters: TextParameters) -> ModelConfig:
    """The ModelConfig of `preprocessing` or of `postprocessing`."""
    pb = messages()
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=max_batch)
    if name == PREPROCESSING:
        declare(config, PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS)
    else:
        declare(config, POSTPROCESSING_INPUTS, POSTPROCESSING_OUTPUTS)
        config.model_transaction_policy.decoupled = True
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    set_parameters(config, parameters.to_texts())
    return config


def onnxruntime_config(max_batch: int, parameters: ModelParameters, provider: str) -> ModelConfig:
    """The ModelConfig of `tensorrt_llm` where ONNX Runtime runs the engine: one instance, on the CPU or on the first
    GPU."""
    pb = messages()
    config = pb.ModelConfig(name=TOKEN_ENGINE, backend="python", max_batch_size=max_batch)
    outputs = (*ANSWER_OUTPUTS, "sequence_index", *_COUNTS)
    declare(
        config,
        [*(tensor for tensor in TOKEN_INPUTS if tensor.name in TAKEN_INPUTS), *ADDED_TOKEN_INPUTS, ENGINE_KEY_INPUT],
        [
            *(tensor for tensor in TOKEN_OUTPUTS if tensor.name in outputs),
            *ADDED_TOKEN_OUTPUTS,
            ENGINE_KEY_OUTPUT,
            ENGINE_CANCELLED,
            ENGINE_PROBE,
        ],
    )
    if provider == "cpu":
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    else:
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=1, gpus=[0])
    config.model_transaction_policy.decoupled = True
    set_parameters(config, parameters.to_texts())
    return config


def tensorrt_llm_config(max_batch: int, parameters: TensorrtLlmParameters, texts: Mapping[str, str]) -> ModelConfig:
    """The ModelConfig of `tensorrt_llm` on TensorRT-LLM's C++ backend. `texts`: parameter key to text."""
    pb = messages()
    config = pb.ModelConfig(name=TOKEN_ENGINE, backend=TRITON_BACKEND, max_batch_size=max_batch)
    declare(config, TOKEN_INPUTS, TOKEN_OUTPUTS)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    config.model_transaction_policy.decoupled = True
    batching = config.dynamic_batching
    batching.preferred_batch_size.append(max_batch)
    batching.max_queue_delay_microseconds = parameters.max_queue_delay_microseconds
    batching.default_queue_policy.SetInParent()
    batching.default_queue_policy.max_queue_size = parameters.max_queue_size
    set_parameters(config, texts)
    return config


def _add_step(config: ModelConfig, model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Add a step. `inputs` and `outputs` map names of the model's tensors to names of the ensemble's tensors."""
    step = config.ensemble_scheduling.step.add(model_name=model, model_version=_NEWEST)
    for name, tensor in inputs.items():
        step.input_map[name] = tensor
    for name, tensor in outputs.items():
        step.output_map[name] = tensor
