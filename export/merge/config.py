"""Reads and checks a merge configuration in mergekit-moe's YAML format.

    base_model: ./experts/code          # attention, embedding, norms and head come from it
    gate_mode: hidden                   # hidden (= hidden_last), hidden_avg, cheap_embed, random, uniform_random
    dtype: float16                      # of the merged tensors; the base's when absent
    experts_per_token: 2
    experts:
      - source_model: ./experts/code    # a folder relative to the YAML, an absolute one, or a hub id
        positive_prompts: ["def main():"]
        negative_prompts: ["Once upon a time"]
        noise_scale: 0.01               # standard deviation of noise added to the expert's MLP
        residual_scale: 0.5             # scales what the expert's MLP adds to the residual
      - source_model: owner/name@v1+./adapter   # a revision of a hub id, and a LoRA adapter that is merged into it
    shared_experts:                     # of a qwen2_moe, one: every token goes through it, beside the experts
      - source_model: ./experts/code
        positive_prompts: ["def main():", "Once upon a time"]   # for its share, as an expert's for its row
        residual_scale: 0.1

Every key is used, listed as harmless, or refused by name. The keys are those of mergekit's moe/config.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from export.checkpoint.folder import HUB_ID
from export.checkpoint.safetensors_header import FLOAT_LABELS
from export.errors import ConfigError, kind_of, listing, named, shown, suggestion
from export.files.reading import is_folder, read_text
from export.files.recognised import MERGE_SUFFIXES, recognised
from export.files.yaml_reading import MAX_YAML_BYTES, parse_yaml

_TOP_KEYS = (
    "base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts", "architecture",
    "tokenizer_source",
)  # fmt: skip
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_WHAT = "the merge configuration"
# The words that mergekit and its forks write for each kind of mixture -> its family, or what its name begins with.
_ARCHITECTURES = {
    "mixtral": "mixtral", "phixtral": "phixtral", "phi-msft": "phixtral", "qwen": "qwen",
    "qwen moe": "qwen2_moe", "qwen2_moe": "qwen2_moe", "qwen3": "qwen3_moe", "qwen3 moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
}  # fmt: skip
_REFUSED = {
    "merge_method": "it belongs to mergekit-yaml, which merges dense models into a dense one",
    "slices": "it belongs to mergekit-yaml, which merges dense models into a dense one",
    "models": "it belongs to mergekit-yaml; list the models under experts",
    "tokenizer": "the merged checkpoint keeps the base's tokenizer as it is",
    "chat_template": "the merged checkpoint keeps the base's tokenizer settings as they are",
}


class GateMode(StrEnum):
    """How the router's rows are computed (export/merge/gates.py)."""

    HIDDEN = "hidden"
    HIDDEN_LAST = "hidden_last"
    HIDDEN_AVG = "hidden_avg"
    CHEAP_EMBED = "cheap_embed"
    RANDOM = "random"
    UNIFORM_RANDOM = "uniform_random"

    @property
    def reads_prompts(self) -> bool:
        return self not in (GateMode.RANDOM, GateMode.UNIFORM_RANDOM)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a folder or a hub id, a revision of the hub id, and an adapter that is merged into it."""

    location: str
    revision: str | None = None
    adapter: ModelSource | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.location}{at}" + (f"+{self.adapter}" if self.adapter else "")


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """One expert: its model, the prompts for its router row, and the changes to its MLP."""

    model: ModelSource
    positive_prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    noise_scale: float
    residual_scale: float


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The configuration of a merge. `dtype` is a safetensors label (None: the dtype of the base). `architecture` is
    the family of the mixture, or what its name begins with, if the YAML names one. `text` is the YAML. `shared` is the
    expert that every token goes through, if the YAML names one."""

    base: ModelSource
    experts: tuple[ExpertSource, ...]
    gate_mode: GateMode
    dtype: str | None
    experts_per_token: int
    text: str
    architecture: str | None = None
    shared: ExpertSource | None = None

    @property
    def all_experts(self) -> tuple[ExpertSource, ...]:
        """The experts in order, and after them the shared one."""
        return self.experts if self.shared is None else (*self.experts, self.shared)

    def name_of(self, index: int) -> str:
        """What messages call the expert at an index of `all_experts`."""
        return f"expert {index}" if index < len(self.experts) else "the shared expert"


