"""Engines of published models' shapes for benchmarks: some layers, random weights, the same share of the vocabulary."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from export.architecture import Architecture
from export.errors import ConfigError
from export.quantize.recipe import NEAREST
from synthetic_checkpoint import MODELS, shortened, write
from trt_build.calibration import Calibration
from trt_build.ort.build import BuildOptions, build_engine

MAX_SEQUENCE = 4096
LEAST_VOCABULARY = 2048  # the synthetic checkpoints' tokenizer has 2000 tokens
_ROWS = 16

logger = logging.getLogger(__name__)


def share_of(model: Architecture, layers: int) -> Architecture:
    """`layers` layers of a model, with the same share of its vocabulary, rounded up to whole groups of rows: so the
    head keeps its share of a token. Raises ConfigError for a number of layers that the model does not have."""
    if not 1 <= layers <= model.num_layers:
        raise ConfigError(f"shaping a {model.family}: found {layers} layers, expected 1 to {model.num_layers}")
    if layers == model.num_layers:
        return model
    groups = -(-model.vocab_size * layers // (model.num_layers * _ROWS))
    return replace(shortened(model, layers), vocab_size=max(groups * _ROWS, LEAST_VOCABULARY))


def engine_of(like: str, layers: int | None, precision: str, folder: Path) -> Path:
    """The engine of some layers of a published model (None: all), made in `folder` where it is missing. Its checkpoint
    is removed. Raises MoeshipError."""
    model = MODELS[like]
    facts = share_of(model, layers or model.num_layers)
    engine = folder / f"engine-{like}-L{facts.num_layers}-V{facts.vocab_size}-{precision}"
    if engine.exists():
        return engine
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as scratch:
        checkpoint = Path(scratch) / like
        logger.info("writing a checkpoint of %d layers of %s", facts.num_layers, like)
        write(facts, checkpoint, seed=0)
        logger.info("building %s", engine)
        build_engine(
            BuildOptions(
                checkpoint=str(checkpoint),
                output=engine,
                precision=precision,
                max_sequence=min(MAX_SEQUENCE, facts.max_positions),
                calibration=Calibration(method=NEAREST),  # codes of random weights need no search
            )
        )
    return engine
