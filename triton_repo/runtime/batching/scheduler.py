"""Decides which sequences begin, and what each of them computes in the next step.

Requests begin in the order of their arrival, as soon as a slot is free and the memory budget has room. Every sequence
whose prompt is computed takes one token in every step, and may take those of a draft (`drafts`). What is left of the
step goes to prompts: at most as many of their tokens as keep the step within a target time, so that no running answer
pauses for long beside a long prompt. Half of them goes to the prompt that began first, the other half to the prompt
that has got least, so that a short prompt does not wait for long ones and a long one is not held up by many short ones.
Where no answer runs, prompts take the whole width of a step, unless one of them has a short rest: that is computed at
once. There are no priorities.

A prompt that begins like what a slot holds takes that over (`memory.prefixes`). One that begins like the prompt which
began first waits for that one's tokens, since these get at least half of every step.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from triton_repo.runtime.batching.drafts.drafter import Drafter, Drafts
from triton_repo.runtime.batching.memory.prefixes import Prefix, longest, shared
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.sequence import Request, Sequence, Writer
from trt_build.ort.step_call import Row

FEWEST_TOKENS = 16  # of prompts in a step; fewer would read all weights for little
MOST_TOKENS = 128  # the width of a step: trt_build.ort.session.PREFILL_CHUNK_TOKENS
_FIRST_TOKENS = 32  # before a step was measured
_MOST_COPIED = MOST_TOKENS  # positions in a step beside running answers; 84 MB at the size of memory.prefixes
_MOST_ECHOED = 32  # positions of a prompt whose logits are in memory at a time
# The part of the target that is aimed at. Where memory becomes 2.3 times as slow from one step to the next, a step
# still takes less than twice the target longer than one without prompts.
_AIM = 0.85
_LEAST = 0.75  # of the same time: what prompts get at least, however long answers take
_FORGETTING = 1.01  # by which the shortest step of answers counts as longer with each step, so that it is a recent one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken on at a time."""

    slots: int = 8  # sequences in a step
    max_waiting: int = 64  # requests
    max_wait_s: float = 60.0  # before a request begins
    pause_target_s: float = 0.25  # of a step that prompts share with running answers


class Pace:
    """How many tokens of prompts a step beside running answers may take: learnt from how long steps took.

    Where answers alone take most of the target time, prompts get a part of it beside them: the pause is then longer,
    but else a prompt would wait for as long as the answers run.
    """

    def __init__(self, target_s: float) -> None:
        self._aim_s = _AIM * target_s
        self._answers_s = 0.0  # of a step without prompts
        self.num_tokens = _FIRST_TOKENS

    def learn(self, num_tokens: int, seconds: float) -> None:
        """A step with so many tokens of prompts took so long. A step with fewer tokens than allowed teaches only that
        they are too many."""
        if not num_tokens:
            self._answers_s = min(seconds, _FORGETTING * (self._answers_s or seconds))
            return
        aim_s = max(self._aim_s, self._answers_s + _LEAST * self._aim_s)
        fitting = int(num_tokens * min(2.0, aim_s / max(seconds, 1e-6)))
        if fitting < num_tokens:
            self.num_tokens = max(FEWEST_TOKENS, min(self.num_tokens, fitting))
        elif num_tokens >= self.num_tokens:
            self.num_tokens = min(MOST_TOKENS, max(fitting, num_tokens + 1))


