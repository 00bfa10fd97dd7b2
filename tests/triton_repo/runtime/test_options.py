"""Reading requests: what is accepted, and that every refusal says what was found and what is expected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from wire_tensors import wire

from triton_repo.contracts.wire import INPUTS
from triton_repo.errors import RequestError
from triton_repo.runtime.options import (
    MAX_WORD_BYTES,
    MAX_WORD_BYTES_IN_ALL,
    MAX_WORDS,
    GenerationOptions,
    plan_generation,
)
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.text.prompt import MOST_BYTES


def refusal(**values) -> str:
    with pytest.raises(RequestError) as caught:
        read_options(wire(**values))
    assert caught.value.kind == "INVALID_ARG"
    return str(caught.value)


def plan_refusal(tokenizer, max_sequence=64, **fields) -> str:
    with pytest.raises(RequestError) as caught:
        plan_generation(
            GenerationOptions(**{"prompt": "def", "max_tokens": 4, **fields}), tokenizer,
            max_sequence=max_sequence, end_token_ids=(0,),
        )  # fmt: skip
    return str(caught.value)


def biases(ids, values):
    return {"logit_bias_ids": list(ids), "logit_bias_values": list(values)}


def test_every_tensor_of_the_contract_is_read():
    options = read_options(
        wire(
            text_input="déf", max_tokens=7, stream=True, temperature=0.7, top_k=40, top_p=0.9, min_length=2,
            repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.25, random_seed=2**64 - 1,
            stop_words=["a", "ü"], bad_words=["b"], end_id=3, pad_id=9, beam_width=1, return_log_probs=True,
            exclude_input_in_output=False, min_tokens=2, seed=2**64 - 1, num_return_sequences=3, length_penalty=2.0,
            min_p=0.1, num_log_probs=4, return_prompt_log_probs=True, embedding_bias_words=["a", ""],
            embedding_bias_weights=[0.7, 1.0], **biases([5, 0], [-0.3, 1000.0]),
            return_num_input_tokens=True, return_num_output_tokens=False, return_routed_experts=True,
        )
    )  # fmt: skip
    assert options == GenerationOptions(
        prompt="déf", max_tokens=7, stream=True, temperature=0.7, top_k=40, top_p=0.9, min_length=2,
        repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.25, random_seed=2**64 - 1,
        stop_words=("a", "ü"), bad_words=("b",), end_id=3, return_log_probs=True, exclude_input_in_output=False,
        min_p=0.1, num_log_probs=4, return_prompt_log_probs=True, num_return_sequences=3,
        logit_bias=((5, -0.3), (0, 1000.0)), embedding_bias=(("a", 0.7), ("", 1.0)), return_routed_experts=True,
    )  # fmt: skip


def test_the_required_tensors_alone_give_the_defaults():
    options = read_options(wire(text_input="x", max_tokens=1))
    assert options == GenerationOptions(prompt="x", max_tokens=1)
    assert options.exclude_input_in_output
    assert not options.stream


def test_the_older_names_of_seed_and_min_tokens_are_synonyms():
    options = read_options(wire(text_input="x", max_tokens=1, seed=5, min_tokens=1))
    assert (options.random_seed, options.min_length) == (5, 1)
    assert read_options(wire(text_input="x", max_tokens=1, random_seed=5, min_length=1)) == options
    text = refusal(text_input="x", max_tokens=1, seed=5, random_seed=6)
    assert "random_seed: found 6, but seed says 5; send one of the two" in text


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.0, "top_k": 5}, 0.0),
        ({"temperature": 0.5}, 0.0),
        ({"temperature": 0.5, "top_p": 1.0}, 0.5),
        ({"temperature": 0.5, "top_k": 1}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"top_p": 0.0}, 0.0),
        ({"top_p": 1.0, "top_k": 0}, 1.0),
        ({"min_p": 0.1}, 1.0),
        ({"min_p": 0.0, "temperature": 0.5}, 0.0),
        ({"min_p": 0.1, "top_k": 1}, 0.0),
    ],
)
def test_the_temperature_in_force_is_greedy_unless_something_leaves_a_choice(given, temperature):
    assert read_options(wire(text_input="x", max_tokens=1, **given)).sampling_temperature == temperature


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_input": ""}, "text_input: found '', expected at least one character; send a prompt in text_input"),
        ({"max_tokens": 0}, "max_tokens: found 0, expected 1 or more"),
        ({"max_tokens": -3}, "max_tokens: found -3, expected 1 or more"),
        ({"temperature": float("nan")}, "temperature: found nan, expected 0, or 0.001 to 1000"),
        ({"temperature": -0.3}, "temperature: found -0.3, expected 0, or 0.001"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"top_p": 1.5}, "top_p: found 1.5, expected 0 <= top_p <= 1"),
        ({"top_p": -0.1}, "top_p: found -0.1"),
        ({"top_p": float("nan")}, "top_p: found nan"),
        ({"top_k": -1}, "top_k: found -1, expected 0 or more"),
        ({"min_length": -1}, "min_tokens: found -1, expected 0 or more"),
        ({"min_tokens": -1}, "min_tokens: found -1, expected 0 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: found 0.0, expected 0.001 to 1000"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty: found 1e-38, expected 0.001 to 1000"),
        ({"temperature": 1e-30}, "temperature: found 1e-30, expected 0, or 0.001 to 1000"),
        ({"presence_penalty": float("nan")}, "presence_penalty: found nan, expected -1000 to 1000"),
        ({"frequency_penalty": -3e38}, "frequency_penalty: found -3e+38, expected -1000 to 1000"),
        ({"return_context_logits": True}, "return_context_logits: found true, expected false"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty: found inf, expected -1000 to 1000"),
        ({"beam_width": 2}, "beam_width: found 2, expected 1"),
        ({"num_return_sequences": 17}, "num_return_sequences: found 17, expected 1 to 16"),
        ({"num_return_sequences": 0}, "num_return_sequences: found 0, expected 1 to 16"),
        ({"min_p": -0.1}, "min_p: found -0.1, expected 0 <= min_p <= 1"),
        ({"min_p": 1.01}, "min_p: found 1.01, expected 0 <= min_p <= 1"),
        ({"min_p": float("nan")}, "min_p: found nan, expected 0 <= min_p <= 1"),
        ({"num_log_probs": 21}, "num_log_probs: found 21, expected 0 to 20"),
        ({"num_log_probs": -1}, "num_log_probs: found -1, expected 0 to 20"),
        (
            biases([5], [1.0, 2.0]),
            "logit_bias_ids: found 1 values and 2 in logit_bias_values, expected the same number",
        ),
        ({"logit_bias_ids": [5]}, "logit_bias_ids: found 1 values and 0 in logit_bias_values"),
        ({"logit_bias_values": [5.0]}, "logit_bias_ids: found 0 values and 1 in logit_bias_values"),
        (biases([-1], [1.0]), "logit_bias_ids: found -1, expected token ids from 0 on"),
        (biases([5, 6, 5], [1.0, 2.0, 3.0]), "logit_bias_ids: found 5 more than once, expected each id once"),
        (biases([5], [float("nan")]), "logit_bias_values: found nan, expected -1000 to 1000"),
        (biases([5], [-float("inf")]), "logit_bias_values: found -inf, expected -1000 to 1000"),
        (biases([5], [1001.0]), "logit_bias_values: found 1001.0, expected -1000 to 1000"),
        (biases(range(1025), [1.0] * 1025), "logit_bias_ids: found 1025 values, expected at most 1024"),
        ({"embedding_bias_words": ["a"]}, "embedding_bias_words: found 1 values and 0 in embedding_bias_weights"),
        (
            {"embedding_bias_words": ["é" * 513], "embedding_bias_weights": [1.0]},
            "embedding_bias_words: found a word of 1026 bytes, expected at most 1024",
        ),
        (
            {"embedding_bias_words": ["a"], "embedding_bias_weights": [float("inf")]},
            "embedding_bias_weights: found inf, expected -1000 to 1000",
        ),
        ({"stop_words": [b"\xe6\x97"]}, "stop_words: found bytes that are not UTF-8 (byte 0 is 0xe6)"),
        ({"text_input": ["a", "b"]}, "text_input: found 2 values, expected 1"),
    ],
)
def test_a_refused_value_is_named_with_what_was_found_and_expected(given, message):
    assert message in refusal(**{"text_input": "x", "max_tokens": 4, **given})


def test_empty_words_mean_no_words_as_in_nvidias_examples():
    options = read_options(wire(text_input="x", max_tokens=1, stop_words=[""], bad_words=[""]))
    assert (options.stop_words, options.bad_words) == ((), ())
    assert read_options(wire(text_input="x", max_tokens=1, stop_words=["", "a", ""])).stop_words == ("a",)


def test_all_problems_are_reported_together():
    text = refusal(text_input="", max_tokens=0, temperature=-1.0, beam_width=2, top_p=2.0, stop_words=[b"\xff"])
    for name in ("text_input", "max_tokens", "temperature", "beam_width", "top_p", "stop_words"):
        assert f"- {name}: found" in text


def test_an_absent_required_tensor_is_named():
    text = refusal(stream=True)
    assert "text_input: absent, and it is required; send the prompt, UTF-8" in text
    assert "max_tokens: absent" in text


def test_a_batch_is_refused_with_its_size():
    tensors = {"text_input": np.array([[b"a"], [b"b"], [b"c"]], dtype=object), "max_tokens": np.ones((3, 1), np.int32)}
    with pytest.raises(
        RequestError, match=r"text_input: found a batch of 3, expected shape \[1, 1\]; send one request"
    ):
        read_options(tensors)


def test_a_prompt_that_leaves_no_room_is_refused_and_never_cut(byte_level):
    text = "x" * 64
    size = len(byte_level.encode(text))
    message = plan_refusal(byte_level, max_sequence=size, prompt=text)
    assert f"found a prompt of {size} tokens, expected at most {size - 1}" in message
    assert f"share a context of {size}; shorten it" in message


def test_max_tokens_beyond_the_context_is_cut_to_the_room_left(byte_level):
    options = GenerationOptions(prompt="x" * 10, max_tokens=100)
    size = len(byte_level.encode(options.prompt))
    plan = plan_generation(options, byte_level, max_sequence=size + 1, end_token_ids=(0,))
    assert plan.most_tokens == 1


def test_the_end_id_replaces_the_models_own_and_must_exist(byte_level):
    def end_ids(end_id):
        options = GenerationOptions(prompt="x", max_tokens=1, end_id=end_id)
        return plan_generation(options, byte_level, max_sequence=9, end_token_ids=(0, 5)).end_ids

    assert end_ids(None) == (0, 5)
    assert end_ids(7) == (7,)
    assert end_ids(-1) == ()
    size = byte_level.size
    assert f"end_id: found {size}, expected a token id below {size}, or -1 for none" in plan_refusal(
        byte_level, end_id=size
    )
    assert "end_id: found -2" in plan_refusal(byte_level, end_id=-2)


def test_biased_ids_must_exist_and_words_become_the_biases_of_their_tokens(byte_level):
    size = byte_level.size
    message = plan_refusal(byte_level, logit_bias=((size, 1.0),))
    assert f"logit_bias_ids: found {size}, expected token ids below {size}" in message
    assert "logit_bias_values: found nan" in plan_refusal(byte_level, logit_bias=((1, float("nan")),))
    a, b = byte_level.encode("ab")
    options = GenerationOptions(
        prompt="x", max_tokens=1, logit_bias=((a, 1.0),), embedding_bias=(("ab", 0.5), ("", 3.0), ("b", 2.0))
    )
    plan = plan_generation(options, byte_level, max_sequence=9, end_token_ids=())
    assert (plan.options.logit_bias, plan.options.embedding_bias) == (((a, 1.5), (b, 2.5)), ())


def test_values_of_in_process_callers_are_checked_too(byte_level):
    assert "max_tokens: found 0" in plan_refusal(byte_level, max_tokens=0)
    assert "seed: found -1, expected 0 to 2**64-1" in plan_refusal(byte_level, random_seed=-1)


@pytest.mark.parametrize("name", ["stop_words", "bad_words"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x"] * (MAX_WORDS + 1), "found 1025 words, expected at most 1024; send fewer"),
        ([""] * 5000, "found 5000 words, expected at most 1024; send fewer"),
        (["é" * 513], "found a word of 1026 bytes, expected at most 1024 each; send a part of it"),
        (["x" * 150_000], "found a word of 150000 bytes, expected at most 1024 each"),
        (["x" * 1024] * 33, "found 33792 bytes, expected at most 32768 in all words; send fewer"),
    ],
)
def test_words_are_bounded_in_number_and_bytes(byte_level, name, words, message):
    assert f"{name}: {message}" in refusal(text_input="x", max_tokens=1, **{name: words})
    if all(words):
        assert f"{name}: {message}" in plan_refusal(byte_level, **{name: tuple(words)})


def test_as_many_and_as_long_words_as_there_may_be_are_taken(byte_level):
    for words in (["x" * 32] * MAX_WORDS, ["x" * MAX_WORD_BYTES] * (MAX_WORD_BYTES_IN_ALL // MAX_WORD_BYTES)):
        options = read_options(wire(text_input="x", max_tokens=1, stop_words=words, bad_words=words))
        assert len(options.stop_words) == len(options.bad_words) == len(words)
        plan_generation(options, byte_level, max_sequence=64, end_token_ids=())


def test_the_docs_say_the_bounds_and_every_difference_that_people_meet():
    text = (Path(__file__).parents[3] / "docs" / "wire.md").read_text(encoding="utf-8")
    bounds = f"{MAX_WORDS:,} words each, of {MAX_WORD_BYTES:,} bytes, {MAX_WORD_BYTES_IN_ALL:,} bytes in all"
    assert bounds in text
    assert f"with {MOST_BYTES >> 20} MiB" in text
    for name in ("seed", "min_tokens", "stop_words", "bad_words", "exclude_input_in_output", "top_k"):
        assert f"| `{name}`" in text
        assert next(tensor for tensor in INPUTS if tensor.name == name).differs
