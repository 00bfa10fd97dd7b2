"""The bytes of tokens, against what the tokenizers themselves decode."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from export.tokenizer.loading import Tokenizer
from triton_repo.runtime.guided.vocabulary import Vocabulary, token_bytes

TEXTS = ("def main() -> None:", " é", "😀", "日本語の文章", "a b  a", "\x00\x7f", "👩‍👩‍👧")


@pytest.fixture
def metaspace() -> Tokenizer:
    """Llama's other form: a pre-tokenizer that marks spaces and puts one in front, and added words."""
    words = ["<unk>", "▁", "▁a", "a", "b", "é", "▁▁"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["<tool>"])
    return Tokenizer(backend=backend, size=len(words) + 2)


def test_tokens_of_a_text_add_its_bytes(byte_level, byte_fallback):
    for tokenizer in (byte_level, byte_fallback):
        found = token_bytes(tokenizer)
        for text in TEXTS:
            if "\ufffd" not in tokenizer.decode(tokenizer.encode(text)):
                assert b"".join(found[token] for token in tokenizer.encode(text)).decode().strip() == text.strip()


def test_bytes_worked_by_hand(byte_level, byte_fallback, metaspace):
    assert token_bytes(metaspace) == [b"<unk>", b" ", b" a", b"a", b"b", "é".encode(), b"  ", b"", b"<tool>"]
    found = token_bytes(byte_fallback)
    assert found[:2] == [b"<unk>", b""]  # the end token is special, <unk> is not declared so there
    assert found[2:258] == [bytes([byte]) for byte in range(256)]
    assert found[258:] == [b" ", b" a", b"a", b"b", b" b", "é".encode()]
    found = token_bytes(byte_level)
    assert found[byte_level.eos_token_id] == b""
    ids = byte_level.backend.token_to_id
    assert [found[ids(name)] for name in ("Ġ", "Ċ", "Ã", "A")] == [b" ", b"\n", b"\xc3", b"A"]


def test_texts_inside_an_answer_are_spelled_as_the_tokenizer_does(byte_level, metaspace):
    for text in ("hello", " hello", "def main"):
        assert Vocabulary(byte_level).spell(text.encode()) == byte_level.encode(text)
    # Alone it would be spelled with a space in front.
    assert metaspace.encode("ab") == [2, 4]
    assert Vocabulary(metaspace).spell(b"ab") == [3, 4]
    assert Vocabulary(metaspace).spell(b"a\xc3") == [3]  # what no token can write ends it
