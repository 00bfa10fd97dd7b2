"""Merges dense models into a mixture's checkpoint: a folder with shards, config.json and the base's tokenizer.

    config = read_merge_config(Path("merge.yml"))
    result = merge(config, Path("mixture"))

The MLPs of all models in a layer become that layer's experts; everything else is copied from the base. In a qwen2_moe
the MLP of one more model becomes the shared expert, which every token goes through. Tensors are copied in chunks, so
memory does not grow with the model; gates from hidden states also need one layer of the base.
With `training` the gates are then fitted to texts (gate_training.py) and written over those from the prompts. The
folder gets its name only when it is complete.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from export import routing
from export.architecture import Architecture
from export.checkpoint.folder import open_checkpoint
from export.checkpoint.shard_writer import write_sharded
from export.conversion.sources import check_unchanged, source_files
from export.families import Model, read_model
from export.files.output import refuse_existing, require_space, staged_directory
from export.merge.config import GateMode, MergeConfig
from export.merge.gate_training import GateTraining, TrainedGates, measured_after, train_gates
from export.merge.gates import gate_matrices
from export.merge.layout import MergedTensor, MergeSources, cast
from export.merge.plan import MergePlan, losses, plan_merge, sources_of
from export.tokenizer.rules import SETTINGS_FILE, read_tokenizer_files, tokenizer_class
from export.tokenizer.settings import Settings

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5_000_000_000
YAML_FILE = "mergekit_moe_config.yml"  # the name under which mergekit saves a copy of its configuration
TRAINING_FILE = "gate_training.json"
_WHAT = "the merged checkpoint"


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The merged checkpoint that was written. `routing` is the diagnosis of the gates as they are stored; `trained`
    says how they were fitted, None if they come from the prompts alone."""

    folder: Path
    architecture: Architecture
    dtype: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    shards: tuple[Path, ...]
    routing: routing.RoutingReport
    trained: TrainedGates | None = None


def merge(
    config: MergeConfig,
    output: Path,
    *,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    training: GateTraining | None = None,
) -> MergeResult:
    """Merge models as `config` says and write the checkpoint to the new folder `output`. `seed` is for random gates,
    for noise, and for what `training` holds out.

    Raises ConfigError, CheckpointError, MergeError and OutputError; `output` then does not exist.
    """
    started = time.monotonic()
    refuse_existing(output, _WHAT)
    plan = plan_merge(config)
    base, experts, dtype, tensors = plan.base, plan.all_experts, plan.dtype, plan.tensors
    architecture, settings = plan.architecture, plan.settings
    states = [(source, source_files(source)) for source in sources_of((base, *experts))]
    require_space(output, plan.num_bytes, _WHAT)
    _warn_of_losses(config, plan)
    gates = _gates(config, base, dtype, seed, trained_later=training is not None)
    routers = {layer: gate[: len(plan.experts)] for layer, gate in gates.items()}
    report = routing.diagnose(routers, config.experts_per_token)
    trained = None
    sources = MergeSources(base=base, experts=experts, settings=config.all_experts, gates=gates, seed=seed)
    with staged_directory(output, _WHAT) as folder:
        values = plan.output.config(base, architecture, dtype, _token_keys(architecture, settings))
        _write_folder(folder, config, values, settings, tensors, sources, max_shard_bytes)
        if training is not None:
            trained, routers = _train(folder, plan.experts, training, tensors, seed)
            report = routing.diagnose(routers, config.experts_per_token)
        else:
            for sentence in routing.warnings(report):
                logger.warning("routing: %s", sentence)
        for source, state in states:
            check_unchanged(source, state)
    result = MergeResult(
        folder=output,
        architecture=architecture,
        dtype=dtype,
        num_tensors=len(tensors),
        num_parameters=plan.num_parameters,
        num_bytes=plan.num_bytes,
        shards=tuple(sorted(output.glob("*.safetensors"))),
        routing=report,
        trained=trained,
    )
    logger.debug(
        "merged %d experts: %d tensors, %.3f GB, %.1f s, %s",
        len(plan.experts), result.num_tensors, result.num_bytes / 1e9, time.monotonic() - started, output,
    )  # fmt: skip
    return result


