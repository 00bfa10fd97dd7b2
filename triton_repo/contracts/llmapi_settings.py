"""model.yaml of a model on TensorRT-LLM's LLM API: what a deployment is, to and from the file.

    settings = read_settings(Path("repository/mixtral/1/model.yaml"))
    LLM(**settings.llm)

Keys at the top are the arguments of `tensorrt_llm.LLM` and may be added to; `triton_config` is upstream's section
(triton_backend/all_models/llmapi/tensorrt_llm/1/model.yaml); `moeship` is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from export.errors import ConfigError, shown
from export.typed_json import read_typed
from export.yaml_reading import read_yaml
from triton_repo.errors import RepositoryError

SETTINGS_FILE = "model.yaml"
# What a model of ours decides itself: text is ours, and nothing of a checkpoint is executed.
_OURS = ("tokenizer", "skip_tokenizer_init", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """`max_batch_size` 0 is upstream's layout, without a batch dimension. `decoupled` is always true."""

    max_batch_size: int = 1
    decoupled: bool = True
    cancellation_check_period_ms: int = 100


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """`max_sequence`: tokens of prompt and output together. `penalties`: whether the LLM's sampler applies repetition,
    presence and frequency penalties.
    """

    end_token_ids: tuple[int, ...]
    max_sequence: int
    penalties: bool = False


@dataclass(frozen=True, kw_only=True)
class LlmSettings:
    """`llm`: the arguments of tensorrt_llm.LLM, `model` among them, a folder beside model.yaml or an absolute path."""

    llm: Mapping[str, Any]
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
    """Raises RepositoryError for a file that is absent, no such settings, or that says what is not done here."""
    try:
        raw = read_yaml(path, "the model's settings")
        if not isinstance(raw, dict):
            raise ValueError(f"the top is {shown(raw)}, expected keys and values")
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
    refused = [key for key in _OURS if key in settings.llm]
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
