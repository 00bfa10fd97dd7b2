"""An LLM's tokens to responses: texts, ends, cancellation and refusals, with the stand-in in this process."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from llmapi_library import load_standin
from mixtral_checkpoints import write_llama_tokenizer

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.llmapi_settings import LlmSettings, TextSettings, TritonSettings
from triton_repo.errors import RequestError
from triton_repo.runtime.batching.alone import never
from triton_repo.runtime.llmapi.model import LlmService

PERIOD_MS = 20
END, OTHER_END = 2, 0  # the second is <unk>, which no text here has
PROMPT = "the quick brown fox — naïve 日本 fox"
SETTINGS = LlmSettings(
    llm={},
    triton=TritonSettings(cancellation_check_period_ms=PERIOD_MS),
    text=TextSettings(end_token_ids=(END, OTHER_END), max_sequence=200),
)
library = load_standin()


@pytest.fixture
def llm(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return library.LLM(str(tmp_path / "model"), skip_tokenizer_init=True, backend="pytorch")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_llama_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def service(llm, tokenizer):
    return LlmService(llm, library.SamplingParams, tokenizer, SETTINGS)


def tensors(**values) -> dict[str, np.ndarray]:
    """Contract tensors [1, 1] of Python values."""
    made = {}
    for name, value in values.items():
        items = [v.encode() if isinstance(v, str) else v for v in (value if isinstance(value, list) else [value])]
        kinds = {bool: np.bool_, int: np.int32, float: np.float32, bytes: np.object_}
        made[name] = np.array([items], dtype=kinds[type(items[0])])
    return made


def ask(service, is_cancelled=never, request_id="", **values) -> list:
    async def collect():
        return [response async for response in service.respond(tensors(**values), request_id, is_cancelled)]

    return asyncio.run(collect())


def joined(responses) -> str:
    return "".join(response.outputs["text_output"][0].decode() for response in responses)


def reasons(responses) -> list[str]:
    return [response.outputs["finish_reason"].reshape(-1)[0].decode() for response in responses]


def test_the_answer_is_the_llms_tokens_as_whole_characters_streamed_or_not(service, tokenizer):
    streamed = ask(service, text_input=PROMPT, max_tokens=100, stream=True)
    [whole] = ask(service, text_input=PROMPT, max_tokens=100)
    assert joined(streamed) == joined([whole]) == f" {PROMPT}"
    assert [response.is_last for response in streamed] == [False] * (len(streamed) - 1) + [True]
    assert reasons(streamed) == [""] * (len(streamed) - 1) + ["stop"]
    ids = [token for response in streamed for token in response.outputs["token_ids"][0].tolist()]
    assert ids == [*tokenizer.encode(PROMPT), END] == whole.outputs["token_ids"][0].tolist()
    assert whole.outputs["num_output_tokens"].tolist() == [[len(ids)]]
    assert whole.outputs["num_input_tokens"].tolist() == [[len(ids)]]  # the start token in place of the end


def test_the_prompt_comes_first_where_it_is_asked_for(service):
    asked = {"text_input": "fox", "max_tokens": 9, "exclude_input_in_output": False}
    assert joined(ask(service, **asked)) == "fox fox"
    # A stream never repeats it, as TensorRT-LLM's does not.
    assert joined(ask(service, **asked, stream=True)) == " fox"


def test_max_tokens_and_the_context_end_an_answer(service, tokenizer):
    [short] = ask(service, text_input=PROMPT, max_tokens=3)
    assert short.outputs["token_ids"].tolist() == [tokenizer.encode(PROMPT)[:3]]
    assert reasons([short]) == ["length"]
    [full] = ask(service, text_input=PROMPT, max_tokens=5000, end_id=-1)
    prompt_size = len(tokenizer.encode_prompt(PROMPT))
    assert (full.outputs["token_ids"].size, reasons([full])) == (200 - prompt_size, ["length"])


def test_each_of_the_models_end_tokens_ends_an_answer_and_is_among_its_tokens(service, tokenizer):
    prompt = "the fox <unk> dog"
    before = tokenizer.encode(prompt).index(OTHER_END)
    [answer] = ask(service, text_input=prompt, max_tokens=100)
    assert answer.outputs["token_ids"].tolist() == [tokenizer.encode(prompt)[: before + 1]]
    assert joined([answer]).rstrip() == " the fox"
    assert reasons([answer]) == ["stop"]


def watched(llm) -> list:
    """The outputs that the LLM makes from here on."""
    made, plain = [], llm.generate_async
    llm.generate_async = lambda *words, **more: made.append(plain(*words, **more)) or made[-1]
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_word_is_found_in_the_text_and_ends_the_llms_work(service, llm, stream):
    made = watched(llm)
    answer = ask(service, text_input=PROMPT, max_tokens=100, stream=stream, stop_words=["n fo", "never"])
    assert joined(answer) == " the quick brow"
    assert reasons(answer)[-1] == "stop"
    assert made[0]._aborted


def test_log_probabilities_are_those_of_the_tokens(service, llm):
    [answer] = ask(service, text_input="the fox", max_tokens=100, return_log_probs=True)
    size = answer.outputs["token_ids"].size
    assert answer.outputs["output_log_probs"].tolist() == [[-0.5] * size]
    assert answer.outputs["cum_log_probs"].tolist() == [[-0.5 * size]]


def test_a_token_whose_log_probability_is_not_given_is_an_error_not_a_number(service, monkeypatch):
    monkeypatch.setattr(library, "Logprob", lambda logprob, rank: None)
    step = library.RequestOutput._step

    async def likeliest_alone(self):
        await step(self)
        self.outputs[0].logprobs[-1] = {9999: SimpleNamespace(logprob=-0.1)}

    monkeypatch.setattr(library.RequestOutput, "_step", likeliest_alone)
    with pytest.raises(RequestError, match="gave no log-probability of the token .*: ask for them without") as caught:
        ask(service, text_input="the fox", max_tokens=9, temperature=1.0, return_log_probs=True)
    assert caught.value.kind == "INTERNAL"


def test_log_probabilities_as_plain_numbers_are_taken_too(service, monkeypatch):
    monkeypatch.setattr(library, "Logprob", lambda logprob, rank: None)
    step = library.RequestOutput._step

    async def numbers(self):
        await step(self)
        self.outputs[0].logprobs[-1] = -0.25

    monkeypatch.setattr(library.RequestOutput, "_step", numbers)
    [answer] = ask(service, text_input="fox", max_tokens=1, return_log_probs=True)
    assert answer.outputs["output_log_probs"].tolist() == [[-0.25]]


def test_a_cancelled_request_ends_within_the_period_and_the_llm_is_told(service, llm):
    made = watched(llm)
    seen = []

    def is_cancelled() -> bool:
        seen.append(len(made[0].outputs[0].token_ids))
        return len(seen) == 2

    answer = ask(service, is_cancelled, text_input=PROMPT, max_tokens=150, stream=True, end_id=-1)
    assert reasons(answer)[-1] == "cancelled"
    assert 0 < answer[-1].num_output_tokens < 100
    assert made[0]._aborted


def test_a_silent_llm_can_be_cancelled(service, monkeypatch):
    async def wait_for_ever(self):
        await asyncio.Event().wait()

    monkeypatch.setattr(library.RequestOutput, "_step", wait_for_ever)
    assert reasons(ask(service, lambda: True, text_input="fox", max_tokens=9)) == ["cancelled"]


def test_a_request_is_ended_by_another_that_bears_its_id(service, llm):
    made = watched(llm)

    async def run():
        async def first():
            asked = tensors(text_input=PROMPT, max_tokens=150, end_id=-1)
            return [response async for response in service.respond(asked, "mine", never)]

        running = asyncio.ensure_future(first())
        while not (made and made[0].outputs[0].token_ids):
            await asyncio.sleep(0.001)
        stop = {"text_input": np.array([b""], dtype=np.object_), "stop": np.array([True])}
        stopped = [response async for response in service.respond(stop, "mine", never)]
        return await running, stopped, stop

    ended, stopped, stop = asyncio.run(run())
    assert reasons(ended) == reasons(stopped) == ["cancelled"]
    assert stopped[0].is_last
    # One of an id that no request in flight bears harms nobody.
    assert reasons([asyncio.run(anext(service.respond(stop, "mine", never)))]) == ["cancelled"]
    with pytest.raises(RequestError, match="stop is true and there is no request id"):
        asyncio.run(anext(service.respond(stop, "", never)))


def test_in_the_llm_apis_tensors_each_response_holds_the_text_so_far(service):
    asked = {"text_input": "the fox", "streaming": True, "return_finish_reason": True}
    texts = [response.outputs["text_output"][0].decode() for response in ask(service, **asked)]
    assert texts == sorted(texts, key=len)
    assert len(texts) > 2
    assert texts[-1] == "the fox the fox"
    assert reasons(ask(service, **asked)) == ["None"] * (len(texts) - 1) + ["stop"]
    [quiet] = ask(service, text_input="the fox", sampling_param_exclude_input_from_output=True)
    assert quiet.outputs.keys() == {"text_output"}
    assert quiet.outputs["text_output"].tolist() == [b" the fox"]


def test_the_stop_reason_is_the_word_that_was_met_first(service):
    asked = {"text_input": PROMPT, "return_stop_reason": True, "return_cumulative_logprob": True}
    [answer] = ask(service, sampling_param_stop=["never", "fox", "quick"], **asked)
    assert answer.outputs["stop_reason"].tolist() == [b"quick"]
    assert answer.outputs["cumulative_logprob"][0] < 0
    assert answer.outputs["cumulative_logprob"].dtype == np.float32
    [ended] = ask(service, sampling_param_max_tokens=100, **asked)
    assert ended.outputs["stop_reason"].tolist() == [b"None"]


def test_metrics_come_when_they_are_asked_for(service):
    [answer] = ask(service, text_input="fox", sampling_param_return_perf_metrics=True)
    found = {name: values.tolist() for name, values in answer.outputs.items() if name != "text_output"}
    assert found == {
        "kv_cache_reused_block": [1], "kv_cache_missed_block": [2], "kv_cache_alloc_new_blocks": [3],
        "kv_cache_alloc_total_blocks": [4], "kv_cache_hit_rate": [0.25], "arrival_time_ns": [7_000_000_000],
        "first_scheduled_time_ns": [8_000_000_000], "first_token_time_ns": [9_000_000_000],
        "last_token_time_ns": [10_000_001_000], "acceptance_rate": [0.5], "total_accepted_draft_tokens": [5],
        "total_draft_tokens": [6],
    }  # fmt: skip


def finishing(monkeypatch, place: int, finish) -> None:
    """Have the LLM's output finish by `finish(output)` once it has so many tokens."""
    step = library.RequestOutput._step

    async def stepped(self):
        await step(self)
        if len(self.outputs[0].token_ids) == place and not self.finished:
            self.finished = True
            finish(self.outputs[0])

    monkeypatch.setattr(library.RequestOutput, "_step", stepped)