def read_merge_config(path: Path) -> MergeConfig:
    """Read and check a merge YAML. Raises ConfigError that lists every problem."""
    taken = recognised(path) if path.suffix.lower() not in MERGE_SUFFIXES else None
    if taken is not None:
        raise ConfigError(f"reading {_WHAT} {named(path)}: {taken}; a merge takes a YAML file")
    text = read_text(path, _WHAT, most=MAX_YAML_BYTES)
    raw = parse_yaml(text, path, _WHAT)
    if not isinstance(raw, dict):
        raise ConfigError(f"reading {_WHAT}: {named(path)} holds {kind_of(raw)}, expected keys")
    reader = _Reader(path.parent)
    config = reader.config(raw, text)
    if reader.problems:
        asked = listing(reader.problems, 20)
        raise ConfigError(f"reading {_WHAT} {named(path)}: it asks for settings that moeship does not support:{asked}")
    return config


class _Reader:
    """Turns the values of the YAML into a MergeConfig and collects all problems."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.problems: list[str] = []

    def config(self, raw: Mapping[Any, Any], text: str) -> MergeConfig:
        self._refuse_unknown(raw, _TOP_KEYS, "")
        mode = self._choice(raw, "gate_mode", [mode.value for mode in GateMode], default=GateMode.HIDDEN.value)
        gate_mode = GateMode(mode)
        experts = self._experts(raw, gate_mode)
        shared = self._shared(raw, gate_mode)
        architecture = _ARCHITECTURES.get(str(raw.get("architecture") or "").lower())
        if raw.get("architecture") and architecture is None:
            known = sorted({family for family in _ARCHITECTURES.values() if family != "qwen"})
            self.problems.append(
                f"architecture is {shown(raw['architecture'])}; moeship merges into {' or '.join(known)}"
            )
        if raw.get("tokenizer_source") not in (None, "base", raw.get("base_model")):
            self.problems.append(
                f"tokenizer_source is {shown(raw['tokenizer_source'])}; the base's tokenizer is kept: base"
            )
        dtype = self._choice(raw, "dtype", list(FLOAT_LABELS), default=None)
        return MergeConfig(
            base=self._model(raw, "base_model", ""),
            experts=experts,
            gate_mode=gate_mode,
            dtype=FLOAT_LABELS[dtype] if dtype else None,
            experts_per_token=self._experts_per_token(raw, len(experts)),
            text=text,
            architecture=architecture,
            shared=shared,
        )

    def _shared(self, raw: Mapping[Any, Any], gate_mode: GateMode) -> ExpertSource | None:
        entries = raw.get("shared_experts")
        if entries in (None, []):
            return None
        if not isinstance(entries, list) or len(entries) != 1:
            found = f"{len(entries)}" if isinstance(entries, list) else shown(entries)
            self.problems.append(
                f"shared_experts: found {found}, expected a list of one: every token goes through it; other models go "
                "under experts"
            )
            return None
        return self._expert(entries[0], "shared_experts[0]", gate_mode)

    def _experts(self, raw: Mapping[Any, Any], gate_mode: GateMode) -> tuple[ExpertSource, ...]:
        entries = raw.get("experts")
        if not isinstance(entries, list) or len(entries) < 2:
            count = f"{len(entries)}" if isinstance(entries, list) else "none"
            self.problems.append(f"experts: found {count}, expected a list of at least 2")
            entries = entries if isinstance(entries, list) else []
        return tuple(self._expert(entry, f"experts[{i}]", gate_mode) for i, entry in enumerate(entries))

    def _expert(self, raw: Any, where: str, gate_mode: GateMode) -> ExpertSource:  # noqa: ANN401 - YAML value
        if not isinstance(raw, dict):
            self.problems.append(f"{where} is {shown(raw)}, expected keys such as source_model and positive_prompts")
            raw = {"source_model": ".", "positive_prompts": [""]}
        self._refuse_unknown(raw, _EXPERT_KEYS, f"{where}.")
        positive = self._prompts(raw, "positive_prompts", where)
        if gate_mode.reads_prompts and raw.get("positive_prompts") in (None, []):
            self.problems.append(
                f"{where}.positive_prompts is empty, but gate_mode {gate_mode.value} makes the expert's row from them; "
                "write one or more prompts, or take gate_mode random"
            )
        return ExpertSource(
            model=self._model(raw, "source_model", f"{where}."),
            positive_prompts=positive,
            negative_prompts=self._prompts(raw, "negative_prompts", where),
            noise_scale=self._number(raw, "noise_scale", where, absent=0.0, minimum=0.0),
            residual_scale=self._number(raw, "residual_scale", where, absent=1.0, minimum=-math.inf),
        )

    def _prompts(self, raw: Mapping[Any, Any], key: str, where: str) -> tuple[str, ...]:
        value = raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.problems.append(f"{where}.{key} is {shown(value)}, expected a list of texts: [{shown(value)}]")
            return ()
        wrong = [item for item in value if not isinstance(item, str)]
        if wrong:
            self.problems.append(
                f"{where}.{key} holds {shown(wrong[0])}, which YAML does not read as a text; put it in quotes"
            )
        return tuple(str(item) for item in value)

    def _number(self, raw: Mapping[Any, Any], key: str, where: str, *, absent: float, minimum: float) -> float:
        value = raw.get(key)
        if value is None:
            return absent
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= sys.float_info.max:
            least = f" of at least {minimum:g}" if math.isfinite(minimum) else ""
            self.problems.append(f"{where}.{key} is {shown(value)}, expected a finite number{least}")
            return absent
        return float(value)

    def _experts_per_token(self, raw: Mapping[Any, Any], num_experts: int) -> int:
        """Read experts_per_token; 2 if it is missing, as in mergekit."""
        value = 2 if raw.get("experts_per_token") is None else raw["experts_per_token"]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= max(num_experts, 1):
            self.problems.append(
                f"experts_per_token is {shown(value)}, expected 1 to {num_experts}, the number of experts"
            )
            return 1
        return value

    def _choice(self, raw: Mapping[Any, Any], key: str, allowed: list[str], *, default: str | None) -> Any:  # noqa: ANN401
        value = raw.get(key)
        if value is None or value in allowed:
            return value or default
        self.problems.append(
            f"{key} is {shown(value)}, expected one of {', '.join(allowed)}{suggestion(value, allowed)}"
        )
        return default

    def _model(self, raw: Mapping[Any, Any], key: str, where: str) -> ModelSource:
        """Read a model: a folder relative to that of the YAML, or a hub id, with `@revision`, with `+adapter`."""
        value = raw.get(key)
        if not isinstance(value, str) or not value:
            self.problems.append(f"{where}{key} is {shown(value)}, expected a folder or a hub id")
            return ModelSource("")
        if self._is_folder(value):  # its name may hold any character
            return self._place(value, f"{where}{key}")
        model, plus, adapter = value.partition("+")
        if plus and ("+" in adapter or not model or not adapter):
            self.problems.append(f"{where}{key} is {shown(value)}, expected one model and one adapter: model+adapter")
            return ModelSource("")
        found = self._place(model, f"{where}{key}")
        return replace(found, adapter=self._place(adapter, f"{where}{key}")) if plus else found

    def _place(self, text: str, where: str) -> ModelSource:
        """A folder, or a hub id with a revision."""
        name, at, revision = text.partition("@")
        if at and not self._is_folder(text):
            if HUB_ID.fullmatch(name) and revision and not self._is_folder(name):
                return ModelSource(name, revision)
            self.problems.append(f"{where} is {shown(text)}: only a hub id has a revision (owner/name@revision)")
            return ModelSource("")
        try:
            folder = self._folder / Path(text).expanduser()
        except RuntimeError as error:  # `~name` for a user who does not exist
            self.problems.append(f"{where} is {shown(text)}: {error}")
            return ModelSource("")
        return ModelSource(text if HUB_ID.fullmatch(text) and not is_folder(folder) else str(folder))

    def _is_folder(self, text: str) -> bool:
        try:
            return is_folder(self._folder / Path(text).expanduser())
        except RuntimeError:
            return False

    def _refuse_unknown(self, raw: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
        for key in raw:
            if key in known:
                continue
            there_are = suggestion(key, known) or f"; there are: {', '.join(known)}"
            reason = _REFUSED.get(key) or f"no such key{there_are}"
            self.problems.append(f"{where}{named(key, 60)}: {reason}")
