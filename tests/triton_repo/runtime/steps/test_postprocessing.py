"""Tokens of many answers to their pieces: ends, stops, cancellations, and what is forgotten when."""

from __future__ import annotations

import pytest

from triton_repo.errors import RequestError
from triton_repo.runtime.answer import answer_plan
from triton_repo.runtime.options import GenerationOptions, plan_generation
from triton_repo.runtime.steps.postprocessing import (
    CANCELLATION_PERIOD_S,
    LONGEST_SILENCE_S,
    Postprocessor,
    Tokens,
)
from triton_repo.runtime.text import stopping
from triton_repo.runtime.text.automaton import Automaton


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def post(byte_level, clock):
    return Postprocessor(byte_level, clock=clock)


@pytest.fixture
def begin(byte_level):
    """Registers an answer to "def " that streams, unless told otherwise; the engine has one end token."""

    def register(post, key="k", request_id="r", end_token_ids=(byte_level.eos_token_id,), **fields):
        options = GenerationOptions(**{"prompt": "def ", "max_tokens": 50, "stream": True, **fields})
        plan = plan_generation(options, byte_level, max_sequence=512, end_token_ids=end_token_ids)
        post.register(key, request_id, answer_plan(plan, byte_level).to_json())

    return register


def never() -> bool:
    return False


def one(token: int, **fields) -> Tokens:
    return Tokens(token_ids=(token,), **fields)


def feed(post, ids, key="k"):
    """The steps of an engine that gives one token a response."""
    return [post.extend(key, one(token), never) for token in ids]


def test_pieces_are_whole_characters_and_the_end_token_which_no_engine_shows_is_added(post, begin, byte_level):
    begin(post)
    ids = byte_level.encode("a 😀語")
    steps = [*feed(post, ids), post.extend("k", Tokens(token_ids=()), never)]
    pieces = [step.piece for step in steps if step.piece]
    assert "".join(piece.text for piece in pieces) == "a 😀語"
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert [token for piece in pieces for token in piece.token_ids] == [*ids, byte_level.eos_token_id]
    assert (pieces[-1].finish_reason, pieces[-1].num_output_tokens) == ("stop", len(ids) + 1)
    assert [step.piece is None for step in steps].count(True) > 0
    assert not any(step.stop for step in steps)
    assert len(post) == 0


def test_answers_that_wait_for_their_engine_hold_no_automata(post, begin, byte_level, monkeypatch):
    made = []

    def count(words):
        made.append(words)
        return Automaton(words)

    monkeypatch.setattr(stopping, "Automaton", count)
    for number in range(20):
        begin(post, key=f"k{number}", request_id=f"r{number}", stop_words=("zz", "qq"))
    assert not made
    feed(post, byte_level.encode("x"), key="k3")
    assert ("zz", "qq") in made


def test_the_end_tokens_log_probability_is_what_the_sum_grew_by(post, begin, byte_level):
    begin(post, return_log_probs=True)
    [a, b] = byte_level.encode("xy")
    post.extend("k", one(a, log_probs=(-0.5,), cum_log_prob=-0.5), never)
    post.extend("k", one(b, log_probs=(-0.25,), cum_log_prob=-0.75), never)
    last = post.extend("k", Tokens(token_ids=(), cum_log_prob=-2.75), never).piece
    assert (last.log_probs, last.cum_log_prob) == ((-2.0,), -2.75)


@pytest.mark.parametrize(("last_sum", "expected"), [(-0.75, 0.0), (-0.5, 0.0), (None, 0.0)])
def test_an_end_token_never_has_a_log_probability_above_0(post, begin, byte_level, last_sum, expected):
    """The engine's sum is rounded, so it can fall short of the sum that was added up here. It may be absent too."""
    begin(post, return_log_probs=True)
    [a] = byte_level.encode("x")
    post.extend("k", one(a, log_probs=(-0.75,)), never)
    last = post.extend("k", Tokens(token_ids=(), cum_log_prob=last_sum), never).piece
    assert last.log_probs == (expected,)


def test_the_end_token_that_an_engine_does_not_show_is_the_first_of_several(post, begin, byte_level):
    begin(post, end_token_ids=(byte_level.eos_token_id, byte_level.encode("q")[0]))
    feed(post, byte_level.encode("x"))
    assert post.extend("k", Tokens(token_ids=()), never).piece.token_ids == (byte_level.eos_token_id,)