def _train(
    folder: Path, experts: Sequence[Model], training: GateTraining, tensors: Sequence[MergedTensor], seed: int
) -> tuple[TrainedGates, dict[int, npt.NDArray[Any]]]:
    """Fit the gates of the merged checkpoint in `folder`, write them over its own, and a record beside them. Returns
    what was measured, and the gates as they are stored."""
    mixture = read_model(open_checkpoint(str(folder)))
    trained = train_gates(mixture, experts, training, seed=seed)
    if trained.never_best:
        logger.warning(
            "expert(s) %s are best for no token of the texts: their gate rows send them few tokens; give a text of "
            "their kind, or leave them out",
            ", ".join(map(str, trained.never_best)),
        )
    stored = {}
    for tensor in tensors:
        if not tensor.is_router or tensor.layer is None:
            continue
        place = mixture.weights.checkpoint.tensors[tensor.planned.name]
        gate = cast(trained.gates[tensor.layer], tensor.planned.dtype, tensor.planned.name)
        with place.shard.open("r+b") as file:
            file.seek(place.offset)
            file.write(gate.tobytes())
        stored[tensor.layer] = gate
    trained = measured_after(trained, read_model(open_checkpoint(str(folder))), training.progress)
    if trained.finding:
        logger.warning("%s", trained.finding)
    (folder / TRAINING_FILE).write_text(json.dumps(trained.to_json(), indent=2) + "\n", encoding="utf-8")
    return trained, stored


def _write_folder(
    folder: Path,
    config: MergeConfig,
    config_values: Mapping[str, Any],
    settings: Settings,
    tensors: Sequence[MergedTensor],
    sources: MergeSources,
    max_shard_bytes: int,
) -> None:
    """Write the shards, config.json, the base's tokenizer and settings, and a copy of the YAML."""
    by_name = {tensor.planned.name: tensor for tensor in tensors}
    write_sharded(
        folder,
        [tensor.planned for tensor in tensors],
        lambda planned: sources.chunks(by_name[planned.name]),
        max_shard_bytes=max_shard_bytes,
    )
    (folder / "config.json").write_text(json.dumps(config_values, indent=2) + "\n", encoding="utf-8")
    (folder / YAML_FILE).write_text(config.text, encoding="utf-8")
    settings.write(folder)
    _keep_tokenizer_class(folder, config_values, settings.facts.tokenizer_class)


def _keep_tokenizer_class(folder: Path, config: Mapping[str, Any], name: str) -> None:
    """Name the class of the base's tokenizer in tokenizer_config.json where that file asks for another one, which
    transformers would take for the mixture: for some model types, but not for others, it takes one class whatever the
    file asks for."""
    files = read_tokenizer_files(folder)
    asked = files.settings.get("tokenizer_class")
    if asked and asked.removesuffix("Fast") != name != tokenizer_class(files, config):
        told = {**files.settings, "tokenizer_class": name}
        (folder / SETTINGS_FILE).write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _token_keys(architecture: Architecture, settings: Settings) -> dict[str, Any]:
    """The keys of config.json with the base's token ids, after `export.tokenizer.settings` has joined its files. A
    program that reads only config.json finds them there."""
    ids = architecture.eos_token_ids
    end = ids[0] if len(ids) == 1 else list(ids) or None
    stated = {"bos_token_id": architecture.bos_token_id, "eos_token_id": end, "pad_token_id": settings.ids.pad}
    return {name: value for name, value in stated.items() if value is not None}


def _warn_of_losses(config: MergeConfig, plan: MergePlan) -> None:
    """Log warnings about experts that are the same model, and about experts that lose training outside their MLPs."""
    counts = Counter((setting.model, setting.noise_scale > 0, setting.residual_scale) for setting in config.experts)
    for (model, noisy, _), count in counts.items():
        if count > 1 and not noisy:
            logger.warning("%d of the %d experts are the same model, %s: choosing between them changes nothing",
                           count, len(config.experts), model)  # fmt: skip
    for sentence in losses(config, plan):
        logger.warning("%s", sentence)


def _gates(
    config: MergeConfig, base: Model, dtype: str, seed: int, *, trained_later: bool
) -> dict[int, npt.NDArray[Any]]:
    """Layer -> gate matrix, rounded to the output dtype, a shared expert's row last. Warns of experts with only empty
    prompts if no training follows, and of such a shared expert always: training leaves its row as it is."""
    started = time.monotonic()
    gates = {
        layer: cast(gate, dtype, f"the gate of layer {layer}")
        for layer, gate in gate_matrices(config, base, seed=seed).items()
    }
    empty = [
        index
        for index, expert in enumerate(config.all_experts)
        if config.gate_mode.reads_prompts and not any(expert.positive_prompts)
    ]
    routed = [index for index in empty if index < len(config.experts)]
    if routed and not trained_later:
        logger.warning(
            "expert(s) %s have only empty prompts: their gate rows come from the tokenizer's start token alone",
            ", ".join(map(str, routed)),
        )
    if len(routed) < len(empty):
        logger.warning(
            "the shared expert has only empty prompts: its gate row comes from the tokenizer's start token alone"
        )
    mode = GateMode.HIDDEN_LAST if config.gate_mode is GateMode.HIDDEN else config.gate_mode
    logger.info("gates made by %s in %.1f s", mode.value, time.monotonic() - started)
    return gates
