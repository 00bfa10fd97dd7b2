"""Computes all running sequences together, one step at a time.

    engine = SequenceEngine(session, Limits(slots=8))
    engine.submit(Request(names=frozenset({"7"}), prompt_ids=..., most_tokens=32, writers=[...], outlet=Outlet(...)))
    while engine.step():
        pass
    engine.stop("7")     # ends the requests with that name, whether they run or wait
    engine.drain()       # refuses waiting and further requests; running ones are finished

A step has three parts. What begins and what is computed is decided (`Scheduler`); the rows are computed; then tokens
are chosen and written, and sequences that ended give their slots back. A step that fails changes no sequence but those
in it, whose requests fail.

`submit`, `stop` and `drain` may be called by any thread while one thread calls `step`; no lock is held while the engine
computes or sends. The engine starts no thread itself and reads time from `clock` only, so that a simulated clock makes
it deterministic. `triton_repo.runtime.batching.runner` gives it threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.piece import TokenRouting
from triton_repo.errors import RequestError
from triton_repo.runtime.batching.accounts import Accounts
from triton_repo.runtime.batching.drafts.drafter import Drafter
from triton_repo.runtime.batching.ends import Ends, names_of
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.refusals import as_exception, too_large, too_late, unready
from triton_repo.runtime.batching.scheduler import Limits, Scheduler, Share
from triton_repo.runtime.batching.sequence import Request, Sequence
from triton_repo.runtime.responses import server_stopping
from triton_repo.runtime.sampling import Choice, choose_all, likeliest_of, log_probabilities_of
from trt_build.ort.routing import Routing
from trt_build.ort.step_call import Row

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
AWAITED_S = 20.0  # for what a request needs to begin, such as its compiled guide
MASKS_S = 0.002  # for which a step waits for the masks of guides; most are there before the step ends
HELD_S = 0.05  # the same where nothing else is computed, before requests are looked at again


class Computes(Protocol):
    """The parts of `trt_build.ort.session.Session` that are used here."""

    def step(self, cache: Any, rows: Items[Row], router_logits: Floats | None = None) -> Floats:  # noqa: ANN401 - its own
        """Append the tokens of every row to its slot; returns the logits that the rows ask for, [R, V].
        `router_logits` gets those of the routers."""


@dataclass(kw_only=True)
class _Due:
    """A sequence whose next tokens are chosen from the logits of a step."""

    sequence: Sequence
    logits: Floats  # [R, V]: of the first token that is chosen, and of those behind each token of the draft
    routing: Items[TokenRouting]  # of each of them
    share: Share | None = None  # None for one whose prompt was computed
    place: int = 0  # of the logits from which the next token is chosen


class SequenceEngine:
    """Waiting requests, running sequences, and the steps that compute them.

    `slots` hands out the slots of `cache`, which belongs to `session`. `num_tokens` is the size of the tokenizer.
    `routing` is the session's, if the experts that tokens choose are to be counted. `drafts`: whether steps may compute
    tokens of answers before they are chosen, for which the session must take rows of different lengths. `post` runs an
    action that sends something or asks Triton something; a runner has a thread for it.
    """

    def __init__(
        self,
        session: Computes,
        cache: Any,  # noqa: ANN401 - the session's own cache
        slots: Slots,
        *,
        num_tokens: int,
        routing: Routing | None = None,
        limits: Limits | None = None,
        drafts: bool = False,
        clock: Callable[[], float] = time.monotonic,
        post: Callable[[Callable[[], object]], object] = lambda action: action(),
    ) -> None:
        self.limits = limits or Limits()
        self.accounts = Accounts(routing, clock, post)
        self.stats = self.accounts.stats
        self._session, self._cache, self._num_tokens = session, cache, num_tokens
        self._scheduler = Scheduler(slots, self.limits, Drafter() if drafts else None)
        self._clock = clock
        self._lock = threading.Lock()  # guards the scheduler's lists
        self._draining = self._ending = False
        self._held: list[_Due] = []  # sequences whose guides have no mask yet
        self._ends = Ends(self._scheduler, self.accounts, self._lock, post)

    # What any thread may call.

    def submit(self, request: Request[Any]) -> None:
        """Queue a request. Raises RequestError if the queue is full, the server is about to end, or the request can
        never be computed here."""
        with self._lock:
            request.arrived_s = self._clock()
            if (error := too_large(request, self._scheduler.slots)) is not None:
                reason = "too_large"
            elif (refusal := self.refusal()) is not None:
                reason, error = refusal
            else:
                self._scheduler.waiting.append(request)
                return
        self.accounts.refused(request, reason, error)
        raise error

    def refusal(self) -> tuple[str, RequestError] | None:
        """Why any request is refused at the moment, and the error; None if there is room for one. Asked before a
        request is read, this makes refusing thousands cheap."""
        if self._draining:
            return "stopping", server_stopping()
        if (count := len(self._scheduler.waiting)) >= self.limits.max_waiting:
            return "queue_full", self._ends.overloaded(f"{count} requests wait already, the most that may")
        return None

    def stop(self, name: str) -> int:
        """End the requests with a name. Returns how many there were. A waiting request is answered at once, a running
        one ends before its next step. No request has the name ""."""
        with self._lock:
            running = dict.fromkeys(s.request for s in self._scheduler.running if name in s.request.names)
            waiting = self._take_waiting(lambda request: name in request.names)
        for request in running:
            request.stopped.set()
        for request in waiting:
            self._ends.withdraw(request, "stopped")
        return len(running) + len(waiting)

    def drain(self) -> None:
        """Refuse the requests that wait and all further ones."""
        with self._lock:
            self._draining = True
            refused = self._take_waiting(lambda _request: True)
        for request in refused:
            self._ends.refuse(request, server_stopping(), "stopping")

    def end_running(self) -> None:
        """Have what runs end before its next step."""
        with self._lock:
            self._ending = self._draining = True

    def end_all(self) -> None:
        """Cancel what runs and withdraw what waits. Only while no other thread is in `step`."""
        with self._lock:
            self._draining = True
            waiting = self._take_waiting(lambda _request: True)
        for request in waiting:
            self._ends.withdraw(request, "stopping")
        for sequence in list(self._scheduler.running):
            self._ends.cancel(sequence, "stopping")

    def fail_all(self, error: Exception) -> None:
        """End all requests with an error. Only while no other thread is in `step`."""
        with self._lock:
            waiting = self._take_waiting(lambda _request: True)
        for request in waiting:
            self._ends.fail_waiting(request, error)
        for request in dict.fromkeys(sequence.request for sequence in self._scheduler.running):
            self._ends.fail_running(request, error)

    def counts(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        with self._lock:
            return len({id(s.request) for s in self._scheduler.running}), len(self._scheduler.waiting)

    def has_work(self) -> bool:
        """Whether anything runs, or waits and may begin or has failed."""
        if self._scheduler.running:
            return True
        with self._lock:
            return any(request.is_ready or request.failure is not None for request in self._scheduler.waiting)

    def awaits(self) -> bool:
        """Whether a request awaits what it needs to begin."""
        with self._lock:
            return any(not request.is_ready for request in self._scheduler.waiting)

    @property
    def num_sequences(self) -> int:
        """How many sequences run, each in a slot."""
        return len(self._scheduler.running)

    @property
    def memory(self) -> tuple[int, int, int]:
        """Bytes of keys and values: reserved by what runs, held in memory at most, and the budget."""
        slots = self._scheduler.slots
        with self._lock:
            return slots.reserved_bytes, slots.held_bytes, slots.budget

    @property
    def kept(self) -> tuple[int, int]:
        """The tokens that free slots keep, and the bytes of their keys and values."""
        with self._lock:
            return self._scheduler.slots.kept_size

    def look(self) -> None:
        """Ask whether the clients of all requests have gone; the next step ends those that have."""
        with self._lock:
            requests = dict.fromkeys([*(s.request for s in self._scheduler.running), *self._scheduler.waiting])
        for request in requests:
            try:
                request.is_gone = request.is_gone or request.outlet.is_cancelled()
            except Exception:  # the request goes on
                logger.exception("cannot tell whether the client of the request %s has gone", names_of(request))

    # One step.

    def step(self) -> bool:
        """Compute one step. Returns whether there was anything to compute."""
        self._end_requests()
        self._resume()
        with self._lock:
            begun = self._scheduler.begin()
        self._scheduler.copy()
        now = self._clock()
        for request in dict.fromkeys(sequence.request for sequence in begun):
            request.begun_s = now
            self.stats.begun(now - request.arrived_s)
        shares = self._scheduler.shares()
        if not shares:
            return bool(self._held)
        rows = [share.row for share in shares]
        wanted = [share.sequence.request.wants_routing for share in shares]
        room = self.accounts.room_for_routers(rows, wanted=any(wanted))
        try:
            sampled = () if room is None else (room,)
            logits = self._session.step(self._cache, rows, *sampled)
            self._account(shares, rows, self._clock() - now)
            self._commit(shares, rows, logits, self.accounts.routed(room, rows, wanted))
            self.accounts.count_experts(room, rows, [share.num_rejected for share in shares])
        except Exception as error:  # whatever it is, the clients are told, and the engine goes on
            self._ends.fail_step([share.sequence for share in shares], error)
        return True

    def _end_requests(self) -> None:
        """End what was stopped, whose client has gone, whose deadline has passed, and what has waited too long."""
        now = self._clock()
        for sequence in list(self._scheduler.running):
            request = sequence.request
            if self._ending:
                self._ends.cancel(sequence, "stopping")
            elif request.stopped.is_set():
                self._ends.cancel(sequence, "stopped")
            elif request.is_gone:
                self._ends.cancel(sequence, "disconnected")
            elif _is_late(request, now):
                self._ends.cancel(sequence, "deadline")
        with self._lock:
            gone = self._take_waiting(lambda request: request.is_gone)
            late = self._take_waiting(lambda request: _is_late(request, now))
            failed = self._take_waiting(lambda request: request.failure is not None)
            slow = self._take_waiting(lambda request: not request.is_ready and now - request.arrived_s > AWAITED_S)
            overdue = self._take_waiting(lambda request: now - request.arrived_s > self.limits.max_wait_s)
        for request in gone:
            self._ends.withdraw(request, "disconnected")
        for request in late:
            self._ends.refuse(request, too_late(), "deadline")
        for request in failed:
            self._ends.refuse(request, as_exception(request.failure), "invalid")
        for request in slow:
            self._ends.refuse(request, unready(AWAITED_S), "waited_too_long")
        for request in overdue:
            problem = f"the request waited {self.limits.max_wait_s:g} s for its turn, the longest that requests wait"
            self._ends.refuse(request, self._ends.overloaded(problem), "waited_too_long")

    def _account(self, shares: Items[Share], rows: Items[Row], seconds: float) -> None:
        prompt_tokens = sum(len(row.token_ids) for share, row in zip(shares, rows, strict=True) if share.num_tokens)
        drafted = sum(len(share.draft) for share in shares)
        self.stats.stepped(seconds, prompt_tokens, drafted)
        self._scheduler.learn(shares, prompt_tokens, drafted, seconds)

    def _commit(self, shares: Items[Share], rows: Items[Row], logits: Floats, routing: Items[TokenRouting]) -> None:
        """Take the logits of a step, and what the routers chose for each: prompts move on, and every sequence that is
        due gets its next token, or several where they are those of its draft."""
        place, due = 0, []
        for share, row in zip(shares, rows, strict=True):
            sequence, own = share.sequence, logits[place : place + row.num_logits]
            routed = routing[place : place + row.num_logits]
            place += row.num_logits
            if not share.num_tokens:
                due.append(_Due(sequence=sequence, logits=own, routing=routed, share=share))
                continue
            sequence.num_computed += len(row.token_ids)
            followers = [other for other in self._scheduler.running if other.source is sequence]
            if sequence.writer.wants_prompt:
                self._echo(sequence, followers, row, own)
            if sequence.num_left or not sequence.request.num_running:
                continue
            for other in (sequence, *followers):
                if other is not sequence:
                    self._scheduler.slots.copy(sequence.slot, other.slot, sequence.num_computed)
                    other.source, other.num_computed = None, sequence.num_computed
                due.append(_Due(sequence=other, logits=own[-1:], routing=routed[-1:]))
        self._choose(due)

    def _choose(self, due: list[_Due]) -> None:
        """Choose the next tokens. A sequence whose guide has no mask yet is held, so that it holds up no other: it
        keeps its logits and computes nothing until the mask is there."""
        until_s = time.monotonic() + MASKS_S
        while due:
            ready = []
            for each in due:
                if each.sequence.writer.sampler.is_ready(until_s - time.monotonic()):
                    ready.append(each)
                else:
                    self._hold(each)
            samplers = [each.sequence.writer.sampler for each in ready]
            choices = choose_all([each.logits[each.place] for each in ready], samplers)
            due = [each for each, choice in zip(ready, choices, strict=True) if self._take(each, each.place, choice)]
            for each in due:
                each.place += 1

    def _hold(self, due: _Due) -> None:
        if due.share is not None:
            due.share.num_rejected = len(due.share.draft) - due.place
        due.logits = due.logits.copy()  # the session's own may be written over
        due.sequence.is_held = True
        self._held.append(due)

    def _resume(self) -> None:
        """Choose the next tokens of held sequences whose masks are there. Where nothing else is computed, the first of
        them is waited for."""
        if not self._held:
            return
        running = set(self._scheduler.running)
        held, self._held = [each for each in self._held if each.sequence in running], []
        is_alone = all(sequence.is_held for sequence in running)
        due = []
        for place, each in enumerate(held):
            if each.sequence.writer.sampler.is_ready(HELD_S if is_alone and not place else 0.0):
                each.sequence.is_held = False
                due.append(each)
            else:
                self._held.append(each)
        self._choose(due)

    def _take(self, due: _Due, place: int, choice: Choice | Exception) -> bool:
        """Take what was chosen from one of the logits of a sequence. Returns whether the next ones are of use: only
        where the sequence goes on with the next token of its draft."""
        sequence, running = due.sequence, self._scheduler.running
        if sequence not in running:
            return False  # another sequence of its request failed
        if isinstance(choice, Exception):
            self._ends.fail_running(sequence.request, choice)
            return False
        draft = due.share.draft if due.share else ()
        is_drafted = place < len(draft) and choice.token_id == draft[place]
        if due.share is not None:
            sequence.num_computed += 1
            due.share.num_rejected = len(draft) - place
        self.stats.accepted_tokens += is_drafted
        self._write(sequence, self.accounts.with_routing(choice, due.routing[place]))
        if sequence not in running:
            return False
        if not is_drafted and draft:
            self._scheduler.slots.shorten(sequence.slot, sequence.num_computed)
        return is_drafted

    def _write(self, sequence: Sequence, choice: Choice) -> None:
        now, request = self._clock(), sequence.request
        first = not sequence.has_chosen
        self.stats.wrote(now - (request.arrived_s if first else sequence.token_s), first=first)
        sequence.tokens.append(choice.token_id)
        sequence.token_s = now
        request.num_output += 1
        if request.first_token_s is None:
            request.first_token_s = now
            request.num_reused = sequence.num_reused
            self.stats.prompted(len(request.prompt_ids), sequence.num_reused)
        try:
            response, finish_reason = sequence.writer.write(choice)
        except Exception as error:  # whatever it is, the client is told
            self._ends.fail_running(request, error)
            return
        if finish_reason:
            self._ends.finish(sequence, finish_reason, now)
        if response is not None:
            self._ends.send(request, response, is_last=bool(finish_reason) and not request.num_running)

    def _echo(self, sequence: Sequence, followers: Items[Sequence], row: Row, logits: Floats) -> None:
        """Give the writers the log-probabilities of the prompt's tokens that follow those of a row, and of the
        likeliest at their places."""
        prompt, done = sequence.request.prompt_ids, sequence.num_computed
        targets = prompt[done - len(row.token_ids) + 1 : done + 1]
        try:
            scored = logits[: len(targets)]
            log_probs = log_probabilities_of(scored, targets, self._num_tokens)
            tops = likeliest_of(scored, self._num_tokens, sequence.writer.num_prompt_tops)
            for other in (sequence, *followers):
                other.writer.take_prompt(log_probs, tops)
        except Exception as error:  # whatever it is, the client is told
            self._ends.fail_running(sequence.request, error)

    # Waiting requests.

    def _take_waiting(self, chosen: Callable[[Request[Any]], bool]) -> list[Request[Any]]:
        """Remove waiting requests. The caller holds the lock."""
        waiting = self._scheduler.waiting
        taken = [request for request in waiting if chosen(request)]
        for request in taken:
            waiting.remove(request)
        return taken


def _is_late(request: Request[Any], now: float) -> bool:
    return request.deadline_s is not None and now >= request.deadline_s