def test_the_length_ends_an_answer_with_the_token_that_reaches_it(post, begin, byte_level):
    begin(post, max_tokens=2)
    steps = feed(post, byte_level.encode("xy"))
    assert (steps[-1].piece.finish_reason, steps[-1].stop, len(post)) == ("length", "", 0)


def test_a_whole_answer_of_one_response_ends_with_it(post, begin, byte_level):
    begin(post, stream=False)
    ids = tuple(byte_level.encode("a 😀"))
    [step] = [post.extend("k", Tokens(token_ids=ids), never)]
    assert (step.piece.text, step.piece.finish_reason) == ("a 😀", "stop")
    assert step.piece.token_ids == (*ids, byte_level.eos_token_id)
    assert len(post) == 0


def test_a_whole_answer_with_stop_words_is_watched_and_sent_once(post, begin, byte_level):
    begin(post, stream=False, stop_words=("lo w",))
    steps = feed(post, byte_level.encode("hello world")[:-1])
    pieces = [step.piece for step in steps if step.piece]
    assert [piece.text for piece in pieces] == ["hel"]
    assert [step.stop for step in steps].count("k") == 1


def test_a_stop_word_across_tokens_ends_the_answer_and_stops_the_engine(post, begin, byte_level):
    begin(post, stop_words=("lo w",))
    ids = byte_level.encode("hello world")
    steps = feed(post, ids)
    ends = [index for index, step in enumerate(steps) if step.piece and step.piece.finish_reason]
    assert len(ends) == 1
    assert steps[ends[0]].stop == "k"
    assert "".join(step.piece.text for step in steps if step.piece) == "hel"
    # What the engine had under way is swallowed until its last response, which is empty.
    assert all(step.piece is None and not step.stop for step in steps[ends[0] + 1 :])
    assert len(post) == 1
    assert post.extend("k", Tokens(token_ids=()), never).piece is None
    assert len(post) == 0


def test_stop_words_that_the_engine_knows_stop_nothing_since_it_has_ended(post, begin, byte_level):
    begin(post, stop_words=("hello",))
    steps = feed(post, byte_level.encode("hello"))
    assert (steps[-1].piece.finish_reason, steps[-1].stop, len(post)) == ("stop", "", 0)


def test_an_end_token_beyond_the_first_comes_as_a_token_and_shows_in_no_text(post, begin, byte_level):
    begin(post, end_token_ids=(byte_level.eos_token_id, byte_level.encode("q")[0]))
    steps = feed(post, byte_level.encode("xq"))
    assert [step.piece.text for step in steps] == ["x", ""]
    assert (steps[-1].piece.finish_reason, steps[-1].stop, len(post)) == ("stop", "", 0)


def test_an_engine_that_is_stopped_by_others_ends_an_answer_that_no_end_token_can(post, begin, byte_level):
    begin(post, end_id=-1)
    feed(post, byte_level.encode("x"))
    assert post.extend("k", Tokens(token_ids=()), never).piece.finish_reason == "cancelled"


def test_a_cancelled_request_stops_the_engine_and_is_asked_about_now_and_then(post, begin, clock, byte_level):
    begin(post)
    asked = []

    def cancelled() -> bool:
        asked.append(clock.seconds)
        return True

    [x] = byte_level.encode("x")
    assert post.extend("k", one(x), cancelled).piece.finish_reason is None
    clock.seconds += CANCELLATION_PERIOD_S
    step = post.extend("k", one(x), cancelled)
    assert (step.piece.finish_reason, step.stop, asked) == ("cancelled", "k", [CANCELLATION_PERIOD_S])
    assert post.extend("k", one(x), cancelled).piece is None


def test_several_tokens_of_one_response_are_one_piece(post, begin, byte_level):
    begin(post)
    step = post.extend("k", Tokens(token_ids=tuple(byte_level.encode("x y z"))), never)
    assert step.piece.text == "x y z"