def test_an_end_token_that_the_llm_keeps_to_itself_is_added(service, tokenizer, monkeypatch):
    finishing(monkeypatch, 3, lambda output: setattr(output, "finish_reason", "stop"))
    [answer] = ask(service, text_input=PROMPT, max_tokens=100)
    assert answer.outputs["token_ids"].tolist() == [[*tokenizer.encode(PROMPT)[:3], END]]
    assert reasons([answer]) == ["stop"]


def test_what_was_kept_back_is_given_out_at_the_llms_own_limit(service, tokenizer, monkeypatch):
    ids = tokenizer.encode("the fox 日")
    finishing(monkeypatch, len(ids) - 1, lambda output: setattr(output, "finish_reason", "length"))
    [answer] = ask(service, text_input="the fox 日", max_tokens=100, return_log_probs=True)
    assert joined([answer]).rstrip("\ufffd") == " the fox "
    assert joined([answer]).endswith("\ufffd")  # a character's beginning
    assert answer.outputs["token_ids"].tolist() == [ids[:-1]]
    assert answer.outputs["output_log_probs"].size == answer.num_output_tokens == len(ids) - 1
    assert reasons([answer]) == ["length"]


def test_the_llms_own_limit_ends_a_stream_with_the_text_that_might_have_become_a_stop_word(
    service, tokenizer, monkeypatch
):
    size = len(tokenizer.encode("the quick"))
    finishing(monkeypatch, size, lambda output: setattr(output, "finish_reason", "length"))
    asked = {"text_input": PROMPT, "max_tokens": 100, "stop_words": ["quick fox"], "stream": True}
    streamed = ask(service, **asked)
    assert joined(streamed) == " the quick"
    assert joined(streamed[:-1]) == " the "
    assert reasons(streamed) == [""] * (len(streamed) - 1) + ["length"]
    assert streamed[-1].is_last
    assert streamed[-1].num_output_tokens == size


