"""LoRA adapters as PEFT saves them, merged into a checkpoint's tensors while these are read.

    checkpoint = with_adapter(open_checkpoint("./base"), open_adapter("./adapter"))

An adapter is a folder of adapter_config.json and adapter_model.safetensors. For a module of the base with the weight W
[out, in] it holds lora_A [r, in] and lora_B [out, r]. The merged weight is

    W + scaling * (lora_B @ lora_A)        scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

in float32, rounded to the dtype in which the base stores W. That is what `merge_and_unload` of PEFT gives, up to the
order in which a product sums. rank_pattern and alpha_pattern give single modules another r or lora_alpha.
fan_in_fan_out has no effect: PEFT resets it for torch.nn.Linear, which all modules of our families are.
Source: peft, tuners/lora/{config,layer}.py and utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.folder import Checkpoint, model_folder
from export.checkpoint.safetensors_header import FLOAT_LABELS, read_header
from export.errors import ConfigError, MergeError, kind_of, listing, named, names, shown
from export.files.reading import is_regular, read_json
from export.floats import all_finite, widen

logger = logging.getLogger(__name__)

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Keys that say how the adapter was trained or where, and change nothing in what it adds.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core", "peft_version",
    "runtime_config", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "eva_config",
}  # fmt: skip
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}
# Ways to choose the initial values that leave the base's weights as they are. PiSSA, OLoRA, CorDA and LoftQ do not.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
_REASONS = {
    "use_dora": "a DoRA's magnitudes are not merged",
    "modules_to_save": "the adapter replaces whole modules",
    "lora_bias": "the adapter has biases of its own",
    "trainable_token_indices": "the adapter replaces rows of the embedding",
    "layer_replication": "the adapted model has more layers than its base",
    "target_parameters": "the adapter changes parameters that are no modules",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An opened adapter. `modules`: the base's module -> scaling. `checkpoint` holds its tensors."""

    checkpoint: Checkpoint
    modules: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with an adapter merged into them."""

    adapter: Adapter
    # lora_A of the module that was read last, since a module is read in many chunks of rows.
    _last: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        stored = super().read(name, rows, row_shape)
        module = name.removesuffix(".weight")
        scaling = self.adapter.modules.get(module)
        finite = np.isfinite(stored).all() if stored.dtype == np.float64 else all_finite(stored)
        if scaling is None or not finite:  # the caller says which values are not finite
            return stored
        low = self.adapter.checkpoint.read_float32(_tensor_name(module, "B"), rows)  # [rows, r]
        if module not in self._last:
            self._last.clear()
            self._last[module] = self.adapter.checkpoint.read_float32(_tensor_name(module, "A"))  # [r, in]
        change = low @ self._last[module]
        change *= np.float32(scaling)
        change += widen(stored)
        with np.errstate(over="ignore"):  # infinite values are refused by who reads them
            return change.astype(stored.dtype, copy=False)


def open_adapter(location: str, revision: str | None = None) -> Adapter:
    """Open an adapter's folder, or download a hub id. Raises ConfigError and CheckpointError, which name every setting
    and tensor that is not merged."""
    folder, commit = model_folder(location, revision)
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not is_regular(folder / name):
            pickled = "; only pickled weights are there, which can execute code: save the adapter as safetensors"
            raise ConfigError(
                f"opening the adapter {named(location)}: there is no {name}"
                + (pickled if name == WEIGHTS_FILE and is_regular(folder / "adapter_model.bin") else "; PEFT's "
                   "save_pretrained writes it: check that this is the folder of an adapter")
            )  # fmt: skip
    settings = read_json(folder / SETTINGS_FILE, "the adapter's settings")
    stored = {tensor.name: tensor for tensor in read_header(folder / WEIGHTS_FILE)}
    checkpoint = Checkpoint(
        folder=folder, identity=location, revision=commit, config=settings, tensors=stored,
        shards=(folder / WEIGHTS_FILE,),
    )  # fmt: skip
    problems = _refused_settings(settings)
    modules = {} if problems else _modules(settings, checkpoint, problems)
    if problems:
        raise ConfigError(
            f"opening the adapter {named(location)}: moeship merges LoRA adapters of linear modules, and not this "
            "one; merge it with PEFT's merge_and_unload, save the result, and give its folder: "
            f"{listing(problems, 12)}"
        )
    return Adapter(checkpoint=checkpoint, modules=modules)


def with_adapter(base: Checkpoint, adapter: Adapter) -> AdaptedCheckpoint:
    """The base with the adapter merged. Raises MergeError if the adapter was made for another base."""
    problems = []
    for module in adapter.modules:
        weight = base.tensors.get(f"{module}.weight")
        high, low = (adapter.checkpoint.tensors[_tensor_name(module, letter)].shape for letter in "AB")
        if weight is None:
            problems.append(f"{named(module)} is not a module of the base")
        elif weight.shape != (low[0], high[1]):
            problems.append(
                f"{named(module)} is {list(weight.shape)} in the base, the adapter is for {[low[0], high[1]]}"
            )
    asked = adapter.checkpoint.config.get("base_model_name_or_path")
    said = f" (its settings name {shown(asked, 80)})" if asked else ""
    if problems:
        raise MergeError(
            f"merging the adapter {named(adapter.checkpoint.identity)} into {named(base.identity)}: it was made for "
            f"another base{said}:{listing(problems, 6)}"
        )
    if isinstance(asked, str) and Path(asked).name != Path(base.identity).name:
        logger.warning(
            "the adapter %s fits %s by its shapes, but its settings name the base %s",
            adapter.checkpoint.identity, base.identity, shown(asked, 80),
        )  # fmt: skip
    own = {fact.name: getattr(base, fact.name) for fact in fields(Checkpoint) if fact.init}
    return AdaptedCheckpoint(**own | {"identity": f"{base.identity}+{adapter.checkpoint.identity}"}, adapter=adapter)


def _refused_settings(settings: Mapping[str, Any]) -> list[str]:
    if settings.get("peft_type") != "LORA":
        return [f"peft_type is {shown(settings.get('peft_type'))}, expected 'LORA'"]
    problems = []
    if settings.get("bias", "none") != "none":
        problems.append(f"bias is {shown(settings['bias'])}: the adapter changes the base's biases")
    if settings.get("init_lora_weights") not in _INITIAL:
        problems.append(
            f"init_lora_weights is {shown(settings['init_lora_weights'])}: the adapter is for a base whose weights "
            "were changed before training"
        )
    for key, value in settings.items():
        if key in _HARMLESS | _USED or value in (None, False, "", {}, []):
            continue
        reason = f": {_REASONS[key]}" if key in _REASONS else ""
        problems.append(f"{named(key, 60)} is {shown(value)}{reason}")
    return problems


def _modules(settings: Mapping[str, Any], checkpoint: Checkpoint, problems: list[str]) -> dict[str, float]:
    """Module -> scaling, for every pair of tensors. Adds to `problems` what is no pair or does not fit together."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    odd = []
    for name, tensor in checkpoint.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(tensor.shape) != 2 or tensor.dtype not in FLOAT_LABELS.values():
            odd.append(name)
        else:
            pairs.setdefault(match[1], {})[match[2]] = tensor.shape
    if odd:
        problems.append(f"{names(odd, 3)}: expected matrices lora_A and lora_B of modules, of a float dtype")
    if not pairs and not odd:
        problems.append("it holds no tensors")
    scalings = {}
    for module, shapes in pairs.items():
        rank = _patterned(settings, "rank_pattern", module, settings.get("r"))
        alpha = _patterned(settings, "alpha_pattern", module, settings.get("lora_alpha"))
        if set(shapes) != {"A", "B"}:
            problems.append(f"{named(module)} has lora_{next(iter(shapes))} alone")
        elif not isinstance(rank, int) or isinstance(rank, bool) or not shapes["A"][0] == shapes["B"][1] == rank >= 1:
            problems.append(
                f"{named(module)} has r {shown(rank)} in the settings, its matrices are {list(shapes['B'])} and "
                f"{list(shapes['A'])}"
            )
        elif isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            problems.append(f"{named(module)} has lora_alpha {shown(alpha)}, expected a number")
        else:
            scalings[module] = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return scalings


def _patterned(settings: Mapping[str, Any], key: str, module: str, default: Any) -> Any:  # noqa: ANN401 - JSON value
    """The value of the first pattern that matches the end of a module's name, else `default`. Raises ConfigError for a
    pattern that is no regular expression, or is long enough to be slow."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"opening an adapter: {key} is {kind_of(patterns)}, expected patterns of modules' names")
    for pattern, value in patterns.items():
        # PEFT reads a pattern as a regular expression; names of modules are all that is written in practice.
        if not re.fullmatch(r"\^?[\w.]+\$?", pattern):
            raise ConfigError(f"opening an adapter: the pattern {shown(pattern)} of {key} is not the name of a module")
        plain = pattern.removesuffix("$")
        found = module == plain[1:] if plain.startswith("^") else module == plain or module.endswith(f".{plain}")
        if found:
            return value
    return default


def _tensor_name(module: str, letter: str) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"
