"""Prompts in, one gate matrix [E, H] a layer out, with the meaning that mergekit-moe gives each gate mode.

  hidden, hidden_last  the base model's hidden state entering the layer, at the last token, mean over the prompts
  hidden_avg           the same, mean over each prompt's tokens, then over the prompts
  cheap_embed          the sum of the prompts' token embeddings, the same row in every layer
  random               independent normal values of variance 1
  uniform_random       uniform in +-1/sqrt(H), the initial values of a torch.nn.Linear

A prompt is tokenized with the start token before it, where the tokenizer has one. Positives minus negatives, then
the row is divided by its length, at least 1e-8 (cheap_embed divides both sums by theirs first). A prompt without a
token counts as zeros. Source: mergekit/moe/router.py. It differs from it in two ways: prompts run without padding, so
hidden_avg is the mean over a prompt's own tokens and does not hang on the longest prompt beside it; and arithmetic is
float32, not bfloat16. Random modes draw from numpy's PCG64, so a seed gives other numbers than torch would.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.errors import MergeError
from export.families import Model
from export.merge.config import GateMode, MergeConfig
from export.merge.hidden_states import States, embedding_rows, layer_inputs
from export.tokenizer.settings import Settings, read_settings

_SMALLEST_LENGTH = 1e-8
Vector = npt.NDArray[np.float32]
Prompts = list[list[int]]


def gate_matrices(config: MergeConfig, base: Model, *, seed: int) -> dict[int, npt.NDArray[np.float32]]:
    """Layer -> gate, float32 [E, H]. Raises MergeError for prompts that the base cannot take."""
    if config.gate_mode.reads_prompts:
        checkpoint = base.weights.checkpoint
        positives, negatives = tokenize_prompts(config, base, read_settings(checkpoint.folder, checkpoint.config))
        if config.gate_mode is GateMode.CHEAP_EMBED:
            return _cheap_embed(base, positives, negatives)
        return _hidden(base, positives, negatives, average=config.gate_mode is GateMode.HIDDEN_AVG)
    rng = np.random.default_rng(seed)
    hidden, layers = base.architecture.hidden_size, range(base.architecture.num_layers)
    shape = (len(config.experts), hidden)
    if config.gate_mode is GateMode.RANDOM:
        return {layer: rng.standard_normal(shape, dtype=np.float32) for layer in layers}
    bound = 1.0 / np.sqrt(hidden)
    return {layer: rng.uniform(-bound, bound, shape).astype(np.float32) for layer in layers}


def tokenize_prompts(config: MergeConfig, base: Model, settings: Settings) -> tuple[list[Prompts], list[Prompts]]:
    """Token ids of every expert's positive and negative prompts, each with the start token before it."""
    start = settings.facts.special_tokens.get("bos_token", "")  # a tokenizer without a begin token puts nothing there

    def encode(prompts: Sequence[str], what: str) -> Prompts:
        encoded = [settings.tokenizer.encode(start + prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            _check_prompt(prompt, ids, what, base)
        return encoded

    sides: tuple[list[Prompts], list[Prompts]] = ([], [])
    for index, expert in enumerate(config.experts):
        sides[0].append(encode(expert.positive_prompts, f"positive prompt of expert {index}"))
        sides[1].append(encode(expert.negative_prompts, f"negative prompt of expert {index}"))
    return sides


def _check_prompt(prompt: str, ids: Sequence[int], what: str, base: Model) -> None:
    text = prompt if len(prompt) <= 40 else prompt[:37] + "..."
    most, vocab = base.architecture.max_positions, base.architecture.vocab_size
    if len(ids) > most:
        raise MergeError(
            f"making gates: {what} ({text!r}) has {len(ids)} tokens, the base model sees at most {most}; shorten it"
        )
    if ids and max(ids) >= vocab:
        raise MergeError(
            f"making gates: {what} ({text!r}) holds token {max(ids)}, the base's embedding has {vocab} rows; "
            "the tokenizer is from another model: put the base's own beside its weights"
        )


def _cheap_embed(base: Model, positives: list[Prompts], negatives: list[Prompts]) -> dict[int, Vector]:
    def direction(prompts: Prompts) -> npt.NDArray[np.float64]:
        ids = [token for prompt in prompts for token in prompt]
        return _unit(embedding_rows(base, ids).sum(axis=0, dtype=np.float64))

    rows = [
        _unit(direction(positive) - direction(negative) if negative else direction(positive))
        for positive, negative in zip(positives, negatives, strict=True)
    ]
    gate = np.stack(rows).astype(np.float32)
    return dict.fromkeys(range(base.architecture.num_layers), gate)


def _hidden(base: Model, positives: list[Prompts], negatives: list[Prompts], *, average: bool) -> dict[int, Vector]:
    """All prompts of all experts go through a layer together, so each layer is read once."""
    groups = [*positives, *negatives]
    bounds = np.cumsum([0, *(len(group) for group in groups)])
    gates = {}
    for layer, states in enumerate(layer_inputs(base, [prompt for group in groups for prompt in group])):
        means = [_mean_state(states[first:last], average) for first, last in itertools.pairwise(bounds)]
        rows = [
            _unit(means[expert] - means[len(positives) + expert] if negatives[expert] else means[expert])
            for expert in range(len(positives))
        ]
        gates[layer] = np.stack(rows).astype(np.float32)
    return gates


def _mean_state(states: States, average: bool) -> npt.NDArray[np.float64]:
    """Mean over prompts of the last token's state, or of the mean over tokens; [H]. No prompt: 0."""
    if not states:
        return np.zeros(1)
    width = states[0].shape[1]
    vectors = [
        np.zeros(width) if not len(state) else state.mean(axis=0, dtype=np.float64) if average else state[-1]
        for state in states
    ]
    return np.mean(np.asarray(vectors, dtype=np.float64), axis=0)


def _unit(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), _SMALLEST_LENGTH))
