"""Tokenizers of Llama's kind: start tokens, marked spaces and bytes, from the prompt to the streamed text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mixtral_checkpoints import write_llama_tokenizer
from transformers import PreTrainedTokenizerFast

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.piece import join
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from triton_repo.runtime.text.detokenizer import Detokenizer, last_text_token
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.session import Session

EXAMPLE = Path(__file__).parents[4] / "examples" / "tiny-mixtral" / "checkpoint"
PROMPTS = (
    "the quick brown fox",
    "def main(",
    "naïve 日本 😀",
    " leads with a space",
    "ends with one ",
    "日本語😀",
    "\n\n",
)
# Of every kind: words with and without a space before, bytes that make characters and bytes that do not.
ANSWERS = (" jumps over", "jumps", "😀 and 日本", " ", "\n", "  two  spaces ", "é")


@pytest.fixture(scope="module", params=["normalizer", "metaspace"])
def tokenizer(request, tmp_path_factory):
    """As Llama 2's and Mixtral's files have it, and as transformers 5 writes it."""
    if request.param == "metaspace":
        return load_tokenizer(EXAMPLE)
    folder = tmp_path_factory.mktemp("tokenizer")
    write_llama_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "fp32"
    return Session(build_engine(BuildOptions(checkpoint=str(EXAMPLE), output=folder, precision="fp32")))


def pieces_of(tokenizer, prompt_ids, ids):
    detokenizer = Detokenizer(tokenizer, last_text_token(tokenizer, prompt_ids))
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_encoded_as_transformers_does(tokenizer, prompt):
    outside = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    assert tokenizer.encode_prompt(prompt) == outside(prompt)["input_ids"]
    assert tokenizer.encode_prompt(prompt)[0] == 1


def test_a_start_token_that_the_prompt_writes_is_not_doubled(tokenizer):
    ids = tokenizer.encode_prompt("<s>fox")
    assert ids == tokenizer.encode("<s>fox")
    assert ids.count(1) == 1


def test_a_tokenizer_that_adds_nothing_keeps_repeated_tokens(byte_level):
    assert byte_level.encode_prompt("aaaa") == byte_level.encode("aaaa")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_goes_on_where_the_prompt_ends(tokenizer, prompt, answer):
    whole, prompt_ids = tokenizer.encode_prompt(prompt + answer), tokenizer.encode_prompt(prompt)
    if whole[: len(prompt_ids)] != prompt_ids:  # a piece spans the seam: what follows the shared tokens is the answer
        shared = next(i for i, (a, b) in enumerate(zip(whole, prompt_ids, strict=False)) if a != b)
        prompt_ids = whole[:shared]
    text = "".join(pieces_of(tokenizer, prompt_ids, whole[len(prompt_ids) :]))
    assert (prompt + answer).endswith(text)
    assert text == tokenizer.decode(whole)[len(tokenizer.decode(prompt_ids)) :]


def test_an_answer_keeps_the_space_that_parts_it_from_the_prompt(tokenizer):
    prompt_ids, ids = tokenizer.encode_prompt("the"), tokenizer.encode("dog")
    assert tokenizer.decode(ids) == "dog"  # by itself it loses the space
    assert "".join(pieces_of(tokenizer, prompt_ids, ids)) == " dog"
    assert "".join(pieces_of(tokenizer, [1], ids)) == "dog"  # nothing to be parted from


def test_a_wrong_byte_after_a_prompt_of_bytes_spoils_none_of_the_prompts_characters(tokenizer):
    prompt_ids = tokenizer.encode_prompt("日本")
    byte = tokenizer.backend.token_to_id("<0xFF>")
    assert "".join(pieces_of(tokenizer, prompt_ids, [byte, *tokenizer.encode("dog")])) == "\ufffd dog"


def test_random_tokens_after_random_prompts_join_to_the_decoding_of_both(tokenizer):
    rng = np.random.default_rng(5)
    for size in (1, 2, 15, 16, 17, 60):
        for _ in range(20):
            prompt_ids = tokenizer.encode_prompt("the dog " + "日本 fox " * int(rng.integers(1, 9)))
            ids = rng.integers(3, tokenizer.size, size).tolist()
            whole = tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
            assert "".join(pieces_of(tokenizer, prompt_ids, ids)) == whole


def test_generated_pieces_join_to_the_text_that_follows_the_prompt(session):
    tokenizer = load_tokenizer(EXAMPLE)
    for prompt in ("def main(", "Return the", "naïve café"):
        answer = list(generate(session, tokenizer, GenerationOptions(prompt=prompt, max_tokens=40)))
        whole, prompt_ids = join(answer), tokenizer.encode_prompt(prompt)
        assert whole.num_input_tokens == len(prompt_ids)
        ids = [token for token in whole.token_ids if token not in (1, 2)]
        assert tokenizer.decode(prompt_ids) + whole.text == tokenizer.decode(prompt_ids + ids)
        assert len(answer) > 5
