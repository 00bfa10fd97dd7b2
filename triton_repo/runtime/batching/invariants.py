"""What always holds of an engine of sequences, between its steps and when the rows of a step are decided.

Tests call `broken_invariants` after every step of random histories.
"""

from __future__ import annotations

from collections import Counter

from triton_repo.runtime.batching.memory.slots import SlotCache
from triton_repo.runtime.batching.scheduler import Scheduler


def broken_invariants(scheduler: Scheduler, cache: SlotCache) -> list[str]:
    """The invariants that do not hold, as sentences. `cache` is the one whose slots the scheduler hands out."""
    slots, running = scheduler.slots, scheduler.running
    taken = [sequence.slot for sequence in running]
    num_running = Counter(sequence.request for sequence in running)
    reserved = sum(cache.bytes_of(sequence.request.num_positions) for sequence in running)
    facts = {
        "No two sequences share a slot": len(set(taken)) == len(taken),
        "Every slot belongs to a sequence that runs, or is free": sorted(taken) == sorted(slots.taken),
        "A free slot holds the tokens that are kept of it and no others": all(
            cache.lengths[slot] == len(slots.kept.get(slot, ())) for slot in {*range(cache.num_slots)} - {*taken}
        ),
        "What is kept is in free slots": not slots.kept.keys() & {*taken},
        "What is kept is counted as in memory": slots.held_bytes >= slots.kept_size[1] + reserved,
        "What is kept takes nothing from requests": slots.num_free == cache.num_slots - len(taken),
        "What runs has reserved what it may take": slots.reserved_bytes == reserved,
        "What runs may not take more than the budget": slots.reserved_bytes <= slots.budget,
        "Memory in use is within the budget": slots.held_bytes <= slots.budget,
        "A slot holds what its sequence has computed": all(
            cache.lengths[sequence.slot] == sequence.num_computed <= sequence.request.num_positions
            for sequence in running
        ),
        "The last token of a prompt is computed": all(
            sequence.num_reused < len(sequence.request.prompt_ids) for sequence in running
        ),
        "A prompt whose logits are wanted is computed": not any(
            sequence.num_reused or sequence.prefix_slot is not None
            for sequence in running
            if sequence.writer.wants_prompt
        ),
        "What is taken over is in another slot": all(sequence.prefix_slot != sequence.slot for sequence in running),
        "A request knows how many of its sequences run": all(
            request.num_running == count for request, count in num_running.items()
        ),
        "No request runs and waits": not num_running.keys() & {*scheduler.waiting},
        "No request waits twice": len({*scheduler.waiting}) == len(scheduler.waiting),
        "A prompt is computed by a sequence that runs": all(
            sequence.source is None or sequence.source in running for sequence in running
        ),
    }
    return [f"not so: {fact}" for fact, holds in facts.items() if not holds]
