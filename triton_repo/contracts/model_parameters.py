"""The parameters in the config.pbtxt of a packaged model: reads and writes them.

Triton's parameters are texts. These dataclasses are the one place where texts become values and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from export.errors import shown
from export.files.reading import whole_number
from export.provider import FLOAT, KV_CACHES
from triton_repo.errors import RepositoryError

TRITON_BACKEND = "tensorrtllm"  # what config.pbtxt calls TensorRT-LLM's C++ backend; engine.json has another word
MODEL_FILE = "model.py"  # a model's program, within a version's folder
ENGINE_FOLDER = "engine"  # within a version's folder
ENGINE_KEY = "moeship_engine"
THREADS_KEY = "moeship_threads"
SLOTS_KEY = "moeship_slots"
MEMORY_KEY = "moeship_memory_budget"
MAX_WAITING_KEY = "moeship_max_waiting"
MAX_WAIT_KEY = "moeship_max_wait_s"
PAUSE_KEY = "moeship_pause_target_ms"
PREFIX_CACHE_KEY = "moeship_prefix_cache"
DRAFTS_KEY = "moeship_drafts"
KV_CACHE_KEY = "moeship_kv_cache"
TOKENIZER_KEY = "tokenizer_dir"
MAX_SEQUENCE_KEY = "moeship_max_sequence"
MAX_PROMPT_KEY = "moeship_max_prompt"
END_IDS_KEY = "moeship_end_ids"
NUM_IDS_KEY = "moeship_num_ids"
WORLD_SIZE_KEY = "moeship_world_size"
GPUS_KEY = "moeship_gpus"
ONE_END_ID_KEY = "moeship_one_end_id"
ECHOES_KEYS_KEY = "moeship_echoes_keys"
GUIDED_KEY = "moeship_guided"
MAX_THREADS = 4096  # of one instance
MAX_SLOTS = 256
MAX_WAITING = 1_000_000
MAX_WAIT_S = 86_400
MAX_PAUSE_MS = 60_000
MAX_BYTES = 1 << 50
_AUTOMATIC = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelParameters:
    """The parameters of a model in which ONNX Runtime runs the engine."""

    engine: str = ENGINE_FOLDER  # within the version's folder
    threads: int | None = None  # None: one for each physical core that the server may use
    slots: int = 8  # sequences that are computed together
    memory_budget: int | None = None  # bytes of keys and values; None takes what the machine has free
    max_waiting: int = 64  # requests; more are refused
    max_wait_s: int = 60  # before a request's turn; then it is refused
    pause_target_ms: int = 250  # of a step that prompts share with running answers
    prefix_cache: bool = True  # whether a prompt goes on from what slots hold of it
    drafts: bool = True  # whether a step may compute tokens of an answer before they are chosen
    kv_cache: str = FLOAT  # how keys and values are stored, one of KV_CACHES

    def to_texts(self) -> dict[str, str]:
        """Parameter key to text."""
        values = {key: getattr(self, name) for key, (name, _, _) in _NUMBERS.items()}
        texts = {key: _AUTOMATIC if value is None else str(value) for key, value in values.items()}
        flags = {key: str(int(getattr(self, name))) for key, name in _FLAGS.items()}
        return {ENGINE_KEY: self.engine, **texts, **flags, KV_CACHE_KEY: self.kv_cache}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], model: str) -> ModelParameters:
        """From parameter key to text. Raises RepositoryError for an absent key or a text that is not a valid value."""
        problems = [f"{key} is absent" for key in (ENGINE_KEY, *_NUMBERS, *_FLAGS, KV_CACHE_KEY) if key not in texts]
        flags = {key: texts[key] for key in _FLAGS if key in texts}
        problems += [
            f"{key} is {shown(text)}, expected 0 or 1" for key, text in flags.items() if text not in ("0", "1")
        ]
        kv_cache = texts.get(KV_CACHE_KEY, FLOAT)
        if kv_cache not in KV_CACHES:
            problems.append(f"{KV_CACHE_KEY} is {shown(kv_cache)}, expected {' or '.join(KV_CACHES)}")
        values: dict[str, int | None] = {}
        for key, (name, most, is_optional) in _NUMBERS.items():
            if key not in texts:
                continue
            number = whole_number(texts[key], 1, most)
            values[name] = number
            if number is None and not (is_optional and texts[key] == _AUTOMATIC):
                or_automatic = f" or {_AUTOMATIC!r}" if is_optional else ""
                problems.append(f"{key} is {shown(texts[key])}, expected a number of 1 to {most}{or_automatic}")
        if problems:
            raise RepositoryError(
                f"reading the parameters of the model {model}: {'; '.join(problems)}: package the engine again"
            )
        numbers: dict[str, Any] = values  # of which only those that are optional are None
        chosen = {_FLAGS[key]: text == "1" for key, text in flags.items()}
        return cls(engine=texts[ENGINE_KEY], kv_cache=kv_cache, **chosen, **numbers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelParameters:
        """From the JSON form of a model configuration, which Triton gives to a model."""
        return cls.from_texts(config_texts(config), config["name"])

    def problems(self) -> list[str]:
        """What is wrong with the values, each by the name of its field."""
        found = []
        for name, most, is_optional in _NUMBERS.values():
            value = getattr(self, name)
            if not (value is None and is_optional) and not 1 <= value <= most:
                found.append(f"{name} is {value}; expected 1 to {most}")
        if self.kv_cache not in KV_CACHES:
            found.append(f"kv_cache is {self.kv_cache}; expected {' or '.join(KV_CACHES)}")
        return found


def changed_fields(parameters: ModelParameters) -> list[str]:
    """The names of the fields that have another value than by default."""
    return [entry.name for entry in fields(parameters) if getattr(parameters, entry.name) != entry.default]


# Parameter key -> field, whose text is 0 or 1.
_FLAGS: Mapping[str, str] = MappingProxyType({PREFIX_CACHE_KEY: "prefix_cache", DRAFTS_KEY: "drafts"})
# Parameter key -> field, the largest value, and whether the text "auto" stands for None.
_NUMBERS: Mapping[str, tuple[str, int, bool]] = MappingProxyType(
    {
        THREADS_KEY: ("threads", MAX_THREADS, True),
        SLOTS_KEY: ("slots", MAX_SLOTS, False),
        MEMORY_KEY: ("memory_budget", MAX_BYTES, True),
        MAX_WAITING_KEY: ("max_waiting", MAX_WAITING, False),
        MAX_WAIT_KEY: ("max_wait_s", MAX_WAIT_S, False),
        PAUSE_KEY: ("pause_target_ms", MAX_PAUSE_MS, False),
    }
)


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
    guided: bool = True  # the engine keeps answers to guides

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
            GUIDED_KEY: str(int(self.guided)),
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
                guided=bool(int(texts[GUIDED_KEY])),
            )
        except (KeyError, ValueError) as error:
            raise RepositoryError(
                f"reading the parameters of the model {config['name']}: {type(error).__name__}: {error}; expected "
                "those that packaging writes: package the engine again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class EngineInstance:
    """How one instance of a model loads and runs its engine on ONNX Runtime."""

    folder: Path  # of the engine
    parameters: ModelParameters = field(default_factory=ModelParameters)
    device_index: int = 0  # of the GPU; 0 on the CPU

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, str], config: Mapping[str, Any]) -> EngineInstance:
        """From the arguments that Triton gives to a model's `initialize`. `config` is the JSON form of the model's
        configuration, which is one of them. Raises RepositoryError."""
        parameters = ModelParameters.from_config(config)
        return cls(
            folder=Path(arguments["model_repository"]) / arguments["model_version"] / parameters.engine,
            parameters=parameters,
            device_index=int(arguments["model_instance_device_id"]) if arguments["model_instance_kind"] == "GPU" else 0,
        )


def config_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Parameter key to text, from the JSON form of a model configuration."""
    return {key: value["string_value"] for key, value in config["parameters"].items()}