def test_an_llm_that_stops_without_an_end_token_to_stop_at_cancels_the_request(service, tokenizer, monkeypatch):
    finishing(monkeypatch, 2, lambda output: setattr(output, "finish_reason", "stop"))
    [answer] = ask(service, text_input=PROMPT, max_tokens=100, end_id=-1)
    assert answer.outputs["token_ids"].tolist() == [tokenizer.encode(PROMPT)[:2]]
    assert reasons([answer]) == ["cancelled"]


def test_an_llm_that_was_stopped_elsewhere_cancels_the_request(service, monkeypatch):
    finishing(monkeypatch, 2, lambda output: setattr(output, "finish_reason", "cancelled"))
    assert reasons(ask(service, text_input=PROMPT, max_tokens=100)) == ["cancelled"]


def test_an_output_without_an_end_is_an_error(service, monkeypatch):
    async def end(self):
        raise StopAsyncIteration

    monkeypatch.setattr(library.RequestOutput, "__anext__", end)
    with pytest.raises(RequestError, match="output did not end"):
        ask(service, text_input="fox", max_tokens=9)


def test_what_the_llm_raises_is_one_requests_alone(service, tokenizer, monkeypatch):
    step, size = library.RequestOutput._step, len(tokenizer.encode("fox"))

    async def fail(self):
        if len(self._prompt) == size:
            raise RuntimeError("out of memory")
        await step(self)

    monkeypatch.setattr(library.RequestOutput, "_step", fail)

    async def both():
        async def one(prompt):
            return [r async for r in service.respond(tensors(text_input=prompt, max_tokens=99), prompt, never)]

        return await asyncio.gather(one("fox"), one("quick brown 日"), return_exceptions=True)

    failed, answered = asyncio.run(both())
    assert isinstance(failed, RuntimeError)
    assert joined(answered) == " quick brown 日"


