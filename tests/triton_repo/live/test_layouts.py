"""One list of life-cycle and request cases, run against both layouts of the same engine in one live Triton.

Whatever a client or an operator sees must not depend on the layout. What differs is Triton's own, and docs/wire.md
lists it: an ensemble's name before an error's text, three more fields in HTTP's JSON, how statistics count refusals.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request

import pytest
from live_requests import PATIENCE_S, Asked, metrics_of, slow_down
from live_triton import LiveTriton, Refused
from serve_command import wait_until

from clients.errors import without_ensemble
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server

SINGLE, STEPS = "alone", "steps"
ENGINES = {SINGLE: SINGLE, STEPS: "tensorrt_llm"}  # the model that has the engine, by the model that is asked
ENDLESS = {"text_input": "def ", "max_tokens": 600, "end_id": -1}
NO_TOKENS = (
    "INVALID_ARGUMENT: reading the request:\n  - max_tokens: found 0, expected 1 or more; ask for at least one token"
)


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_engine):
    folder = tmp_path_factory.mktemp("layouts") / "repository"
    package_engine(
        PackageOptions(engine=tiny_engine, name=SINGLE, output=folder, onnxruntime=ModelParameters(threads=1, slots=1))
    )
    package_engine(
        PackageOptions(
            engine=tiny_engine,
            name=STEPS,
            output=folder,
            onnxruntime=ModelParameters(threads=1, slots=1),
            layout="ensemble",
        )
    )
    for name in ENGINES.values():
        slow_down(folder / name)
    with running_server(ServerOptions(repository=folder)) as server, LiveTriton(server) as triton:
        yield triton


@pytest.fixture(params=[SINGLE, STEPS])
def model(request):
    return request.param


@pytest.fixture
def ask(live, model):
    """Begins a request to the model; one that still runs at the end of the test is stopped."""
    begun = []

    def begin(request_id="", **tensors) -> Asked:
        begun.append((request_id, Asked(live, model, request_id, **tensors)))
        return begun[-1][1]

    yield begin
    for request_id, asked in begun:
        if not asked.is_over() and request_id:
            stop(live, model, request_id)
        asked.end()


def reading(live, model, name: str) -> float:
    """One of the engine's own metrics."""
    return metrics_of(live.server.metrics_url, ENGINES[model])[f"moeship_{name}", ()]


@pytest.fixture
def has_begun(live, model):
    """Whether the engine has taken steps in this test: what nobody sees of an answer that is not streamed."""
    wait_until(lambda: reading(live, model, "requests_running") == 0)
    before = reading(live, model, "steps_total")
    return lambda: reading(live, model, "steps_total") > before + 2


def stop(live, model, request_id) -> list:
    return live.ask(model, request_id, text_input="", max_tokens=0, stop=True)


def test_an_answer_is_kept_to_a_guide_and_a_bad_guide_is_refused(ask):
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "([a-c]{2}-){3}"}
    answer = ask(text_input="def ", max_tokens=50, stream=True, **guide).end()
    assert re.fullmatch("([a-c]{2}-){3}", answer["text"])
    assert answer["reason"] == "stop"
    bad = ask(
        text_input="def ", max_tokens=5, guided_decoding_guide_type="json_schema", guided_decoding_guide="{"
    ).end()
    assert "guided_decoding_guide: found no JSON" in bad["refusal"]


def stop_until_over(live, model, request_id, asked) -> dict:
    """What a request came to that is asked to stop until it does: on a busy machine the first may overtake it."""
    deadline = time.monotonic() + PATIENCE_S
    while not asked.is_over() and time.monotonic() < deadline:
        stop(live, model, request_id)
        asked.wait(0.2)
    return asked.end()


@pytest.fixture
def running(ask):
    """A request that the model's one worker computes."""
    asked = ask("running", **ENDLESS, stream=True)
    assert asked.begun.wait(PATIENCE_S)
    return asked


