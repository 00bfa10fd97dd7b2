"""Samplers without an engine, for tests of what they choose."""

from __future__ import annotations

from triton_repo.runtime.options import GenerationOptions, GenerationPlan
from triton_repo.runtime.sampling import Sampler


def sampler(
    num_tokens: int, prompt_ids=(0,), end_ids=(), *, refuses=None, banned=None, sequence_index=0, guide=None, **fields
) -> Sampler:
    options = GenerationOptions(**{"prompt": "-", "max_tokens": 1, **fields})
    plan = GenerationPlan(options=options, prompt_ids=prompt_ids, end_ids=end_ids, most_tokens=1)
    return Sampler(plan, num_tokens, refuses=refuses, banned=banned, sequence_index=sequence_index, guide=guide)
