"""First question: are these the checkpoint's weights? No text is needed.

The stored matrices are compared with the checkpoint's by `trt_build/comparison/weights.py`. Node attributes, operands
and rotary caches of all graphs must be what config.json says (`graph_facts.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from export.families import Model
from trt_build.comparison.answers import Answer
from trt_build.comparison.weights.comparing import compare_weights
from trt_build.ort.engine import Engine
from trt_build.ort.questions.graph_facts import graph_failures
from trt_build.ort.questions.stored_weights import open_stored_weights


def ask_about_weights(engine: Engine, model: Model, progress: Callable[[str], None] = lambda _: None) -> Answer:
    """Compare an engine with the model that it was built from. Raises EngineError for graphs that cannot be read,
    CheckpointError for weights that cannot be read or are not finite."""
    stored = open_stored_weights(engine, model)
    return compare_weights(stored, model, graph_failures(engine, model, stored.graph), progress)
