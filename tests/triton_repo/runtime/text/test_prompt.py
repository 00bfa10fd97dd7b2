"""Prompts of any length: refused by their bytes or their beginning, and never one that fits; the rest encoded whole."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers
from wire_tensors import wire

from export.tokenizer.loading import Tokenizer
from triton_repo.errors import RequestError
from triton_repo.runtime.options import GenerationOptions, plan_generation
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.text import prompt
from triton_repo.runtime.text.prompt import PromptTooLongError, encode_prompt, most_bytes

CORPUS = ["def main() -> None:\n    print('hello')\n" * 3, "the quick brown fox jumps over the lazy dog " * 3]
ALPHABETS = ("ab ", "a", " ", "\n", "\u212b\u0390x", "😀é語", "\x00\t\r", "<|end|>", "e\u0301 ", "hello world ")


def trained(model, trainer, pre_tokenizer=None, normalizer=None) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend=backend, size=backend.get_vocab_size())


def byte_trainer():
    return trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def kinds() -> dict[str, Tokenizer]:
    """Tokenizers with and without a bound on a token's bytes."""
    whitespace = {"show_progress": False, "special_tokens": ["[UNK]"]}
    return {
        "byte-level": trained(models.BPE(), byte_trainer(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "NFC": trained(models.BPE(), byte_trainer(), pre_tokenizers.ByteLevel(), normalizers.NFC()),
        "word pieces": trained(
            models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=80, **whitespace),
            pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(),
        ),
        "words": trained(
            models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**whitespace),
            pre_tokenizers.WhitespaceSplit(),
        ),
        "unigrams": trained(
            models.Unigram(), trainers.UnigramTrainer(vocab_size=60, unk_token="[UNK]", **whitespace),
            pre_tokenizers.Metaspace(),
        ),
    }  # fmt: skip


def texts(seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    yield from ("a", "def main(" * 3000)
    for _ in range(40):
        parts = [draw.choice(ALPHABETS) for _ in range(draw.randint(1, 3))]
        yield "".join(part * draw.choice((1, 3, 40, 900, 5000)) for part in parts)
    for _ in range(25):
        yield "".join(draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 9000)))


@pytest.mark.parametrize("name", ["byte-level", "NFC", "word pieces", "words", "unigrams", "byte_fallback"])
@pytest.mark.parametrize("most_tokens", [3, 60, 700])
def test_a_prompt_that_fits_is_never_refused_and_encodes_as_the_whole(kinds, byte_fallback, name, most_tokens):
    tokenizer = kinds.get(name, byte_fallback)
    fitting = refused = 0
    for text in texts(most_tokens):
        whole = tokenizer.encode_prompt(text)
        try:
            found = encode_prompt(tokenizer, text, most_tokens)
        except PromptTooLongError:
            assert len(whole) > most_tokens
            refused += 1
            continue
        assert found == whole
        fitting += len(whole) <= most_tokens
    assert fitting
    assert refused


def test_the_bound_in_bytes_is_met_by_the_longest_token_alone(kinds):
    tokenizer = kinds["byte-level"]
    longest = max(tokenizer.backend.get_vocab(), key=len)
    assert tokenizer.most_bytes_per_token == len(longest)
    assert most_bytes(tokenizer, 50) == 50 * len(longest)
    assert kinds["words"].most_bytes_per_token is None


class CountingBackend:
    """Counts the characters that are encoded."""

    def __init__(self, backend):
        self._backend = backend
        self.count = 0

    def encode(self, text, **options):
        self.count += len(text)
        return self._backend.encode(text, **options)

    def __getattr__(self, name):
        return getattr(self._backend, name)


@pytest.mark.parametrize("name", ["byte-level", "word pieces", "unigrams"])
@pytest.mark.parametrize("letter", ["a", "def ", "q-"])
def test_what_is_refused_is_not_encoded_whole(kinds, name, letter):
    counted = CountingBackend(kinds[name].backend)
    tokenizer = Tokenizer(backend=counted, size=1)
    text = (letter * 15_000_000)[:15_000_000] if name != "word pieces" else ((letter * 9)[:9] + " ") * 1_500_000
    with pytest.raises(PromptTooLongError):
        encode_prompt(tokenizer, text, 64)
    assert counted.count < 200_000


def test_the_refusal_says_the_bytes_found_and_what_is_possible(kinds):
    tokenizer = kinds["byte-level"]
    most = 63 * tokenizer.most_bytes_per_token
    message = f"text_input: found a prompt of {3 * most} bytes, expected at most {most}, since a longer one cannot fit"
    for text in ("é" * most + "a" * most, "a" * 3 * most):
        with pytest.raises(RequestError, match=message):
            plan_generation(GenerationOptions(prompt=text, max_tokens=1), tokenizer, max_sequence=64, end_token_ids=())
        with pytest.raises(RequestError, match=message):
            read_options(wire(text_input=text, max_tokens=1), most)


def test_a_prompt_without_a_bound_is_read_up_to_a_fixed_size(kinds, monkeypatch):
    monkeypatch.setattr(prompt, "MOST_BYTES", 5000)
    assert encode_prompt(kinds["words"], " " * 4900 + "fox", 3) == kinds["words"].encode_prompt("fox")
    with pytest.raises(PromptTooLongError, match="found a prompt of 5001 bytes, expected at most 5000"):
        encode_prompt(kinds["words"], " " * 5001, 3)


def test_half_a_surrogate_pair_is_refused(kinds):
    for fields in ({"prompt": "a\ud800"}, {"prompt": "a", "stop_words": ("\udfff",)}):
        with pytest.raises(RequestError, match="found half a surrogate pair at character"):
            plan_generation(
                GenerationOptions(max_tokens=1, **fields), kinds["byte-level"], max_sequence=64, end_token_ids=()
            )
