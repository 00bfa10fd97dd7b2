"""The checkpoint that an engine is built from: opened and checked before the build, recorded after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from export.architecture import Architecture
from export.checkpoint.folder import Checkpoint, open_checkpoint
from export.errors import ConfigError
from export.families import Model, read_model
from export.tokenizer.loading import Tokenizer
from export.tokenizer.settings import Settings, check_token_ids
from export.tokenizer.surplus import model_settings
from trt_build.manifest import Source


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A checkpoint, its model and its tokenizer's settings, and the longest sequence of the engine in tokens."""

    checkpoint: Checkpoint
    model: Model
    settings: Settings
    max_sequence: int

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end a text; empty if no file of the checkpoint names one."""
        return self.settings.ids.eos

    @property
    def tokenizer(self) -> Tokenizer:
        return self.settings.tokenizer


def open_source(location: str, experts_per_token: int | None, max_sequence: int | None) -> SourceModel:
    """Open a checkpoint and read its model and settings. Raises CheckpointError and ConfigError."""
    model = read_model(open_checkpoint(location), experts_per_token)
    checkpoint = model.weights.checkpoint
    settings = model_settings(model)
    longest = _max_sequence(max_sequence, model)
    vocab = model.architecture.vocab_size
    check_token_ids(settings, vocab)
    model = dataclasses.replace(
        model, architecture=dataclasses.replace(model.architecture, eos_token_ids=settings.ids.eos)
    )
    return SourceModel(checkpoint=checkpoint, model=model, settings=settings, max_sequence=longest)


def _max_sequence(asked: int | None, model: Model) -> int:
    limit = model.architecture.max_positions
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise ConfigError(f"setting the longest sequence: found {asked} tokens, expected 1 to {limit}, the model's own")
    return asked


def with_built_experts(model: Model, facts: Architecture) -> tuple[Model, tuple[str, ...]]:
    """The checkpoint's model with the experts per token of an engine that has these facts, which a build may override,
    and a finding where that is not the checkpoint's number."""
    said, taken = model.architecture.experts_per_token, facts.experts_per_token
    if not (facts.is_moe and model.architecture.is_moe) or said == taken:
        return model, ()
    finding = (
        f"the engine takes {taken} experts per token, and the checkpoint's config.json says {said}: the reference was "
        f"computed with {taken}; that is right where the engine was built with --experts-per-token"
    )
    architecture = dataclasses.replace(model.architecture, experts_per_token=taken)
    return dataclasses.replace(model, architecture=architecture), (finding,)


def source_record(checkpoint: Checkpoint, digests: Mapping[str, str]) -> Source:
    """What engine.json says of a checkpoint whose files have these digests."""
    return Source(checkpoint=checkpoint.identity, revision=checkpoint.revision, digests=dict(digests))
