"""Measures what the quantiser cost in each layer, role and expert.

The streamed reference carries a variant of the hidden states for each part, in which that part alone has the engine's
dequantised codes (export/reference/variants.py). So the cost of the answer is one pass over the weights in both forms,
and the arithmetic of tokens times variants. Both are bounded before the work begins: by the number of tokens, and by
telling experts apart only where that leaves enough tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.checkpoint.tensor_table import Role, TensorSpec
from export.errors import ConfigError
from export.families import Model
from export.reference.variants import Part, Variants, begin
from trt_build.comparison.cost import Cost, Grain, PartCost
from trt_build.comparison.divergence import StreamedDivergence
from trt_build.comparison.read_back import ReadBack

CostWork = Callable[[Callable[[str], None]], Cost]

logger = logging.getLogger(__name__)

# Products of two numbers that may be computed: some 400 s of one core, which computes 38e9 a second for the reference.
MOST_PRODUCTS = 15e12
MOST_STATE_BYTES = 1e9  # for the hidden states of all variants; weights in both forms come on top
LEAST_TOKENS = 16
EXPERT_TOKENS = 256  # experts are told apart without being asked for where at least as many tokens can be taken
MOST_WINDOW = 256  # tokens of a window, so that a short text has several kinds of text in it
_NUM_WINDOWS, _LEAST_WINDOW = 8, 32


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """What is asked for; None is chosen by the bounds. A number of tokens that is asked for may exceed MOST_PRODUCTS,
    and not the memory. Where none is asked for, at most `most` are taken."""

    grain: Grain | None = None
    tokens: int | None = None
    most: int | None = None


# Of an engine that failed: enough to tell the part that costs most.
OF_A_FAILURE = CostOptions(grain=Grain.LAYERS, most=256)


def prepare_cost(
    stored: ReadBack,
    model: Model,
    token_ids: Sequence[int],
    options: CostOptions,
    *,
    longest: int,
    precision: str,
    num_ids: int | None = None,
    dropped: Mapping[int, Sequence[int]] | None = None,
) -> CostWork:
    """Bound the work and say what was chosen; returns what does the work, which takes a function that is told of its
    progress. `stored` are an engine's weights, and a window has at most `longest` tokens. Of the vocabulary the first
    `num_ids` are compared (None: all). `dropped`: layer -> experts that the model is taken without. Raises ConfigError
    for a number of tokens that the text or the memory does not have."""
    grain = options.grain or Grain.LAYERS
    missing = next((name for name in stored.table if stored.misfit(name)), None)
    if missing is not None:
        return unasked(grain, f"the engine does not store {missing} in its shape")
    if not quantised_parts(stored, model, Grain.LAYERS):
        return unasked(grain, f"no weight is quantised at {precision}")
    plan = plan_cost(stored, model, len(token_ids), options)
    if isinstance(plan, str):
        return unasked(grain, plan)
    logger.info("the quantiser's cost will be measured on %s", plan.choice)
    windows = spread_windows(token_ids, plan.tokens, min(MOST_WINDOW, longest))
    return lambda progress: measure_cost(stored, model, windows, plan, progress, num_ids, dropped)


def unasked(grain: Grain, reason: str) -> CostWork:
    """No work, and the reason for it in words."""
    return lambda _: Cost(grain=grain, unasked=reason)


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """What is computed: the parts at a grain, over a number of tokens, and the reason in words."""

    grain: Grain
    tokens: int
    parts: tuple[Part, ...]
    choice: str


def plan_cost(stored: ReadBack, model: Model, available: int, options: CostOptions) -> CostPlan | str:
    """Choose grain and number of tokens within the bounds, at most the `available` tokens of the text; returns the
    reason, in words, if even LEAST_TOKENS are too much work. Raises ConfigError for tokens that were asked for and
    cannot be had."""
    if options.tokens is not None and not LEAST_TOKENS <= options.tokens <= available:
        raise ConfigError(
            f"choosing the tokens that the quantiser's cost is measured on: found {options.tokens}, expected "
            f"{LEAST_TOKENS} to {available}, the tokens of the text; pass --cost-tokens within that, or more --tokens"
        )
    grains = [options.grain] if options.grain else [Grain.EXPERTS, Grain.LAYERS]
    for grain in grains:
        parts = (Part(role=None), *quantised_parts(stored, model, grain))
        products, state_bytes = work_of_a_token(model, parts)
        in_memory = math.floor(MOST_STATE_BYTES / state_bytes)
        in_time = math.floor(MOST_PRODUCTS / products)
        wanted = options.tokens or min(available, in_time, options.most or available)
        if options.tokens is not None and wanted > in_memory:
            if grain is grains[-1]:
                raise ConfigError(
                    f"measuring the quantiser's cost by {grain} on {wanted} tokens: their hidden states take "
                    f"{wanted * state_bytes / 1e9:.1f} GB, allowed {MOST_STATE_BYTES / 1e9:.1f}; ask for at most "
                    f"{in_memory} with --cost-tokens"
                )
            continue
        tokens = min(wanted, in_memory)
        if grain is grains[-1] or tokens >= min(EXPERT_TOKENS, available) or options.tokens is not None:
            break
    if tokens < min(LEAST_TOKENS, available):
        return (
            f"{LEAST_TOKENS} tokens by {grain} are {LEAST_TOKENS * products:.1e} products, more than the "
            f"{MOST_PRODUCTS:.1e} that are taken unasked; ask for them with --cost-tokens"
        )
    limits = {
        "all of the text": available,
        "enough for a failure": options.most or available,
        "the bound of products": in_time,
        "the bound of memory": in_memory,
    }
    reason = "asked for" if options.tokens is not None else min(limits, key=lambda name: limits[name])
    return CostPlan(
        grain=grain,
        tokens=tokens,
        parts=parts,
        choice=(
            f"{tokens} tokens ({reason}) by {grain}: {len(parts)} variants, {tokens * products:.1e} products, bound "
            f"{MOST_PRODUCTS:.1e}; {tokens * state_bytes / 1e6:.0f} MB of hidden states, bound "
            f"{MOST_STATE_BYTES / 1e6:.0f} MB"
        ),
    )


def quantised_parts(stored: ReadBack, model: Model, grain: Grain) -> tuple[Part, ...]:
    """The parts whose weights an engine stores as codes: embedding, of each layer attention and MLP (and its experts,
    as far as the engine has them), head."""
    network = model.family.network(model.weights.checkpoint.config)

    def coded(*modules: str) -> TensorSpec | None:
        names = (f"{module}.weight" for module in modules)
        return next((stored.table[name] for name in names if stored.recipe(name) is not None), None)

    found = [Part(role=Role.EMBEDDING)] if coded(network.embedding) else []
    for index, layer in enumerate(network.layers):
        if coded(*layer.attention.inputs, layer.attention.output):
            found.append(Part(role=Role.ATTENTION, layer=index))
        if mlp := coded(layer.mlp.first, layer.mlp.second):
            found.append(Part(role=mlp.role, layer=index))
            if grain is Grain.EXPERTS and mlp.stacks_experts:
                experts = sorted(stored.experts[mlp.name])
                found += [Part(role=mlp.role, layer=index, expert=expert) for expert in experts]
    return (*found, *([Part(role=Role.HEAD)] if coded(network.head) else []))


def work_of_a_token(model: Model, parts: Sequence[Part]) -> tuple[float, float]:
    """The products that one token takes in a model and a variant for each part, and the bytes of its hidden states."""
    network, table = model.family.network(model.weights.checkpoint.config), model.weights.table
    head = table[f"{network.head}.weight"]
    products = float(head.num_elements * (1 + len(parts)))
    for index, layer in enumerate(network.layers):
        names = (*layer.attention.inputs, layer.attention.output, *layer.mlp.matrices)
        live = 1 + sum(begin(part, len(network.layers)) <= index for part in parts)
        for spec in (table[f"{name}.weight"] for name in names):
            share = model.architecture.experts_per_token / len(spec.groups) if spec.stacks_experts else 1.0
            products += live * spec.num_elements * share
    return products, 3.0 * 4 * (1 + len(parts)) * head.shape[-1]


def spread_windows(token_ids: Sequence[int], tokens: int, longest: int) -> list[Sequence[int]]:
    """Windows of equal length, at most `longest`, spread evenly over a text; `tokens` in all, or a few less."""
    count = max(1, min(_NUM_WINDOWS, tokens // _LEAST_WINDOW), -(-tokens // longest))
    length = tokens // count
    last = len(token_ids) - length
    starts = [round(turn * last / max(1, count - 1)) for turn in range(count)]
    return [token_ids[start : start + length] for start in starts]


def measure_cost(
    stored: ReadBack,
    model: Model,
    windows: Sequence[Sequence[int]],
    plan: CostPlan,
    progress: Callable[[str], None] = lambda _: None,
    num_ids: int | None = None,
    dropped: Mapping[int, Sequence[int]] | None = None,
) -> Cost:
    """Compute the costs that were planned over windows of token ids, of the first `num_ids` of the vocabulary (None:
    all). `dropped`: layer -> experts that the model is taken without."""
    num_tokens = sum(map(len, windows))
    sums = StreamedDivergence(len(plan.parts), num_tokens)
    done = 0
    for logits in Variants(model, stored, plan.parts, dropped).run(windows, progress):
        own = logits if num_ids is None else logits[..., : max(0, num_ids - done)]
        done += logits.shape[-1]
        if own.shape[-1]:
            sums.add(own)
    costs = [
        PartCost(
            role="all" if part.role is None else str(part.role),
            layer=part.layer,
            expert=part.expert,
            mean_kl=float(kl.mean()),
            standard_error=float(kl.std() / math.sqrt(len(kl))),
            max_kl=float(kl.max()),
        )
        for part, kl in zip(plan.parts, np.maximum(sums.result(), 0.0), strict=True)
    ]
    return Cost(
        grain=plan.grain,
        num_tokens=num_tokens,
        num_windows=len(windows),
        choice=plan.choice,
        whole=costs[0],
        parts=tuple(costs[1:]),
    )
