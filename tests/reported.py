"""An engine of sequences in simulated time, whose accounts tests read, and stand-ins for Triton's metrics."""

from __future__ import annotations

from types import SimpleNamespace

from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.scheduler import Limits
from triton_repo.runtime.options import GenerationOptions, plan_generation
from triton_repo.runtime.single.generation import text_request

STEP_S = 0.5
PROMPT = "def main"


class Timed:
    """An engine on a scripted session: a step takes STEP_S of a clock that nothing else moves. A step fails after
    `broken` is set."""

    def __init__(self, session, tokenizer, routing=None, **limits) -> None:
        self.now, self.ended, self.broken = 0.0, [], False
        self._session, self._tokenizer = session, tokenizer
        limits = Limits(**{"slots": 1, "max_waiting": 2, "max_wait_s": 10.0, **limits})
        cache = session.new_cache(limits.slots)
        self.engine = SequenceEngine(
            SimpleNamespace(step=self._step), cache, Slots(cache, limits.slots * cache.positions),
            num_tokens=tokenizer.size, routing=routing, limits=limits, clock=lambda: self.now,
        )  # fmt: skip
        self.engine.accounts.report = self.ended.append

    def _step(self, cache, rows, *sampled):
        self.now += STEP_S
        if self.broken:
            raise ZeroDivisionError
        return self._session.step(cache, rows, *sampled)

    def submit(self, name: str, *, gone=lambda: False, deadline_s=None, **options):
        plan = plan_generation(
            GenerationOptions(**{"prompt": PROMPT, "max_tokens": 2, **options}), self._tokenizer, max_sequence=512,
            end_token_ids=(self._tokenizer.eos_token_id,),
        )  # fmt: skip
        outlet = Outlet(lambda response, is_last: None, lambda error: None, gone)
        request = text_request(plan, self._tokenizer, outlet, frozenset({name}), deadline_s, request_id=name)
        self.engine.submit(request)
        return request

    def run(self) -> None:
        while self.engine.step():
            pass


class FakeFamilies:
    """Stands for the class `pb_utils.MetricFamily`: `values` has name, labels and value of every metric."""

    COUNTER, GAUGE = "counter", "gauge"

    def __init__(self) -> None:
        self.values, self.kinds, self.messages = {}, {}, 0

    def __call__(self, *, name, description, kind):
        assert description.endswith(".")
        self.kinds[name] = kind
        return SimpleNamespace(Metric=lambda labels: self._metric(name, labels))

    def _metric(self, name, labels):
        key = name, tuple(sorted(labels.items()))
        self.values.setdefault(key, 0)
        return SimpleNamespace(increment=lambda value: self._increment(key, value))

    def _increment(self, key, value):
        assert value > 0 or self.kinds[key[0]] == self.GAUGE, f"{key} falls by {-value}"
        self.values[key] += value
        self.messages += 1

    def of(self, name: str, **labels):
        return self.values[name, tuple(sorted({"model": "tiny", **labels}.items()))]