def test_requests_need_no_id(ask):
    for stream in (True, False):
        found = ask(text_input="def ", max_tokens=4, end_id=-1, stream=stream).end()
        assert (found["reason"], found["num_input"], found["num_output"]) == ("length", 4, 4)


def test_several_requests_in_flight_may_bear_the_same_id(live, model, ask):
    prompts = ("def ", "class A:", "import os", "x = ")
    alone = [live.text(model, text_input=prompt, max_tokens=12, end_id=-1) for prompt in prompts]
    together = [ask("same", text_input=prompt, max_tokens=12, end_id=-1, stream=True) for prompt in prompts]
    assert [asked.end()["text"] for asked in together] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("end_id", [-1, None])
def test_a_stream_that_is_stopped_ends_as_cancelled_with_the_tokens_that_it_had(live, model, ask, end_id):
    # The model's own end token is none that this answer meets.
    options = {"text_input": "def ", "max_tokens": 600, "stream": True, "min_tokens": 600}
    asked = ask("mine", **options, **({} if end_id is None else {"end_id": end_id}))
    assert asked.begun.wait(PATIENCE_S)
    [answer] = stop(live, model, "mine")
    assert (answer.outputs["finish_reason"], answer.text, answer.outputs["token_ids"]) == ([b"cancelled"], "", [])
    found = asked.end()
    assert (found["reason"], found["num_input"]) == ("cancelled", 4)
    assert 0 < found["num_output"] < 600


def test_a_whole_answer_that_is_stopped_comes_with_what_it_had(live, model, ask, has_begun):
    asked = ask("mine", text_input="def ", max_tokens=600, min_tokens=600)
    assert wait_until(has_begun)
    found = stop_until_over(live, model, "mine", asked)
    assert (found["reason"], found["num_responses"]) == ("cancelled", 1)
    assert 0 < found["num_output"] < 600


@pytest.mark.parametrize("stream", [True, False])
def test_a_waiting_request_is_stopped_at_once(live, model, ask, running, stream):
    waiting = ask("waiting", **ENDLESS, stream=stream)
    found = stop_until_over(live, model, "waiting", waiting)
    assert not running.is_over()
    assert (found["reason"], found["num_input"], found["num_output"], found["text"]) == ("cancelled", 4, 0, "")


def test_all_requests_of_an_id_are_stopped(live, model, ask):
    asked = [ask("both", **ENDLESS, stream=True) for _ in range(3)]
    assert wait_until(lambda: any(one.begun.is_set() for one in asked))
    assert [stop_until_over(live, model, "both", one)["reason"] for one in asked] == ["cancelled"] * 3


def test_a_stop_of_an_unknown_id_is_answered_at_once_and_harms_nobody(live, model, ask, running):
    [answer] = stop(live, model, "never there")
    assert answer.outputs["finish_reason"] == [b"cancelled"]
    before = len(running.responses)
    assert wait_until(lambda: len(running.responses) > before + 3)
    assert not running.is_over()


def test_a_stop_without_an_id_is_refused(live, model):
    with pytest.raises(Refused) as caught:
        stop(live, model, "")
    assert without_ensemble(str(caught.value)) == (
        "INVALID_ARGUMENT: reading the request: stop is true and there is no request id; send the id of the request "
        "to end"
    )


def test_stop_may_be_false(ask):
    assert ask("mine", text_input="def ", max_tokens=2, end_id=-1, stop=False).end()["reason"] == "length"


def test_a_bad_request_is_refused_at_once_while_another_is_computed(ask, running):
    found = ask("bad", text_input="def ", max_tokens=0).end()
    assert not running.is_over()
    assert found["refusal"] == NO_TOKENS


def cancelled(live) -> list[str]:
    return re.findall(r"a request was cancelled after (\d+) tokens", live.server.log.read_text())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_the_slot(live, model, ask, stream, has_begun):
    before = len(cancelled(live))
    asked = ask("", **ENDLESS, stream=stream)
    assert wait_until(has_begun)
    asked.call.cancel()
    # Once the one slot is free.
    assert live.text(model, text_input="x", max_tokens=2)
    assert wait_until(lambda: cancelled(live)[before:])
    # The line of a request that an earlier test stopped may come late, before this one's.
    assert 0 < int(cancelled(live)[-1]) < ENDLESS["max_tokens"]


