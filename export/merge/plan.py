"""Decides what a merge reads and writes before anything is computed, and says what each expert loses.

Only headers are read, and some rows of what a merge takes from the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.architecture import Architecture
from export.checkpoint.folder import Checkpoint, open_checkpoint
from export.families import Model, read_model, with_whole_names
from export.merge.adapters import AdaptedCheckpoint, open_adapter, with_adapter
from export.merge.checks import check_models, measure_lost_training, output_dtype
from export.merge.config import MergeConfig, ModelSource
from export.merge.layout import MergedTensor
from export.merge.outputs import Output, choose_output
from export.tokenizer.settings import Settings, read_settings


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What a merge reads and writes, decided before anything is computed. `architecture` is the mixture's. `shared` is
    the model of the shared expert."""

    output: Output
    base: Model
    experts: Sequence[Model]
    shared: Model | None
    settings: Settings
    architecture: Architecture
    dtype: str
    tensors: Sequence[MergedTensor]

    @property
    def all_experts(self) -> list[Model]:
        """The experts in order, and after them the shared one."""
        return [*self.experts, *([] if self.shared is None else [self.shared])]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.planned.num_elements for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.planned.num_bytes for tensor in self.tensors)


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open the models, which reads their headers alone, and decide what the merge writes. Raises ConfigError,
    CheckpointError and MergeError."""
    base, experts, shared = _open_models(config)
    output = choose_output(base, config.architecture)
    check_models(output, base, experts, shared)
    checkpoint = base.weights.checkpoint
    settings = read_settings(checkpoint.folder, checkpoint.config, checkpoint.gguf_file)
    dtype = output_dtype(config.dtype, base)
    architecture = replace(
        output.architecture(base.architecture),
        family=output.name,
        eos_token_ids=settings.ids.eos,
        num_experts=len(experts),
        experts_per_token=config.experts_per_token,
    )
    tensors = output.tensors(architecture, dtype)
    return MergePlan(
        output=output, base=base, experts=experts, shared=shared, settings=settings, architecture=architecture,
        dtype=dtype, tensors=tensors,
    )  # fmt: skip


def _open_models(config: MergeConfig) -> tuple[Model, list[Model], Model | None]:
    """Open the base, the experts and the shared one; a model that is given several times is opened once."""
    sources = [config.base, *(expert.model for expert in config.all_experts)]
    models = {source: _open_model(source) for source in dict.fromkeys(sources)}
    shared = models[config.shared.model] if config.shared else None
    return models[config.base], [models[expert.model] for expert in config.experts], shared


def _open_model(source: ModelSource) -> Model:
    checkpoint = with_whole_names(open_checkpoint(source.location, source.revision))
    if source.adapter is not None:
        checkpoint = with_adapter(checkpoint, open_adapter(source.adapter.location, source.adapter.revision))
    return read_model(checkpoint)


def sources_of(models: Sequence[Model]) -> list[Checkpoint]:
    """The folders that the models and their adapters are read from, each once."""
    found: dict[Path, Checkpoint] = {}
    for model in models:
        checkpoint = model.weights.checkpoint
        found.setdefault(checkpoint.folder, checkpoint)
        if isinstance(checkpoint, AdaptedCheckpoint):
            found.setdefault(checkpoint.adapter.checkpoint.folder, checkpoint.adapter.checkpoint)
    return list(found.values())


def losses(config: MergeConfig, plan: MergePlan) -> list[str]:
    """What each expert loses, and what the mixture lacks of the base, a sentence each."""
    sentences = []
    window = plan.base.architecture.sliding_window
    if window is not None and plan.output.drops_window:
        sentences.append(
            f"the base attends to the last {window} positions, a {plan.output.name} to all of them, as mergekit-moe "
            f"writes it: texts of more than {window} tokens are computed otherwise than the experts compute them"
        )
    for lost in measure_lost_training(plan.base, plan.all_experts):
        who = f"{config.name_of(lost.expert)} ({config.all_experts[lost.expert].model})"
        if lost.num_differing:
            sentences.append(
                f"{who} differs from the base outside its MLPs in {lost.num_differing} of {lost.num_compared} sampled "
                f"tensors, most in {lost.tensor} by {lost.relative:.3g} of its size: a {plan.output.name} keeps the "
                "base's there, so what the expert learned in them is lost"
            )
        if lost.facts:
            said = ", ".join(f"{name} {own} for {theirs}" for name, (own, theirs) in lost.facts.items())
            sentences.append(f"{who} has {said} of the base: the mixture has the base's")
    return sentences
