"""Random histories of an engine of sequences, in simulated time, and what must hold in each of them.

    for seed in range(10_000):
        run_history(seed)        # raises AssertionError, which names the seed

A history draws an engine (slots, memory budget, costs, a queue) and clients that come, go, are stopped, and fail in all
the ways that there are; requests come and go in the middle of steps too, as from other threads. Small seeds give small
histories. ci/batching_histories.py runs as many as asked for.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from batching_simulation import Simulation
from batching_standins import (
    VOCABULARY,
    BrokenInvariantError,
    Client,
    Cost,
    Wish,
    alone,
    prompt_log_probs,
    require,
)

from triton_repo.errors import RequestError
from triton_repo.runtime.batching.invariants import broken_invariants
from triton_repo.runtime.batching.scheduler import FEWEST_TOKENS, Limits
from trt_build.ort.step_call import Row

_MOST_STEPS = 20_000
_GROUPS = ("red", "blue", "")


def run_history(seed: int) -> History:
    """Run one history to its end. Raises AssertionError for an invariant that was broken."""
    history = History(seed)
    try:
        history.run()
    except (BrokenInvariantError, Exception) as error:
        raise AssertionError(
            f"history {seed}, after {history.clock.now:.3f} s: {error or type(error).__name__}"
        ) from error
    return history


class History:
    """One engine and its clients."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        size = min(1.0, (seed % 1000 + 50) / 500)  # of the history
        self._is_calm = rng.random() < 0.3  # no client goes before its answer, and nothing fails
        self.text = (seed, 0 if self._is_calm else rng.choice((0, 0, 300)), rng.choice((1, 5, 20)))
        self.has_drafts = rng.random() < 0.7
        self.cost = Cost(
            step_s=rng.choice((0.003, 0.02, 0.07, 0.3)),
            prompt_token_s=rng.choice((0.0002, 0.001, 0.0126, 0.03)),
            row_s=rng.choice((0.0, 0.001, 0.02)),
            slowdown=rng.choice((1.0, 1.0, 2.3)),
            period=rng.choice((2, 7, 20)),
        )
        num_slots = rng.randint(1, 8)
        self.limits = Limits(
            slots=num_slots,
            max_waiting=rng.choice((1, 10, 64, 64)),
            max_wait_s=rng.choice((1.0, 10.0, 60.0)),
            pause_target_s=rng.choice((0.05, 0.25, 1.0)),
        )
        self._posts_later = rng.random() < 0.5
        self._posted: list[Callable[[], object]] = []
        self.simulation = Simulation(
            self.cost, slots=num_slots, positions=rng.randint(30, 30 + int(600 * size)), limits=self.limits,
            budget=rng.uniform(0.3, 1.0) * rng.choice((1.0, 1.0, min(1.0, 1.5 / num_slots))),
            salt=self.text[0], broken_one_in=self.text[1], surprise_one_in=self.text[2], drafts=self.has_drafts,
            can_copy=rng.random() < 0.8, keeps=rng.random() < 0.8,
            post=self._posted.append if self._posts_later else lambda action: action(),
        )  # fmt: skip
        self.simulation.after_event = lambda: self._act() if rng.random() < 0.5 else None
        self.simulation.session.before, self.simulation.session.fails = self._before_step, self._fails
        self.clock, self.cache = self.simulation.clock, self.simulation.cache
        self.engine, self.scheduler = self.simulation.engine, self.simulation.scheduler
        self._failing_steps = 0.0 if self._is_calm else rng.choice((0.0, 0.0, 0.01, 0.1))
        self.counts: Counter[str] = Counter()
        self._places = itertools.count()
        self.clients: list[Client] = []
        self._by_request: dict[object, Client] = {}
        self._begun: set[Client] = set()
        self._shares = rng.choice((0.0, 0.5, 0.9))  # of the prompts that begin like another one
        self._draining = self._is_ending = False
        # Client, answer, tokens before the step, and the draft of the next ones.
        self._due: list[tuple[Client, int, int, bytes]] = []
        self._plan_events(size)

    # What happens when.

    def _plan_events(self, size: float) -> None:
        rng = self.rng
        number, now = 1 + int(rng.uniform(0, 30) * size), 0.0
        pace = rng.choice((0.0, 0.1, 1.0)) * (self.cost.step_s + 20 * self.cost.prompt_token_s)
        for each in range(number):
            now += rng.expovariate(1 / pace) if pace else 0.0
            client = Client(self._wish(each, now), self.clock, self.simulation.log)
            self.clients.append(client)
            self._by_request[client.request] = client
            self.simulation.at(now, lambda client=client: self._submit(client))
            if client.wish.leaves_s is not None:
                self.simulation.at(client.wish.leaves_s, lambda client=client: setattr(client, "has_left", True))
            if client.wish.stop_s is not None:
                name = rng.choice((str(each), *client.wish.names))
                self.simulation.at(client.wish.stop_s, lambda name=name: self._stop(name))
        if not self._is_calm and rng.random() < 0.2:
            drained_s = rng.uniform(0, now + 1)
            self.simulation.at(drained_s, self._drain)
            if rng.random() < 0.5:
                self.simulation.at(drained_s + rng.uniform(0, 2), self._end_running)

    def _wish(self, number: int, now: float) -> Wish:
        rng = self.rng
        num_slots = self.cache.num_slots
        count = rng.choice((1, 1, 1, 1, 1, 2, 3, rng.randint(1, num_slots + 1)))
        count = min(count, num_slots + (rng.random() < 0.1))
        room = self.scheduler.slots.most_positions(count) if rng.random() < 0.9 else self.cache.positions
        room = max(2, room)
        short = rng.randint(1, 40 if self._shares else 8)
        size = rng.choice((1, short, min(room, rng.randint(17, 60)), rng.randint(1, room)))
        most_tokens = rng.choice((1, rng.randint(1, 12), rng.randint(1, room)))
        faulty = self._draws(0.25)
        soon = lambda: now + rng.choice((0.0, rng.uniform(0, 1), rng.uniform(0, 20)))  # noqa: E731

        def now_and_then(value: object, share: float = 0.2) -> object:
            return value if faulty and rng.random() < share else None

        return Wish(
            number=number,
            prompt=self._prompt(size),
            most_tokens=max(1, min(most_tokens, room + 1 - size)),
            count=count,
            temperature=rng.choice((0.0, 0.8)),
            echo=rng.random() < 0.15,
            every=rng.choice((1, 1, 3, 1000)),
            names=tuple({rng.choice(_GROUPS)} - {""}),
            arrives_s=now,
            patience_s=rng.choice((0.0, rng.uniform(0, 3), rng.uniform(0, 60))) if self._draws(0.2) else None,
            leaves_s=soon() if self._draws(0.15) else None,
            stop_s=soon() if self._draws(0.15) else None,
            sampling_fails=now_and_then(rng.randint(1, 5)),
            writing_fails=now_and_then(rng.randint(1, 5)),
            prompt_fails=bool(now_and_then(True)),
            cancel_fails=bool(now_and_then(True, 0.3)),
            sending_fails=now_and_then(rng.randint(1, 4)),
            telling_fails=bool(now_and_then(True, 0.3)),
            looking_fails=bool(now_and_then(True)),
        )

    def _prompt(self, size: int) -> bytes:
        """Often a beginning of another client's prompt, with some of its answer, before tokens of its own."""
        rng, begin = self.rng, b""
        if self.clients and rng.random() < self._shares:
            other = rng.choice(self.clients[-8:]).wish
            text = other.prompt + alone(other, *self.text)[0].tokens
            begin = text[: rng.choice((size, size, rng.randint(0, size)))]
        return begin + bytes(rng.randrange(VOCABULARY) for _ in range(size - len(begin)))

    def _draws(self, share: float) -> bool:
        """Whether one of the things happens that do not happen in a calm history."""
        return not self._is_calm and self.rng.random() < share

    def _act(self) -> None:
        """What the sending thread does."""
        actions, self._posted[:] = list(self._posted), []
        for action in actions:
            action()

    def _submit(self, client: Client) -> None:
        num_waiting, place = len(self.scheduler.waiting), next(self._places)
        if not client.submit(self.engine):
            client.reasons.add("refused")
            self.counts["refused"] += 1
            is_full = self._draining or num_waiting >= self.limits.max_waiting
            require(client.error.kind == "INVALID_ARG" or is_full, "refused without reason", client.error)
            return
        require(not self._draining and num_waiting < self.limits.max_waiting, "taken by a full or stopping engine")
        client.place = place
        self.counts["taken"] += 1

    def _stop(self, name: str) -> None:
        named = {c for c in self.clients if name in c.request.names and c.request in self._inside()}
        for client in named:
            client.reasons.add("stopped")
        found = self.engine.stop(name)
        require(found == len(named), "stopped another number of requests than have the name", name, found, len(named))

    def _drain(self) -> None:
        self._draining = True
        for request in self.scheduler.waiting:
            self._by_request[request].reasons.add("refused")
        self.engine.drain()
        require(not self.scheduler.waiting, "requests wait in a draining engine")

    def _end_running(self) -> None:
        self._is_ending = True
        for request in self._inside():
            self._by_request[request].reasons.add("stopped")
        self.engine.end_running()

    def _inside(self) -> set[object]:
        return {sequence.request for sequence in self.scheduler.running} | set(self.scheduler.waiting)

    def _fails(self, rows: Sequence[Row]) -> int | None:
        if self.rng.random() >= self._failing_steps:
            return None
        slots = {row.slot for row in rows}
        for sequence in self.scheduler.running:
            if sequence.slot in slots:
                self._by_request[sequence.request].reasons.add("step")
        self.counts["failed steps"] += 1
        return self.rng.randrange(len(rows))

    # The run.

    def run(self) -> None:
        ends_early = self._draws(0.1)
        for _ in range(_MOST_STEPS):
            computed = self.engine.step()
            self._check_between_steps()
            self._act()
            if self.rng.random() < 0.8:
                self.engine.look()
            if ends_early and self.rng.random() < 0.02:
                self._end_all()
            if not computed:
                require(not self.scheduler.running, "running sequences are not computed")
                if not self.simulation.wait():
                    break
        else:
            raise BrokenInvariantError("the history does not end")
        self._act()
        self._check_at_end()

    def _end_all(self) -> None:
        self._draining = True
        for request in self._inside():
            self._by_request[request].reasons.add("stopped")
        self.engine.end_all()
        self._act()
        require(not self._inside(), "requests are left in an engine that was ended")

    # What must hold.

    def _before_step(self, rows: Sequence[Row]) -> None:
        """When the rows of a step are decided."""
        require(not self._is_ending, "what runs goes on in an engine that ends it")
        self._check_state()
        self._check_ends()
        self._check_order()
        self._check_rows(rows)

    def _check_state(self) -> None:
        problems = broken_invariants(self.scheduler, self.cache)
        require(not problems, "; ".join(problems))
        slots = self.scheduler.slots
        require(self.cache.touched_bytes <= slots.held_bytes, "more memory is in use than is counted")
        held = {sequence.slot: sequence.tokens[: sequence.num_computed] for sequence in self.scheduler.running}
        for slot, tokens in (slots.kept | held).items():
            require(list(self.cache.held[slot]) == tokens, "a slot holds other tokens than are known of it", slot)

    def _check_ends(self) -> None:
        """What ended was freed before the step."""
        now = self.clock.now
        for request in self._inside():
            client = self._by_request[request]
            require(not client.was_seen_leaving, "a client that has gone keeps its request", client.wish)
            require(not request.stopped.is_set(), "a stopped request goes on", client.wish)
            require(request.deadline_s is None or now < request.deadline_s, "a request is late", client.wish)
            require("sending" not in client.reasons or self._posts_later, "a client that cannot be sent to is kept")
        for request in self.scheduler.waiting:
            require(now - request.arrived_s <= self.limits.max_wait_s, "a request waits too long")

    def _check_order(self) -> None:
        """Requests begin in the order of arrival, as soon as there is room."""
        waiting = [self._by_request[request].place for request in self.scheduler.waiting]
        begun = [self._by_request[sequence.request] for sequence in self.scheduler.running]
        first_waiting = min(waiting, default=1 << 60)
        for client in dict.fromkeys(begun):
            if client not in self._begun:
                self._begun.add(client)
                require(client.place < first_waiting, "a request overtook another one", client.wish)
        require([c.place for c in begun] == sorted(c.place for c in begun), "begun in another order than arrived")
        if self.scheduler.waiting:
            head = self.scheduler.waiting[0]
            # What ended sequences left in their slots takes no room from it.
            reserved = sum(self.cache.bytes_of(sequence.request.num_positions) for sequence in self.scheduler.running)
            needed = len(head.writers) * self.cache.bytes_of(head.num_positions)
            has_slots = len(self.scheduler.running) + len(head.writers) <= self.cache.num_slots
            fits = has_slots and reserved + needed <= self.scheduler.slots.budget
            require(not fits, "a request waits though there is room")

    def _check_rows(self, rows: Sequence[Row]) -> None:
        by_slot = {row.slot: row for row in rows}
        room = self.scheduler.pace.num_tokens
        prompts, answering = [], []
        self._due = []
        for sequence in self.scheduler.running:
            client, row = self._by_request[sequence.request], by_slot.get(sequence.slot)
            if sequence.is_waiting:
                require(row is None, "a sequence whose prompt another one computes has a row")
            elif sequence.num_left:
                prompts.append((sequence, row))
            else:
                index = client.writers.index(sequence.writer)
                tokens = client.writers[index].tokens
                require(row is not None and list(row.token_ids[:1]) == list(tokens[-1:]), "not the last token", row)
                require(row.num_logits == len(row.token_ids), "logits of a draft are not asked for", row)
                last = sequence.num_computed + len(row.token_ids)
                require(last <= sequence.request.num_positions, "a draft goes past what its sequence reserved", row)
                answering.append(sequence)
                self._due.append((client, index, len(tokens), bytes(row.token_ids[1:])))
        computed = sum(len(row.token_ids) for _, row in prompts if row)
        for sequence, row in prompts:
            start = sequence.num_computed
            if row:
                stop = start + len(row.token_ids)
                require(tuple(row.token_ids) == sequence.request.prompt_ids[start:stop], "other tokens of a prompt")
        drafted = sum(len(draft) for *_, draft in self._due)
        require(self.has_drafts or not drafted, "drafts, though they are off")
        if prompts and answering:
            require(computed + drafted <= room, "more tokens beside answers than the pace allows", computed, drafted)
        if prompts:
            require(prompts[0][1] is not None, "the oldest prompt does not move on")
            left = sum(sequence.num_left for sequence, _ in prompts)
            require(computed >= min(FEWEST_TOKENS, left), "prompts get less than they may", computed, left)
        require(len(by_slot) == len(answering) + sum(row is not None for _, row in prompts), "a row of no sequence")

    def _check_between_steps(self) -> None:
        self._check_state()
        for client, index, before, draft in self._due:
            written = client.writers[index].tokens[before:]
            runs = any(sequence.writer is client.writers[index] for sequence in self.scheduler.running)
            require(bool(written) or client.reasons or not runs, "no token in a step", client.wish)
            accepted = written[:-1]
            require(draft.startswith(bytes(accepted)), "went on behind another token than the draft's", draft, written)
            rest = draft[len(accepted) :]
            require(not runs or rest[:1] != written[-1:], "a token of a draft is thrown away", draft, written)
        self._due = []
        for client in self.clients:
            is_inside = client.request in self._inside()
            require(not is_inside or not client.is_over or bool(client.reasons), "runs on after its end", client.wish)

    def _check_at_end(self) -> None:
        require(not self._inside(), "requests are left")
        slots = self.scheduler.slots
        require(slots.num_free == self.cache.num_slots and slots.reserved_bytes == 0, "slots are lost")
        for client in self.clients:
            self._check_client(client)
        stats, taken = self.engine.stats, self.counts["taken"]
        counted = stats.ends.total() + stats.refusals.total()
        require(counted == taken + self.counts["refused"], "ends and refusals are miscounted", stats, taken)
        written = sum(len(writer.tokens) for client in self.clients for writer in client.writers)
        require(stats.output_tokens == written, "tokens are miscounted", stats.output_tokens, written)
        self.counts["prefix hits"] += stats.prefix_hits
        self.counts["tokens reused"] += stats.prefix_reused_tokens
        self.counts["tokens drafted"] += stats.drafted_tokens
        self.counts["tokens accepted"] += stats.accepted_tokens
        require(stats.accepted_tokens <= min(written, stats.drafted_tokens), "drafts are miscounted", stats)

    def _check_client(self, client: Client) -> None:
        """A client got all of its answers or one error, and every token is the one that it would have got alone."""
        wish = client.wish
        require(client.is_over, "a request has no end", wish, client.reasons)
        expected = alone(wish, *self.text)
        ends = [client.end_of(index) for index in range(wish.count)]
        for index, answer in enumerate(expected):
            got = client.tokens_of(index)
            require(answer.tokens.startswith(got), "another text than alone", wish, got, answer.tokens)
            if ends[index] in ("stop", "length"):
                require((got, ends[index]) == (answer.tokens, answer.end), "another end than alone", wish, ends)
        self._check_echo(client)
        fails_alone = any(answer.end == "error" for answer in expected)
        if client.reasons or client.was_seen_leaving or wish.patience_s is not None or client.place is None:
            self.counts["ended early"] += 1
        elif isinstance(client.error, RequestError) and client.error.kind == "UNAVAILABLE":
            require("waited" in str(client.error), "unavailable without reason", wish, client.error)
            self.counts["waited too long"] += 1
        elif fails_alone:
            require(client.error is not None, "a request that must fail did not", wish)
            self.counts["failed alone"] += 1
        else:
            require(client.error is None, "a request failed for another one", wish, client.error)
            require(None not in ends and "cancelled" not in ends, "a request was not answered", wish, ends)
            self.counts["answered"] += 1

    def _check_echo(self, client: Client) -> None:
        wish = client.wish
        for _, part in client.parts:
            if wish.echo and part.tokens:
                reference = prompt_log_probs(wish, self.text[0], self.text[2])
                found = np.array(part.prompt_log_probs)
                require(found.shape == (len(reference),), "another number of the prompt's log-probabilities", wish)
                require(bool(np.allclose(found, reference, rtol=0, atol=1e-5)), "other log-probabilities", wish)