@pytest.mark.parametrize(
    ("guide_type", "guide", "field"),
    [
        ("json", None, "json_object"), ("json_schema", "{}", "json"), ("regex", "a+", "regex"),
        ("ebnf_grammar", 'root ::= "a"', "grammar"),
    ],
)  # fmt: skip
def test_guides_are_the_librarys_own(llm, tokenizer, service, guide_type, guide, field):
    guided = LlmService(llm, library.SamplingParams, tokenizer, SETTINGS, library.GuidedDecodingParams)
    asked = {"text_input": "fox", "max_tokens": 9, "guided_decoding_guide_type": guide_type}
    asked |= {} if guide is None else {"guided_decoding_guide": guide}
    made = watched(llm)
    ask(guided, **asked)
    given = made[0]._parameters.guided_decoding
    assert given == library.GuidedDecodingParams(**{field: True if guide is None else guide})
    with pytest.raises(RequestError, match="packaged without guided decoding: .*--guided-decoding-backend xgrammar"):
        ask(service, **asked)
    with pytest.raises(RequestError, match="end_id: found none beside a guide, which ends at 2, 0"):
        ask(guided, **asked, end_id=-1)


def test_arguments_that_the_llm_refuses_are_the_requests_fault(service, llm):
    def refuse(*words, **more):
        raise ValueError("The sum of prompt length (9000.0), query length (0) should not exceed max_num_tokens (8192)")

    llm.generate_async = refuse
    with pytest.raises(RequestError, match="TensorRT-LLM refuses it: The sum of prompt length") as caught:
        ask(service, text_input="fox", max_tokens=9)
    assert caught.value.kind == "INVALID_ARG"


def test_a_consumer_that_leaves_early_ends_the_llms_work(service, llm):
    made = watched(llm)

    async def leave():
        answer = service.respond(tensors(text_input=PROMPT, max_tokens=150, stream=True, end_id=-1), "", never)
        async with contextlib.aclosing(answer) as responses:
            await anext(responses)

    asyncio.run(leave())
    assert made[0]._aborted
