"""Computes the gate matrix [E, H] of each layer from the experts' prompts, in the gate modes of mergekit-moe.

  hidden, hidden_last  the base model's hidden state that enters the layer, at the last token; mean over the prompts
  hidden_avg           the same, mean over the tokens of each prompt, then over the prompts
  cheap_embed          the sum of the embeddings of all tokens of the prompts; the same row in every layer
  random               independent normal values of variance 1
  uniform_random       uniform in +-1/sqrt(H), the initial values of a torch.nn.Linear

A prompt is tokenized with the start token before it, if the tokenizer has one. An expert's row is the vector of its
positive prompts minus the vector of its negative prompts, divided by its length, which counts as at least 1e-8.
cheap_embed divides each of the two vectors by its own length first. A prompt without tokens counts as zeros. The row of
a shared expert, whose product with a token's state is the logit of that expert's share, is computed as any other.
Source: mergekit/moe/router.py.

There are three differences from mergekit. Prompts run without padding, so that hidden_avg is the mean over a prompt's
own tokens and does not depend on the longest prompt. Arithmetic is in float32 and not in bfloat16. Random modes use
numpy's PCG64, so a seed gives other numbers than with torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.errors import MergeError
from export.families import Model
from export.merge.config import GateMode, MergeConfig
from export.reference.model import Reference, embedding_rows
from export.tokenizer.settings import Settings, read_settings

_SMALLEST_LENGTH = 1e-8
Vector = npt.NDArray[np.float32]
States = Sequence[npt.NDArray[np.float32]]
Prompts = list[list[int]]


def gate_matrices(config: MergeConfig, base: Model, *, seed: int) -> dict[int, npt.NDArray[np.float32]]:
    """Layer -> gate matrix, float32 [E, H]; with a shared expert [E+1, H], and its row is the last. Raises MergeError
    for prompts that the base cannot compute."""
    if config.gate_mode.reads_prompts:
        positives, negatives = prompts_of(config, base)
        if config.gate_mode is GateMode.CHEAP_EMBED:
            return _cheap_embed(base, positives, negatives)
        return _hidden(base, positives, negatives, average=config.gate_mode is GateMode.HIDDEN_AVG)
    rng = np.random.default_rng(seed)
    hidden, layers = base.architecture.hidden_size, range(base.architecture.num_layers)
    shape = (len(config.all_experts), hidden)
    if config.gate_mode is GateMode.RANDOM:
        return {layer: rng.standard_normal(shape, dtype=np.float32) for layer in layers}
    bound = 1.0 / np.sqrt(hidden)
    return {layer: rng.uniform(-bound, bound, shape).astype(np.float32) for layer in layers}


def prompts_of(config: MergeConfig, base: Model) -> tuple[list[Prompts], list[Prompts]]:
    """`tokenize_prompts` with the base's own tokenizer."""
    checkpoint = base.weights.checkpoint
    return tokenize_prompts(config, base, read_settings(checkpoint.folder, checkpoint.config, checkpoint.gguf_file))


def tokenize_prompts(config: MergeConfig, base: Model, settings: Settings) -> tuple[list[Prompts], list[Prompts]]:
    """Token ids of every expert's positive and negative prompts, each with the start token before it; those of a shared
    expert come last."""
    start = settings.facts.special_tokens.get("bos_token", "")  # empty if the tokenizer has no begin token

    def encode(prompts: Sequence[str], what: str) -> Prompts:
        encoded = [settings.tokenizer.encode(start + prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            _check_prompt(prompt, ids, what, base)
        return encoded

    sides: tuple[list[Prompts], list[Prompts]] = ([], [])
    for index, expert in enumerate(config.all_experts):
        sides[0].append(encode(expert.positive_prompts, f"positive prompt of {config.name_of(index)}"))
        sides[1].append(encode(expert.negative_prompts, f"negative prompt of {config.name_of(index)}"))
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
    """Gates from hidden states. The prompts of all experts run through a layer before the next layer is read, so that
    each layer is read once."""
    groups = [*positives, *negatives]
    bounds = np.cumsum([0, *(len(group) for group in groups)])
    gates = {}
    for layer, states in enumerate(Reference(base).layer_inputs([prompt for group in groups for prompt in group])):
        means = [_mean_state(states[first:last], average) for first, last in itertools.pairwise(bounds)]
        rows = [
            _unit(means[expert] - means[len(positives) + expert] if negatives[expert] else means[expert])
            for expert in range(len(positives))
        ]
        gates[layer] = np.stack(rows).astype(np.float32)
    return gates


def _mean_state(states: States, average: bool) -> npt.NDArray[np.float64]:
    """The mean over prompts, [H], of the last token's state or, with `average`, of the mean over the prompt's tokens.
    Without prompts it is [0], which broadcasts."""
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
