"""Writes the four models of an ensemble, from an engine's facts, into a folder that becomes a repository.

preprocessing/1/model.py, tokenizer/       text to tokens
tensorrt_llm/1/engine/                     the engine's files, linked; on ONNX Runtime also model.py
tensorrt_llm/1/xgrammar_tokenizer_info.json  the tokenizer for guided decoding, on TensorRT-LLM where it is asked for
postprocessing/1/model.py, tokenizer/      tokens to text
NAME/1/                                    the ensemble, which needs no file
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from export.tokenizer.loading import Tokenizer, load_tokenizer
from triton_repo.contracts.ensemble import POSTPROCESSING, PREPROCESSING, TOKEN_ENGINE
from triton_repo.contracts.model_parameters import ENGINE_FOLDER, MODEL_FILE, ModelParameters, TextParameters
from triton_repo.contracts.seal import write_seal
from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters
from triton_repo.packaging.engine_facts import EngineFacts
from triton_repo.packaging.ensemble_config import (
    ensemble_config,
    onnxruntime_config,
    tensorrt_llm_config,
    text_model_config,
)
from triton_repo.packaging.model_config import CONFIG_FILE, config_text
from triton_repo.packaging.placing import place_files

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

VERSION = "1"
MODELS_FOLDER = Path(__file__).parents[1] / "models"
# Object storage does not keep a version folder that holds no file.
KEEP_FILE = ".keep"
TOKENIZER_INFO_FILE = "xgrammar_tokenizer_info.json"


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions:
    """What a caller chooses for an ensemble."""

    name: str
    served_from: Path  # absolute path of the repository when it is served
    onnxruntime: ModelParameters = field(default_factory=ModelParameters)  # for ONNX Runtime
    copy: bool = False  # copy the engine's files instead of linking them
    tensorrt_llm: TensorrtLlmParameters = field(default_factory=TensorrtLlmParameters)  # for the C++ backend


def write_ensemble(folder: Path, facts: EngineFacts, options: EnsembleOptions) -> int:
    """Fill the folders of the four models, which must exist. Returns the bytes that were copied instead of linked.

    Raises RepositoryError for parameters that do not go with the engine.
    """
    text = TextParameters(
        max_sequence=facts.max_sequence,
        max_prompt=_max_prompt(facts, options.tensorrt_llm),
        end_ids=facts.end_token_ids,
        num_ids=facts.num_ids,
        one_end_id=facts.runs_on_tensorrt_llm,
        echoes_keys=not facts.runs_on_tensorrt_llm,
        guided=not facts.runs_on_tensorrt_llm or options.tensorrt_llm.guided_decoding_backend is not None,
    )
    copied = 0
    for name in (PREPROCESSING, POSTPROCESSING):
        _write_config(folder / name, text_model_config(name, facts.max_batch, text))
        version = _write_model_file(folder / name)
        copied += place_files(facts, facts.tokenizer_files, version / text.tokenizer, copy=options.copy).copied_bytes
    copied += _write_token_engine(folder / TOKEN_ENGINE, facts, options)
    config = ensemble_config(options.name, facts.max_batch, echoes_keys=text.echoes_keys)
    _write_config(folder / options.name, config)
    (_make_version(folder / options.name) / KEEP_FILE).touch()
    return copied


def _max_prompt(facts: EngineFacts, parameters: TensorrtLlmParameters) -> int:
    """Tokens of the longest prompt. At least one new token must fit after it. TensorRT-LLM reads a prompt in one step
    unless `enable_chunked_context` is set (cpp/tensorrt_llm/batch_manager/trtGptModel.h)."""
    longest = facts.max_sequence - 1
    if facts.max_num_tokens is None or parameters.enable_chunked_context:
        return longest
    return min(longest, facts.max_num_tokens)


def _write_token_engine(folder: Path, facts: EngineFacts, options: EnsembleOptions) -> int:
    if facts.runs_on_tensorrt_llm:
        parameters = options.tensorrt_llm
        if parameters.kv_cache_free_gpu_mem_fraction is None:
            parameters = dataclasses.replace(parameters, kv_cache_free_gpu_mem_fraction=facts.kv_cache_fraction)
        served = options.served_from / TOKEN_ENGINE / VERSION
        texts = parameters.to_texts(
            engine_path=str(served / ENGINE_FOLDER),
            world_size=facts.world_size,
            paged_context_fmha=facts.paged_context_fmha,
            tokenizer_info_path=str(served / TOKENIZER_INFO_FILE),
        )
        _write_config(folder, tensorrt_llm_config(facts.max_batch, parameters, texts))
        version = _make_version(folder)
        if parameters.guided_decoding_backend:
            text = tokenizer_info(load_tokenizer(facts.folder), facts.end_token_ids)
            (version / TOKENIZER_INFO_FILE).write_text(text, encoding="utf-8")
        return place_files(facts, facts.files, version / ENGINE_FOLDER, copy=options.copy).copied_bytes
    model = options.onnxruntime
    _write_config(folder, onnxruntime_config(facts.max_batch, model, facts.provider))
    engine = _write_model_file(folder) / model.engine
    placed = place_files(facts, facts.files, engine, copy=options.copy)
    write_seal(engine, placed.states)
    return placed.copied_bytes


def tokenizer_info(tokenizer: Tokenizer, end_ids: Sequence[int]) -> str:
    """The JSON that TensorRT-LLM's backend reads for guided decoding: every token by its id, tokenizer.json, and the
    tokens that end an answer (_xgrammar_tokenizer_info of tensorrt_llm/llmapi/tokenizer.py)."""
    names = [tokenizer.backend.id_to_token(token) or "" for token in range(tokenizer.size)]
    return json.dumps(
        {"encoded_vocab": names, "tokenizer_str": tokenizer.backend.to_str(), "stop_token_ids": list(end_ids)},
        ensure_ascii=False,
    )


def _write_config(folder: Path, config: ModelConfig) -> None:
    (folder / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")


def _make_version(folder: Path) -> Path:
    version = folder / VERSION
    version.mkdir()
    return version


def _write_model_file(folder: Path) -> Path:
    """Copy the model's program. Returns the version's folder."""
    version = _make_version(folder)
    shutil.copyfile(MODELS_FOLDER / f"{folder.name}.py", version / MODEL_FILE)
    return version