def test_answers_do_not_mix(post, begin, byte_level):
    texts = {"a": "one 😀 ", "b": "語 two"}
    for key in texts:
        begin(post, key=key, request_id=key)
    found = dict.fromkeys(texts, "")
    queues = {key: byte_level.encode(text) for key, text in texts.items()}
    while any(queues.values()):
        for key, queue in queues.items():
            if queue:
                piece = post.extend(key, one(queue.pop(0)), never).piece
                found[key] += piece.text if piece else ""
    assert found == texts


def test_an_engine_that_knows_no_keys_is_told_to_stop_only_a_request_that_its_id_names(byte_level, begin):
    post = Postprocessor(byte_level, knows_keys=False)
    begin(post, key="alone", request_id="once", stop_words=("lo w",))
    # Clients may use an id twice; the engine would stop the other one too.
    for key in ("k", "other"):
        begin(post, key=key, request_id="twice", stop_words=("lo w",))
    begin(post, key="nameless", request_id="", stop_words=("lo w",))
    stops = {
        key: {step.stop for step in feed(post, byte_level.encode("hello world"), key)}
        for key in ("alone", "k", "nameless")
    }
    assert stops == {"alone": {"", "once"}, "k": {""}, "nameless": {""}}


@pytest.mark.parametrize("says_so", [True, False], ids=["our engine", "an engine that does not say why it ended"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_was_stopped_ends_an_answer_as_cancelled_and_not_by_its_end_token(
    post, begin, byte_level, stream, says_so
):
    """An engine that is stopped sends what an engine sends that has met its end token."""
    begin(post, stream=stream, request_id="mine")
    begin(post, key="other", stream=stream, request_id="another")
    ids = byte_level.encode("xy")
    if stream:
        feed(post, ids)
    if not says_so:
        post.note_stop("mine")
    step = post.extend("k", Tokens(token_ids=() if stream else tuple(ids), is_cancelled=says_so), never)
    assert (step.piece.finish_reason, step.piece.num_output_tokens, step.stop) == ("cancelled", 2, "")
    assert len(post) == 1
    assert post.extend("other", Tokens(token_ids=()), never).piece.finish_reason == "stop"


def test_several_answers_to_a_prompt_end_each_by_itself_and_are_forgotten_together(post, begin, byte_level):
    begin(post, num_return_sequences=3, max_tokens=4)
    a, b, c = byte_level.encode("abc")
    pieces = [post.extend("k", one(token, sequence_index=index), never).piece for index, token in ((2, c), (0, a))]
    assert [(piece.sequence_index, piece.text, piece.num_output_tokens) for piece in pieces] == [
        (2, "c", 1),
        (0, "a", 1),
    ]
    ended = post.extend("k", Tokens(token_ids=(), sequence_index=2), never)
    assert (ended.piece.sequence_index, ended.piece.finish_reason, ended.stop) == (2, "stop", "")
    assert len(post) == 1
    for step in range(4):
        last = post.extend("k", one(b, sequence_index=1), never).piece
        assert (last.sequence_index, last.finish_reason) == (1, "length" if step == 3 else None)
    assert post.extend("k", Tokens(token_ids=(), sequence_index=0), never).piece.finish_reason == "stop"
    assert len(post) == 0


def test_an_engine_is_stopped_when_the_last_of_several_answers_has_ended_in_its_text(post, begin, byte_level):
    begin(post, num_return_sequences=3, stop_words=("lo w",), max_tokens=11)
    ids = byte_level.encode("hello world")
    steps = [post.extend("k", one(token, sequence_index=index), never) for token in ids for index in (0, 1)]
    assert [step.piece.sequence_index for step in steps if step.piece and step.piece.finish_reason == "stop"] == [0, 1]
    assert not any(step.stop for step in steps)
    # The engine writes the first two to their ends, since the third still runs.
    steps = [post.extend("k", one(token, sequence_index=2), never) for token in ids[:-1]]
    assert [step.stop for step in steps].count("k") == 1
    ends = [post.extend("k", Tokens(token_ids=(), sequence_index=index), never) for index in range(3)]
    assert not any(step.piece for step in ends)
    assert len(post) == 0


def test_an_ended_answer_of_several_is_over_when_its_engine_has_sent_all_that_it_may(post, begin, byte_level):
    ids = byte_level.encode("hello world")
    begin(post, num_return_sequences=2, stop_words=("lo w",), max_tokens=len(ids))
    for token in ids:
        post.extend("k", one(token, sequence_index=0), never)
    assert post.extend("k", Tokens(token_ids=(), sequence_index=1), never).piece.finish_reason == "stop"
    assert len(post) == 0


def test_several_answers_whose_client_has_gone_are_all_cancelled(post, begin, byte_level, clock):
    begin(post, num_return_sequences=2)
    clock.seconds += 2 * CANCELLATION_PERIOD_S
    step = post.extend("k", one(byte_level.encode("a")[0], sequence_index=1), lambda: True)
    assert (step.piece.finish_reason, step.piece.sequence_index, step.stop) == ("cancelled", 1, "k")
    ends = [Tokens(token_ids=(), is_cancelled=True, sequence_index=index) for index in (1, 0)]
    steps = [post.extend("k", tokens, never) for tokens in ends]
    assert steps[0].piece is None
    assert (steps[1].piece.finish_reason, steps[1].piece.sequence_index, steps[1].stop) == ("cancelled", 0, "")
    assert len(post) == 0


def test_tokens_of_a_sequence_that_there_is_not_are_an_error_of_the_servers_own(post, begin):
    begin(post, num_return_sequences=2)
    with pytest.raises(RequestError, match="found tokens of sequence 2, expected one below 2") as caught:
        post.extend("k", one(5, sequence_index=2), never)
    assert caught.value.kind == "INTERNAL"


def test_the_prompts_log_probabilities_come_with_the_first_piece(post, begin, byte_level):
    begin(post, return_prompt_log_probs=True)
    a, b = byte_level.encode("ab")
    prompt = {"prompt_token_ids": (7, 8, 9), "prompt_log_probs": (-1.0, -2.0)}
    first = post.extend("k", one(a, **prompt), never).piece
    assert (first.prompt_token_ids, first.prompt_log_probs) == ((7, 8, 9), (-1.0, -2.0))
    assert post.extend("k", one(b), never).piece.prompt_token_ids == ()


def test_a_probe_stops_the_engine_of_a_client_that_has_gone(post, begin, clock):
    begin(post)
    assert post.look("k", never) == ""
    assert post.look("k", lambda: True) == "k"
    assert post.look("of no answer", lambda: True) == "of no answer"
    # An answer that waits for long is no stale one while its engine probes.
    for _ in range(3):
        clock.seconds += LONGEST_SILENCE_S / 2
        post.look("k", never)
    begin(post, key="new")
    assert len(post) == 2


def test_tokens_of_no_answer_are_an_error_of_the_servers_own(post):
    with pytest.raises(RequestError, match="no such answer waits for tokens") as caught:
        post.extend("k", one(5), never)
    assert caught.value.kind == "INTERNAL"


def test_what_an_engine_leaves_behind_is_forgotten_after_a_time(post, begin, clock, byte_level):
    begin(post, key="left", request_id="left")
    clock.seconds += LONGEST_SILENCE_S
    begin(post, key="alive", request_id="alive")
    assert len(post) == 2
    clock.seconds += 1
    feed(post, byte_level.encode("x"), key="alive")
    begin(post, key="new", request_id="new")
    assert len(post) == 2
    with pytest.raises(RequestError, match="it got none for 3600 s"):
        feed(post, byte_level.encode("x"), key="left")


def test_there_are_never_more_answers_than_the_limit_and_the_stalest_goes_first(byte_level, begin, clock):
    post = Postprocessor(byte_level, clock=clock, most_answers=3)
    for number in range(3):
        begin(post, key=str(number), request_id=str(number))
    feed(post, byte_level.encode("x"), key="0")
    begin(post, key="3", request_id="3")
    assert len(post) == 3
    feed(post, byte_level.encode("x"), key="0")
    with pytest.raises(RequestError, match="3 others began since"):
        feed(post, byte_level.encode("x"), key="1")


def test_an_answer_that_cannot_be_written_is_given_up_and_its_engine_stopped(post, begin):
    begin(post, return_log_probs=True)
    with pytest.raises(RequestError, match="gave 0 log-probabilities for 1 tokens"):
        post.extend("k", one(5), never)
    assert [post.abandon("k"), post.abandon("k"), post.abandon("unknown")] == ["k", "", ""]
