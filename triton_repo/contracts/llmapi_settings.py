"""model.yaml of a model on TensorRT-LLM's LLM API: reads and writes the settings of one packaged model.

    settings = read_settings(Path("repository/mixtral/1/model.yaml"))
    LLM(**settings.llm)

The keys at the top are arguments of `tensorrt_llm.LLM`; users may add others. `triton_config` is a section that
upstream has too (triton_backend/all_models/llmapi/tensorrt_llm/1/model.yaml). `moeship` is a section of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from export.errors import ConfigError, shown
from export.files.typed_json import read_typed
from export.files.yaml_reading import read_yaml
from triton_repo.errors import RepositoryError

SETTINGS_FILE = "model.yaml"
# Arguments that users may not set: moeship itself encodes and decodes text, and runs no code of a checkpoint.
_DECIDED_BY_MOESHIP = ("tokenizer", "skip_tokenizer_init", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """The section `triton_config`."""

    max_batch_size: int = 1  # 0: no batch dimension, as in upstream's layout
    decoupled: bool = True  # always true
    cancellation_check_period_ms: int = 100


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The section `moeship`."""

    end_token_ids: tuple[int, ...]
    max_sequence: int  # tokens of prompt and output together
    penalties: bool = False  # whether the LLM's sampler applies repetition, presence and frequency penalties


@dataclass(frozen=True, kw_only=True)
class LlmSettings:
    """All of model.yaml."""

    llm: Mapping[str, Any]  # arguments of tensorrt_llm.LLM; `model` is a folder beside model.yaml or an absolute path
    triton: TritonSettings
    text: TextSettings

    def to_yaml(self) -> str:
        """The text of model.yaml."""
        sections = {
            **self.llm,
            "triton_config": dataclasses.asdict(self.triton),
            "moeship": {**dataclasses.asdict(self.text), "end_token_ids": list(self.text.end_token_ids)},
        }
        return str(yaml.safe_dump(sections, sort_keys=False))


def read_settings(path: Path) -> LlmSettings:
    """The settings in a model.yaml. Raises RepositoryError for a file that is absent or holds what is not supported."""
    try:
        raw = read_yaml(path, "the model's settings")
        if not isinstance(raw, dict):
            raise ValueError(f"the file holds {shown(raw)}, expected keys and values")
        settings = LlmSettings(
            llm={key: value for key, value in raw.items() if key not in ("triton_config", "moeship")},
            triton=read_typed(TritonSettings, raw.get("triton_config"), "triton_config"),
            text=read_typed(TextSettings, raw.get("moeship"), "moeship"),
        )
        _check(settings)
    except (ConfigError, ValueError) as error:
        raise RepositoryError(f"reading {path}: {error}; package the checkpoint again") from error
    return settings


def _check(settings: LlmSettings) -> None:
    model = settings.llm.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError(f"model is {shown(model)}, expected a folder beside {SETTINGS_FILE} or an absolute path")
    if settings.llm.get("backend", "pytorch") != "pytorch":
        raise ValueError(f"backend is {shown(settings.llm['backend'])}, expected 'pytorch'")
    refused = [key for key in _DECIDED_BY_MOESHIP if key in settings.llm]
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot be set: moeship reads and writes the text itself")
    if not settings.triton.decoupled:
        raise ValueError("triton_config.decoupled is false, expected true: answers may be streamed")
    if settings.triton.max_batch_size < 0 or settings.triton.cancellation_check_period_ms < 1:
        raise ValueError(
            f"triton_config holds max_batch_size {settings.triton.max_batch_size} and cancellation_check_period_ms "
            f"{settings.triton.cancellation_check_period_ms}, expected 0 or more and 1 or more"
        )
    if not settings.text.end_token_ids or settings.text.max_sequence < 2:
        raise ValueError("moeship needs an end token and a max_sequence of 2 or more")