@dataclass(kw_only=True)
class Share:
    """What a sequence computes in a step: `num_tokens` of its prompt, or with 0 its last token and those of a draft."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()  # tokens that may be the next ones
    num_rejected: int = 0  # of them, once the step was computed

    @property
    def row(self) -> Row:
        """The row of the step."""
        sequence = self.sequence
        if not self.num_tokens:
            tokens = [sequence.tokens[-1], *self.draft]
            return Row(slot=sequence.slot, token_ids=tokens, num_logits=len(tokens))
        wants_prompt, start = sequence.writer.wants_prompt, sequence.num_computed
        part = sequence.request.prompt_ids[start : start + self.num_tokens]
        if wants_prompt:
            part = part[:_MOST_ECHOED]
        ends = len(part) == sequence.num_left
        return Row(slot=sequence.slot, token_ids=part, num_logits=len(part) if wants_prompt else int(ends))


class Scheduler:
    """The waiting requests and the running sequences. Not for several threads at once. `drafter` is None where every
    answer takes one token a step."""

    def __init__(self, slots: Slots, limits: Limits, drafter: Drafter | None = None) -> None:
        self.slots, self.limits, self.drafter = slots, limits, drafter
        self.waiting: deque[Request[Any]] = deque()
        self.running: list[Sequence] = []  # in the order in which they began
        self.pace = Pace(limits.pause_target_s)

    def begin(self) -> list[Sequence]:
        """Give slots to the requests whose turn it is; those that await something are passed over. Returns their
        sequences."""
        begun: list[Sequence] = []
        while (request := next((each for each in self.waiting if each.is_ready), None)) is not None:
            if not self.slots.fits(len(request.writers), request.num_positions):
                break
            self.waiting.remove(request)
            for writer in request.writers:
                begun.append(self._begin(request, writer))
            request.num_running = len(request.writers)
        return begun

    def _begin(self, request: Request[Any], writer: Writer[Any]) -> Sequence:
        """Give a slot to one sequence of a request."""
        can_copy = self.slots.can_copy
        source = next((s for s in self.running if s.request is request), None) if can_copy else None
        prefix = self._prefix(request) if source is None else None
        if prefix is not None and prefix.in_place:
            slot = self.slots.take(request.num_positions, prefix.slot, prefix.length)
        else:
            if prefix is not None:
                self.slots.touch(prefix.slot)  # so that it is not the slot that is taken
            slot = self.slots.take(request.num_positions)
        sequence = Sequence(request=request, writer=writer, slot=slot, source=source)
        if prefix is not None and prefix.in_place:
            sequence.num_computed = sequence.num_reused = prefix.length
        elif prefix is not None:
            sequence.prefix_slot = prefix.slot
        self.running.append(sequence)
        return sequence

    def _prefix(self, request: Request[Any]) -> Prefix | None:
        """What a request may go on from. One that wants the logits of its whole prompt has it computed."""
        if not self.slots.keeps or request.wants_prompt:
            return None
        awaited = self._awaited()
        copied = [
            (other.slot, other.tokens if other is awaited else other.tokens[: other.num_computed])
            for other in self.running
            if self.slots.can_copy
        ]
        count, positions = len(request.writers), request.num_positions
        return longest(
            list(request.prompt_ids), self.slots.kept, copied, lambda slot: self.slots.can_spare(slot, count, positions)
        )

    def _awaited(self) -> Sequence | None:
        """The sequence whose prompt others wait for: the oldest one, unless it gets the logits of all of its positions,
        which takes many narrow steps."""
        oldest = next((sequence for sequence in self.running if sequence.num_left), None)
        return None if oldest is None or oldest.writer.wants_prompt else oldest

    def copy(self) -> None:
        """Have sequences take over what other slots hold of their prompts; beside running answers in parts."""
        room = _MOST_COPIED if any(sequence.has_chosen for sequence in self.running) else sys.maxsize
        for sequence in self.running:
            if sequence.prefix_slot is None:
                continue
            # The slot may have come to hold something else since the last step.
            owner = next((other for other in self.running if other.slot == sequence.prefix_slot), None)
            tokens = owner.tokens if owner else self.slots.kept.get(sequence.prefix_slot, [])
            alike = shared(sequence.tokens[:-1], tokens)
            there = min(alike, owner.num_computed) if owner else alike
            count = max(0, min(there - sequence.num_computed, room))
            if count:
                sequence.num_computed += count
                sequence.num_reused += count
                self.slots.copy(sequence.prefix_slot, sequence.slot, sequence.num_computed)
                room -= count
            if sequence.num_computed >= (alike if owner and owner is self._awaited() else there):
                sequence.prefix_slot = None

    def end(self, sequence: Sequence, *, keeps: bool) -> None:
        """Free the slot of a sequence. If it `keeps`, the slot goes on holding the tokens that it computed."""
        self.running.remove(sequence)
        self.slots.give(sequence.slot, sequence.tokens[: sequence.num_computed] if keeps else ())
        sequence.request.num_running -= 1

    def shares(self) -> list[Share]:
        """What the next step computes, in the order of slots. Empty if nothing runs."""
        decoding = [
            sequence for sequence in self.running if not (sequence.num_left or sequence.is_waiting or sequence.is_held)
        ]
        prompts = [sequence for sequence in self.running if sequence.num_left]
        drafts = self._drafts(decoding, beside_prompts=bool(prompts))
        drafted = sum(map(len, drafts.values()))
        room = max(FEWEST_TOKENS, min(MOST_TOKENS - len(decoding), self.pace.num_tokens) - drafted)
        counts = split(prompts, room) if decoding else self._split_alone(prompts)
        shares = [Share(sequence=sequence, num_tokens=0, draft=drafts.get(sequence, ())) for sequence in decoding]
        shares += [Share(sequence=prompt, num_tokens=count) for prompt, count in counts if count]
        return sorted(shares, key=lambda share: share.sequence.slot)

    def _drafts(self, decoding: Items[Sequence], *, beside_prompts: bool) -> Drafts:
        """The drafts of a step. Beside prompts they take a part of what the pace allows to those."""
        if self.drafter is None or not decoding:
            return {}
        room = MOST_TOKENS - len(decoding)
        if beside_prompts:
            room = min(room - FEWEST_TOKENS, (self.pace.num_tokens - FEWEST_TOKENS) // 8)
            return self.drafter.drafts_beside_prompts(decoding, room)
        return self.drafter.drafts(decoding, room, self.limits.pause_target_s)

    def learn(self, shares: Items[Share], prompt_tokens: int, drafted: int, seconds: float) -> None:
        """A step took so long, with so many tokens of prompts and of drafts."""
        if prompt_tokens or not drafted:
            self.pace.learn(prompt_tokens + drafted, seconds)
        if self.drafter is not None and not prompt_tokens:
            self.drafter.learn(len(shares), drafted, seconds)

    def _split_alone(self, prompts: Items[Sequence]) -> list[tuple[Sequence, int]]:
        """Share a step in which no answer runs among prompts. A short rest of a prompt is computed in one step, and the
        others go at the pace beside it: it is an answer's first token that waits for them."""
        shortest = min(prompts, key=lambda prompt: prompt.num_left, default=None)
        if shortest is None or shortest.num_left > MOST_TOKENS // 2:
            return split(prompts, MOST_TOKENS)
        others = [prompt for prompt in prompts if prompt is not shortest]
        room = min(self.pace.num_tokens, MOST_TOKENS - shortest.num_left)
        return [(shortest, shortest.num_left), *split(others, room)]


def split(prompts: Items[Sequence], room: int) -> list[tuple[Sequence, int]]:
    """Share `room` tokens among prompts, which are in the order in which they began."""
    if not prompts:
        return []
    oldest = prompts[0]
    # By what steps have computed of them. Stable: the earlier of equals first.
    by_need = sorted(prompts, key=lambda prompt: prompt.num_computed - prompt.num_reused)
    taken = dict.fromkeys(prompts, 0)
    taken[oldest] = min(oldest.num_left, room if by_need[0] is oldest else -(-room // 2))
    for prompt in (*by_need, oldest):
        taken[prompt] += min(prompt.num_left - taken[prompt], room - sum(taken.values()))
    return list(taken.items())
