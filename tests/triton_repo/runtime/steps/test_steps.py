"""The three steps of an ensemble one after the other, without Triton, against the model without steps."""

from __future__ import annotations

import pytest
from wire_tensors import wire

from triton_repo.contracts.ensemble import ADDED_ENGINE_NAMES, ADDED_TOKEN_NAMES, ENGINE_NAMES, QUERY_NAMES, TOKEN_NAMES
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.contracts.piece import Piece, join
from triton_repo.runtime import answer as answer_module
from triton_repo.runtime.batching.alone import answered
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.options import plan_generation
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.single.generation import text_request
from triton_repo.runtime.steps.postprocessing import Postprocessor, read_tokens
from triton_repo.runtime.steps.preprocessing import Preprocessor
from triton_repo.runtime.steps.token_engine import token_request
from triton_repo.runtime.steps.token_request import read_token_request
from triton_repo.runtime.text.detokenizer import Detokenizer

TEXTS = (
    "return hello", "smile 😀 and 😀😁 again", "日本語の文章", "cafe\u0301 nai\u0308ve Ångström", "👩‍👩‍👧 🏳️‍🌈",
    "  a b \n\t b", "é",
)  # fmt: skip
REGEX = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "(return|é|1) [0-9]{3}2?(é|😀)"}
OPTIONS = (
    {},
    {"stream": True},
    {"stream": True, "return_log_probs": True},
    {"return_log_probs": True},
    {"stream": True, "stop_words": ["b", "文章", "😁", "ll"]},
    {"stop_words": ["nai", "\n", " and "]},
    {"stream": True, "max_tokens": 3},
    {"max_tokens": 4, "exclude_input_in_output": False, "stream": True},
    {"stream": True, "end_id": -1, "max_tokens": 12, "temperature": 1.0, "seed": 3, "top_k": 40},
    {"min_tokens": 4, "repetition_penalty": 1.3, "stream": True},
    {"stream": True, "num_log_probs": 3},
    {"num_log_probs": 20, "return_log_probs": True, "stop_words": ["ll"]},
    {"num_log_probs": 1, "max_tokens": 3},
    {"logit_bias_ids": [3, 70], "logit_bias_values": [-2.5, 900.0], "max_tokens": 3, "stream": True},
    {"embedding_bias_words": ["re", "", "b"], "embedding_bias_weights": [-40.0, 1.0, 30.0], "stream": True},
    {"stream": True, "min_p": 0.3, "temperature": 9.0, "seed": 8, "max_tokens": 9, "end_id": -1},
    {"stream": True, "return_prompt_log_probs": True},
    {"return_prompt_log_probs": True, "max_tokens": 1},
    {"stream": True, "num_return_sequences": 3, "top_p": 1.0, "temperature": 9.0, "seed": 8, "max_tokens": 9},
    {"num_return_sequences": 2, "return_prompt_log_probs": True, "num_log_probs": 2},
    {**REGEX, "stream": True},
    {**REGEX, "return_log_probs": True, "num_log_probs": 2},
    {**REGEX, "stream": True, "return_log_probs": True, "max_tokens": 3},
    {**REGEX, "stop_words": ["2"], "num_return_sequences": 2, "top_p": 1.0, "temperature": 9.0, "seed": 8},
    {**REGEX, "end_id": -1},
    {"guided_decoding_guide_type": "json", "stream": True, "top_p": 1.0, "temperature": 9.0, "seed": 4},
    {"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": 'root ::= [a-c]+ "!"?', "min_tokens": 9},
)


def single(session, tokenizer, values) -> list[Piece]:
    """What the model without steps would send if each piece were sent before the next one is written."""
    options = read_options(wire(**values))
    ends = session.engine.manifest.eos_token_ids
    plan = plan_generation(options, tokenizer, max_sequence=session.max_sequence, end_token_ids=ends)
    sent = answered(session, lambda outlet: text_request(plan, tokenizer, outlet, joined=not options.stream))
    return [piece for piece, _ in sent]


def in_steps(session, tokenizer, values) -> list[Piece]:
    """What an ensemble of the same engine would send."""
    parameters = TextParameters(
        max_sequence=session.max_sequence, max_prompt=session.max_sequence - 1,
        end_ids=session.engine.manifest.eos_token_ids, num_ids=tokenizer.size,
    )  # fmt: skip
    preprocessor = Preprocessor(tokenizer, parameters)
    postprocessor = Postprocessor(tokenizer)
    prepared = preprocessor.prepare({QUERY_NAMES[name]: tensor for name, tensor in wire(**values).items()})
    postprocessor.register("k", "r", prepared["ANSWER"][0, 0].decode())
    names = ENGINE_NAMES | ADDED_ENGINE_NAMES
    tensors = {names[name]: tensor for name, tensor in prepared.items() if name in names}
    manifest = session.engine.manifest
    request = read_token_request(tensors, session.max_sequence, tokenizer.size, manifest.eos_token_ids)
    pieces, stopped = [], []

    names = TOKEN_NAMES | ADDED_TOKEN_NAMES

    def is_stopped() -> bool:
        return bool(stopped)

    def make(outlet):
        options = request.plan.options
        guide = Guides(tokenizer).of(options.guided_decoding_guide_type, options.guided_decoding_guide)
        return token_request(request, tokenizer.size, outlet, guide=guide)

    for response, _ in answered(session, make, is_stopped):
        tokens = read_tokens({names[name]: array for name, array in response.items() if name in names})
        step = postprocessor.extend("k", tokens, lambda: False)
        pieces += [step.piece] if step.piece else []
        stopped += [step.stop] if step.stop else []
    assert len(postprocessor) == 0
    return pieces


