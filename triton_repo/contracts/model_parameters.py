"""The parameters in the config.pbtxt of a packaged model: reads and writes them.

Triton's parameters are texts. These dataclasses are the one place where texts become values and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import shown
from export.files.reading import whole_number
from triton_repo.errors import RepositoryError

TRITON_BACKEND = "tensorrtllm"  # what config.pbtxt calls TensorRT-LLM's C++ backend; engine.json has another word
MODEL_FILE = "model.py"  # a model's program, within a version's folder
ENGINE_FOLDER = "engine"  # within a version's folder
ENGINE_KEY = "moeship_engine"
THREADS_KEY = "moeship_threads"
WORKERS_KEY = "moeship_workers"
TOKENIZER_KEY = "tokenizer_dir"
MAX_SEQUENCE_KEY = "moeship_max_sequence"
MAX_PROMPT_KEY = "moeship_max_prompt"
END_IDS_KEY = "moeship_end_ids"
NUM_IDS_KEY = "moeship_num_ids"
WORLD_SIZE_KEY = "moeship_world_size"
GPUS_KEY = "moeship_gpus"
ONE_END_ID_KEY = "moeship_one_end_id"
ECHOES_KEYS_KEY = "moeship_echoes_keys"
MAX_THREADS = 4096  # of one instance
MAX_WORKERS = 4096  # of one instance
_AUTOMATIC = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelParameters:
    """The parameters of a model in which ONNX Runtime runs the engine."""

    engine: str = ENGINE_FOLDER  # within the version's folder
    threads: int | None = None  # of one worker; None shares the cores among the workers

    def to_texts(self) -> dict[str, str]:
        """Parameter key to text."""
        return {ENGINE_KEY: self.engine, THREADS_KEY: _AUTOMATIC if self.threads is None else str(self.threads)}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], model: str) -> ModelParameters:
        """From parameter key to text. Raises RepositoryError for an absent key or a text that is not a valid value."""
        absent = [key for key in (ENGINE_KEY, THREADS_KEY) if key not in texts]
        threads = texts.get(THREADS_KEY, "")
        number = whole_number(threads, 1, MAX_THREADS)
        if absent or (number is None and threads != _AUTOMATIC):
            problem = f"absent: {', '.join(absent)}" if absent else f"{THREADS_KEY} is {shown(threads)}"
            raise RepositoryError(
                f"reading the parameters of the model {model}: {problem}; expected {ENGINE_KEY} with a folder's name "
                f"and {THREADS_KEY} with a number of 1 to {MAX_THREADS} or {_AUTOMATIC!r}: package the engine again"
            )
        return cls(engine=texts[ENGINE_KEY], threads=number)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelParameters:
        """From the JSON form of a model configuration, which Triton gives to a model."""
        return cls.from_texts(config_texts(config), config["name"])

    def threads_of_one(self, count: int) -> int | None:
        """Threads of one worker where `count` workers run at the same time: as packaged, else an equal share of the
        usable cores. None lets ONNX Runtime decide."""
        if self.threads is not None or count == 1:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // count)


@dataclass(frozen=True, kw_only=True)
class TextParameters:
    """The parameters of a model that turns text into tokens or tokens into text."""

    tokenizer: str = "tokenizer"  # the tokenizer's folder within the version's
    max_sequence: int  # tokens of prompt and output together
    max_prompt: int  # tokens of the prompt
    end_ids: tuple[int, ...]  # the model's end tokens
    num_ids: int  # ids that the engine chooses from; more than the tokenizer has where the engine does not mask them
    one_end_id: bool = False  # the engine's minimum of new tokens holds back only one end token, as in TensorRT-LLM
    echoes_keys: bool = True  # the engine sends the key of an answer back with each response

    def to_texts(self) -> dict[str, str]:
        """Parameter key to text."""
        return {
            TOKENIZER_KEY: self.tokenizer,
            MAX_SEQUENCE_KEY: str(self.max_sequence),
            MAX_PROMPT_KEY: str(self.max_prompt),
            END_IDS_KEY: ",".join(map(str, self.end_ids)),
            NUM_IDS_KEY: str(self.num_ids),
            ONE_END_ID_KEY: str(int(self.one_end_id)),
            ECHOES_KEYS_KEY: str(int(self.echoes_keys)),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextParameters:
        """From the JSON form of a model configuration. Raises RepositoryError for what `to_texts` did not write."""
        texts = config_texts(config)
        try:
            return cls(
                tokenizer=texts[TOKENIZER_KEY],
                max_sequence=int(texts[MAX_SEQUENCE_KEY]),
                max_prompt=int(texts[MAX_PROMPT_KEY]),
                end_ids=tuple(int(text) for text in texts[END_IDS_KEY].split(",") if text),
                num_ids=int(texts[NUM_IDS_KEY]),
                one_end_id=bool(int(texts[ONE_END_ID_KEY])),
                echoes_keys=bool(int(texts[ECHOES_KEYS_KEY])),
            )
        except (KeyError, ValueError) as error:
            raise RepositoryError(
                f"reading the parameters of the model {config['name']}: {type(error).__name__}: {error}; expected "
                "those that packaging writes: package the engine again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class EngineInstance:
    """How one instance of a model loads its engine on ONNX Runtime."""

    folder: Path  # of the engine
    threads: int | None  # of each worker; None lets ONNX Runtime decide
    workers: int
    device_index: int  # of the GPU; 0 on the CPU

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, str], config: Mapping[str, Any]) -> EngineInstance:
        """From the arguments that Triton gives to a model's `initialize`. `config` is the JSON form of the model's
        configuration, which is one of them. Raises RepositoryError."""
        parameters, workers = ModelParameters.from_config(config), read_workers(config)
        return cls(
            folder=Path(arguments["model_repository"]) / arguments["model_version"] / parameters.engine,
            threads=parameters.threads_of_one(workers),
            workers=workers,
            device_index=int(arguments["model_instance_device_id"]) if arguments["model_instance_kind"] == "GPU" else 0,
        )


def read_workers(config: Mapping[str, Any]) -> int:
    """How many requests an instance answers at the same time where ONNX Runtime runs the engine. `config` is the JSON
    form of a model configuration. Raises RepositoryError."""
    text = config_texts(config).get(WORKERS_KEY)
    workers = None if text is None else whole_number(text, 1, MAX_WORKERS)
    if workers is None:
        raise RepositoryError(
            f"reading the parameters of the model {config['name']}: {WORKERS_KEY} is {shown(text)}, expected a number "
            "of 1 or more: package the engine again"
        )
    return workers


def config_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Parameter key to text, from the JSON form of a model configuration."""
    return {key: value["string_value"] for key, value in config["parameters"].items()}
