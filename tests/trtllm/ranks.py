"""Rank files into the stand-in: every rank's model, run together on one sequence.

    ranks = Ranks(folder)
    ranks.logits([1, 2, 3])            # float32 [T, V], no cache
    ranks.greedy([1, 2, 3], 16)        # token ids, through the key/value cache

tensorrt_llm is imported where it is used: only tests that ask for it have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.checkpoint.folder import open_checkpoint
from export.families import Model, read_model
from export.trtllm.parallel import Parallelism

FloatArray = npt.NDArray[np.float32]


def understood(folder: Path) -> Model:
    """A checkpoint folder as the pipeline reads it."""
    return read_model(open_checkpoint(folder))


def shares(moe_tp: int, moe_ep: int) -> Parallelism:
    """Ranks that cut each expert in `moe_tp` slices and the experts in `moe_ep` blocks."""
    return Parallelism(tp_size=moe_tp * moe_ep, moe_tp_size=moe_tp, moe_ep_size=moe_ep)


class Ranks:
    """All ranks of the checkpoint in `folder`, loaded by the class that MODEL_MAP has for its architecture."""

    def __init__(self, folder: Path) -> None:
        from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
        from tensorrt_llm.world import World

        config = PretrainedConfig.from_checkpoint(str(folder))
        self.vocab_size = config.vocab_size
        self.world, cls = World(config.mapping.world_size), MODEL_MAP[config.architecture]
        self.models = [cls.from_checkpoint(str(folder), rank) for rank in range(self.world.size)]

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """float32 [T, V] of the whole sequence at once, without what fills the vocabulary up; the ranks must agree."""
        found = [logits.numpy() for logits in self._run(lambda rank, step: step(token_ids))]
        assert all(np.array_equal(logits, found[0]) for logits in found)
        return found[0][:, : self.vocab_size]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], FloatArray]:
        """The likeliest tokens after a prompt, and the logits [num_tokens, V] that chose them: a prefill, then steps
        of one token over the cache."""
        from tensorrt_llm.runtime.executor import likeliest

        def run(rank: int, step: Callable[[Sequence[int]], torch.Tensor]) -> tuple[list[int], torch.Tensor]:
            chosen: list[int] = []
            logits = [step(prompt)[-1:]]
            while True:
                chosen.append(likeliest(logits[-1], self.vocab_size))
                if len(chosen) == num_tokens:
                    return chosen, torch.cat(logits)
                logits.append(step(chosen[-1:]))

        tokens, logits = self._run(run)[0]
        return tokens, logits[:, : self.vocab_size].numpy()

    def _run(self, function: Callable[[int, Callable[[Sequence[int]], Any]], Any]) -> list[Any]:
        from tensorrt_llm.runtime.executor import CachedSequence

        return self.world.run(lambda rank: function(rank, CachedSequence(self.models[rank]).step))


def largest_difference(found: FloatArray, expected: FloatArray) -> float:
    """The largest absolute difference of logits."""
    return float(np.abs(found - expected).max())


def relative_difference(found: FloatArray, expected: FloatArray) -> float:
    """The same over the largest logit."""
    return largest_difference(found, expected) / float(np.abs(expected).max())
