"""ci/overload.py and ci/fuzz_wire.py find what they look for: run against servers that do right and wrong."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from trtllm.library import ROOT

from clients.messages import Generation

METRICS = """moeship_requests_running{model="tiny"} 0
moeship_sequences_running{model="tiny"} 2
moeship_expert_tokens_total{model="tiny",layer="0",expert="1"} 7
moeship_requests_running{model="other"} 5
nv_inference_count{model="tiny",version="1"} 3
"""


@pytest.fixture(scope="module")
def modules():
    """ci, from where its modules can be imported."""
    sys.path.insert(0, str(ROOT / "ci"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "ci"))


@pytest.fixture(scope="module")
def soak(modules):
    """The modules of ci/soak."""
    names = ("served", "wishes", "wire", "burst", "mixed", "ends")
    return SimpleNamespace(**{name: modules(f"soak.{name}") for name in names})


@pytest.fixture(scope="module")
def fuzz_wire(modules):
    return modules("fuzz_wire")


def answer(**changes) -> Generation:
    fields = {
        "text": "abc", "token_ids": (1, 2, 3), "finish_reason": "length", "num_input_tokens": 2,
        "num_output_tokens": 3, "cum_log_prob": -1.0, "log_probs": (-0.5, -0.25, -0.25),
    }  # fmt: skip
    return Generation(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ""),
        ({"log_probs": (-0.5, -0.25, -0.2505)}, ""),
        ({"log_probs": (-0.5, -0.25, -0.26)}, "log_probs differ by 0.01"),
        ({"log_probs": (-0.5, -0.25)}, "log_probs differ by inf"),
        ({"token_ids": (1, 2, 4)}, "token_ids: (1, 2, 4), expected (1, 2, 3)"),
        ({"finish_reason": "stop"}, "finish_reason: 'stop', expected 'length'"),
    ],
)
def test_another_answer_is_noticed(soak, changes, found):
    assert soak.wishes.difference((answer(**changes),), (answer(),)) == found


def test_the_beginning_of_an_answer_is_told_from_another_one(soak):
    whole = (answer(), answer(sequence_index=1, token_ids=(7,), text="x"))
    assert soak.wishes.begins((answer(token_ids=(1,), text="a"),), whole)
    assert soak.wishes.begins((), whole)
    assert not soak.wishes.begins((answer(token_ids=(1, 3), text="ab"),), whole)
    assert not soak.wishes.begins((answer(sequence_index=1, token_ids=(1,), text="a"),), whole)


def test_wishes_are_of_every_kind_and_the_same_for_a_seed(soak):
    kinds = soak.wishes.KINDS
    wishes = soak.wishes.draw_wishes("tiny", 4 * len(kinds), 3)
    assert Counter(wish.kind for wish in wishes) == dict.fromkeys(kinds, 4)
    assert wishes == soak.wishes.draw_wishes("tiny", 4 * len(kinds), 3)
    assert len({wish.request.random_seed for wish in wishes}) == 4 * len(kinds)


@pytest.mark.parametrize(
    ("kind", "fits", "does_not"),
    [
        ("schema", '{"a": 7}', '{"a": "7"}'),
        ("schema", '{"b": 1, "a": 7}', '{"a": 7'),
        ("nested schema", '{"name": "a", "parts": [{"name": "b"}]}', '{"name": "a", "parts": [{"name": "c"}]}'),
        ("nested schema", '{"name": "b"}', '{"name": "b", "more": 1}'),
        ("expression", "def f_x", "def f(x"),
        ("grammar", "((a b) c)", "((a b) c"),
        ("object", '{"any": [1]}', "[1]"),
    ],
)
def test_an_answer_that_does_not_keep_to_its_guide_is_noticed(soak, kind, fits, does_not):
    [wish] = {one.kind: one for one in soak.wishes.draw_wishes("tiny", 40, 1) if one.kind == kind}.values()
    assert soak.wishes.misfit((answer(text=fits, finish_reason="stop"),), wish) == ""
    assert "does not keep to the guide" in soak.wishes.misfit((answer(text=does_not, finish_reason="stop"),), wish)
    assert soak.wishes.misfit((answer(text=does_not, finish_reason="length"),), wish) == ""


def test_metrics_are_those_of_the_model_and_what_is_held_is_a_fault(soak, tmp_path):
    (tmp_path / "metrics").write_text(METRICS)
    said = tmp_path / "server.json"
    first, again = {"grpc": "127.0.0.1:1", "metrics": "none", "pid": 1}, {"event": "failed", "reason": "it died"}
    last = {"event": "ready", "grpc": "127.0.0.1:1", "metrics": (tmp_path / "metrics").as_uri()}
    said.write_text("".join(f"{json.dumps(line)}\n" for line in (first, again, last)))
    served = soak.served.Served(said, "tiny")
    found = served.metrics()
    assert found == {"requests_running": 0, "sequences_running": 2}
    assert served.resident() == {}
    report = soak.served.Report()
    soak.mixed._require_free(report, {**dict.fromkeys(soak.served.HELD, 0.0), **found}, "afterwards")
    assert report.faults == ["afterwards the server holds {'sequences_running': 2.0}"]


def test_growth_is_that_of_memory_beside_keys_and_values(soak):
    first = {"model": 100 + 20, "kv": 20, "server": 50}
    assert soak.mixed.growth_of(first, {"model": 100 + 60, "kv": 60, "server": 90}) == 0
    assert soak.mixed.growth_of(first, {"model": 103 + 60, "kv": 60, "server": 50}) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("tears", "step_s", "faults"),
    [
        ([1] * 20, 0.05, []),
        ([1] * 19 + [2], 0.05, []),  # a token was on its way
        ([1] * 17 + [2] * 3, 0.05, ["tear: 3 slots were free only after 2 steps"]),
        ([1] * 19 + [3], 0.05, ["tear: 1 slots were free only after 3 steps"]),
        ([3] * 20, 0.004, []),  # an end takes as long to arrive as two such steps
    ],
)
def test_steps_until_a_slot_is_free_are_those_behind_the_last_token_that_came(soak, tears, step_s, faults):
    received = {"stop": ("stop", 5), "whole": ("stop", 9)}
    lines = {"stop": {"end": "stopped", "output_tokens": 6}, "whole": {"end": "length", "output_tokens": 19}}
    for number, steps in enumerate(tears):
        received[str(number)] = ("tear", 5)
        lines[str(number)] = {"end": "disconnected", "output_tokens": 5 + steps}
    report = soak.served.Report()
    soak.ends._judge(report, received, lines, step_s)
    assert report.numbers["steps"] == {"stop": {1: 1}, "tear": dict(sorted(Counter(tears).items()))}
    assert report.faults == faults


def test_a_burst_is_judged_by_refusals_and_answers(soak):
    wish = replace(soak.wishes.draw_wishes("tiny", 1, 1)[0], stream=True)
    overloaded = (
        "UNAVAILABLE: answering the request: 64 requests wait already, the most that may on this server; send it again "
        "in about 3 s, or to another server"
    )

    class Sent(soak.burst._Sent):
        def read(self):
            return self.responses

    def judge(*outcomes, rounds=False):
        report = soak.served.Report()
        sent = [Sent(wish, None, found, seconds, error) for seconds, found, error in outcomes]
        soak.burst._judge(report, sent, {id(wish): (answer(),)}, rounds=rounds)
        return report.faults

    right, refused = (2.0, (answer(),), ""), (0.5, (), overloaded)
    assert judge(right, refused) == []
    assert judge(right) == ["nothing was refused: the burst is no larger than the queue"]
    assert judge(right, (1.5, (), overloaded)) == ["a refusal took 1.50 s, at most 1 s are allowed"]
    assert judge(right, refused, (0.5, (), "INTERNAL: why")) == ["a refusal says INTERNAL: why"]
    wrong = (2.0, (answer(token_ids=(1, 2, 9)),), "")
    assert judge(wrong, refused) == ["greedy: token_ids: (1, 2, 9), expected (1, 2, 3)"]
    assert judge(wrong, refused, rounds=True) == []


def test_a_response_of_a_burst_is_read_as_an_answer_or_an_error(soak):
    wish = replace(soak.wishes.draw_wishes("tiny", 1, 1)[0], stream=True)
    error = soak.burst.pb.ModelStreamInferResponse(error_message="UNAVAILABLE: 64 requests wait already")
    sent = soak.burst._Sent(wish, None, [error])
    assert (sent.read(), sent.error) == ((), "UNAVAILABLE: 64 requests wait already")
    cut = soak.burst._Sent(wish, None, [])
    assert cut.read() == ()
    assert "ended after 0 pieces without a final one" in cut.error


def test_a_relay_passes_on_stops_reading_and_tears(soak):
    async def main():
        gone = asyncio.Event()

        async def serve(reader, writer):
            try:
                while data := await reader.read(100):
                    writer.write(data)
            except ConnectionError:
                pass
            gone.set()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with soak.wire.Relay(url) as relay:
            reader, writer = await asyncio.open_connection(*relay.url.split(":"))
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            relay.stop_reading()
            writer.write(b"two")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(3), 0.1)
            await relay.tear(reset=True)
            await asyncio.wait_for(gone.wait(), 10)
        writer.close()
        server.close()

    asyncio.run(main())


class Sender:
    """Stands for a server: refuses what is damaged. `other` says what good requests get once `count` came."""

    def __init__(self, good, count=1 << 30, other="other"):
        self.good, self.count, self.other = good, count, other
        self.num_asked = 0

    def over_grpc(self, message):
        if message.id != "fuzz-0":
            return "", "INVALID_ARGUMENT: it is wrong"
        self.num_asked += 1
        return (self.good if self.num_asked <= self.count else self.other), ""

    def over_http(self, model, body):
        return "", "INVALID_ARGUMENT: it is wrong"


@pytest.mark.parametrize("clients", [1, 6])
def test_damaged_requests_are_sent_side_by_side_and_good_ones_beside_them(fuzz_wire, clients):
    counts = Counter()
    assert list(fuzz_wire.faults_of(Sender("right"), "tiny", 1, 50, counts, clients)) == []
    assert counts["refused"] == 50
    assert bool(counts["good beside them"]) == (clients > 1)


def test_another_answer_beside_damaged_requests_is_a_fault(fuzz_wire):
    faults = list(fuzz_wire.faults_of(Sender("right", count=len(fuzz_wire.GOOD)), "tiny", 1, 12, Counter(), 6))
    assert any("beside damaged requests a good one has another answer" in fault for fault in faults)
