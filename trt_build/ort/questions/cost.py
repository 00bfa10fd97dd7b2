"""Third question, in parts: what did the quantiser cost in each layer, role and expert?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from export.families import Model
from trt_build.comparison.cost import Cost, Grain
from trt_build.comparison.cost.measuring import CostOptions, CostWork, unasked
from trt_build.comparison.cost.measuring import prepare_cost as prepare
from trt_build.ort.engine import Engine
from trt_build.ort.questions.stored_weights import open_stored_weights


def ask_about_cost(
    engine: Engine,
    model: Model,
    token_ids: Sequence[int],
    options: CostOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> Cost:
    """The cost of each quantised part of an engine over a text. Raises ConfigError as `prepare_cost` does."""
    return prepare_cost(engine, model, token_ids, options)(progress)


def prepare_cost(engine: Engine, model: Model, token_ids: Sequence[int], options: CostOptions) -> CostWork:
    """Bound the work of `ask_about_cost`, as `trt_build/comparison/cost/measuring.py: prepare_cost` does."""
    manifest = engine.manifest
    if engine.old:
        reason = f"format {manifest.format_version} is not read back; build the engine again"
        return unasked(options.grain or Grain.LAYERS, reason)
    stored, precision = open_stored_weights(engine, model), manifest.judged_as
    return prepare(
        stored, model, token_ids, options, longest=manifest.max_sequence, precision=precision,
        dropped=manifest.lacking_experts,
    )  # fmt: skip