def test_a_client_that_goes_while_its_request_waits_leaves_the_queue(live, model, ask, running):
    before = len(cancelled(live))
    waiting = ask("", **ENDLESS)
    assert wait_until(lambda: reading(live, model, "requests_waiting") == 1)
    waiting.call.cancel()
    assert wait_until(lambda: cancelled(live)[before:]) == ["0"]
    assert not running.is_over()


def post(live, path: str, **fields) -> tuple[int, str]:
    request = urllib.request.Request(f"{live.server.http_url}/v2/models/{path}", data=json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def fields_of(model: str, text: str) -> dict:
    """HTTP's JSON without what Triton itself adds for an ensemble, and without the model's name."""
    fields = json.loads(text)
    assert fields.pop("model_name") == model
    added = {name: fields.pop(name, None) for name in ("sequence_id", "sequence_start", "sequence_end")}
    assert added == dict.fromkeys(added) if model == SINGLE else {"sequence_id": 0, **dict.fromkeys(added, False)}
    return fields


def test_the_tutorials_curl_works(live, model):
    """curl .../generate -d '{"text_input": ..., "max_tokens": ...}', without an id."""
    status, text = post(live, f"{model}/generate", text_input="def ", max_tokens=4, end_id=-1)
    expected = live.text(SINGLE, text_input="def ", max_tokens=4, end_id=-1)
    fields = fields_of(model, text)
    assert (status, fields["text_output"], fields["finish_reason"]) == (200, expected, "length")
    assert sorted(fields) == [
        "batch_index", "finish_reason", "model_version", "num_input_tokens", "num_output_tokens", "sequence_index",
        "text_output", "token_ids",
    ]  # fmt: skip


def test_generate_stream_sends_an_event_a_piece(live, model):
    status, text = post(live, f"{model}/generate_stream", text_input="def ", max_tokens=8, end_id=-1, stream=True)
    events = [fields_of(model, line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert (status, events[-1]["finish_reason"], events[-1]["num_output_tokens"]) == (200, "length", 8)
    expected = live.text(SINGLE, text_input="def ", max_tokens=8, end_id=-1)
    assert "".join(event["text_output"] for event in events) == expected


def test_http_stops_a_request_too(live, model, ask):
    asked = ask("by http", **ENDLESS, stream=True)
    assert asked.begun.wait(PATIENCE_S)
    status, text = post(live, f"{model}/generate", id="by http", text_input="", max_tokens=0, stop=True)
    fields = fields_of(model, text)
    assert (status, fields["finish_reason"], fields["text_output"]) == (200, "cancelled", "")
    assert asked.end()["reason"] == "cancelled"


def test_http_refuses_with_400_and_the_same_words(live, model):
    status, text = post(live, f"{model}/generate", text_input="def ", max_tokens=0)
    assert status == 400
    assert without_ensemble(json.loads(text)["error"]) == NO_TOKENS


def counts(live, model) -> tuple[int, int]:
    """What Triton's statistics say of the model: requests that succeeded, and that failed."""
    with urllib.request.urlopen(f"{live.server.http_url}/v2/models/{model}/stats", timeout=PATIENCE_S) as response:
        [found] = json.load(response)["model_stats"]
    return found["inference_stats"]["success"]["count"], found["inference_stats"]["fail"]["count"]


def test_statistics_count_each_answer_once(live, model, ask):
    before = counts(live, model)
    ask("", text_input="def ", max_tokens=3, end_id=-1).end()
    ask("", text_input="def ", max_tokens=3, end_id=-1, stream=True).end()
    wait_until(lambda: sum(counts(live, model)) >= sum(before) + 2)
    assert counts(live, model) == (before[0] + 2, before[1])