@pytest.mark.parametrize("layout", [single, in_steps])
@pytest.mark.parametrize("end", [1, 2], ids=["second", "third"])
def test_the_least_number_of_tokens_keeps_every_end_token_away(scripted_with, byte_level, layout, end):
    """An engine knows one end token; the model's others reach it as stop words (NVIDIA/TensorRT-LLM#4776)."""
    ids = [*byte_level.encode("ab"), byte_level.eos_token_id]
    end_ids = (byte_level.eos_token_id, *byte_level.encode("q~"))

    def answer(**values):
        session = scripted_with(byte_level, "ab")
        # After two tokens the script says one of the further end tokens for ever.
        session.script = [*ids[:2], end_ids[end]]
        session.engine.manifest.eos_token_ids = end_ids
        return join(layout(session, byte_level, {"text_input": "def a ", "max_tokens": 9, "stream": True, **values}))

    assert answer().token_ids == (*ids[:2], end_ids[end])
    late = answer(min_tokens=6)
    assert len(late.token_ids) == 7
    assert not set(end_ids) & set(late.token_ids[:6])
    assert (late.token_ids[-1], late.finish_reason) == (end_ids[end], "stop")
    # A stop word ends an answer at any time, though it be one token.
    assert answer(min_tokens=6, stop_words=["b"]).text == "a"


def in_order(pieces) -> list[Piece]:
    """The pieces of one sequence after those of the other: a sequence whose guide is late sits out a step."""
    return sorted(pieces, key=lambda piece: piece.sequence_index)


def without_log_probs(pieces):
    return [(piece.text, piece.token_ids, piece.finish_reason, piece.num_output_tokens) for piece in pieces]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_steps_send_the_pieces_of_a_model_without_steps(request, scripted_with, name, options):
    tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        values = {"text_input": "def a ", "max_tokens": 60, **options}
        expected = in_order(single(scripted_with(tokenizer, text), tokenizer, values))
        found = in_order(in_steps(scripted_with(tokenizer, text), tokenizer, values))
        assert without_log_probs(found) == without_log_probs(expected)
        assert {piece.num_input_tokens for piece in found} == {expected[0].num_input_tokens}
        for ours, theirs in zip(found, expected, strict=True):
            assert [[token for token, _ in top] for top in ours.top_log_probs] == [
                [token for token, _ in top] for top in theirs.top_log_probs
            ]
            assert len(ours.top_log_probs) == (len(ours.token_ids) if "num_log_probs" in options else 0)
            values = [[value for top in piece.top_log_probs for _, value in top] for piece in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-6)
            assert ours.sequence_index == theirs.sequence_index
            assert ours.prompt_token_ids == theirs.prompt_token_ids
            assert ours.prompt_log_probs == pytest.approx(theirs.prompt_log_probs, rel=1e-5, abs=1e-6)
            wanted = {"num_log_probs", "return_prompt_log_probs"} <= set(options)
            assert len(ours.prompt_top_log_probs) == (len(ours.prompt_log_probs) if wanted else 0)
            assert [[token for token, _ in top] for top in ours.prompt_top_log_probs] == [
                [token for token, _ in top] for top in theirs.prompt_top_log_probs
            ]
            assert ours.log_probs == (theirs.log_probs and pytest.approx(theirs.log_probs, rel=1e-5, abs=1e-6))
            assert ours.cum_log_prob == (theirs.cum_log_prob and pytest.approx(theirs.cum_log_prob, rel=1e-5))


class DeltaDetokenizer(Detokenizer):
    """The fault to be seen: each token decoded alone."""

    def push(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_decoding_each_token_alone_would_break_characters_and_be_seen(request, scripted_with, name, monkeypatch):
    tokenizer = request.getfixturevalue(name)
    values = {"text_input": "def a ", "max_tokens": 60, "stream": True}
    expected = [single(scripted_with(tokenizer, text), tokenizer, values) for text in TEXTS]
    monkeypatch.setattr(answer_module, "Detokenizer", DeltaDetokenizer)
    found = [in_steps(scripted_with(tokenizer, text), tokenizer, values) for text in TEXTS]
    broken = ["".join(piece.text for piece in pieces) for pieces in found]
    assert sum("\ufffd" in text for text in broken) >= 4
    assert without_log_probs(found[1]) != without_log_probs(expected[1])
