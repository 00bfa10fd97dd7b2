"""How much text a token can stand for: parts that keep all of a text give a bound, parts that drop or fuse none."""

from __future__ import annotations

import sys
import unicodedata

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from export.tokenizer.token_lengths import NORMAL_FORMS, most_bytes_per_token

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(*, pre_tokenizer=None, normalizer=None, alphabet=ALPHABET, extra=("Ġhello",)) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*alphabet, *extra])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def sentencepiece(normalizer=None, missing=(), **settings) -> tokenizers.Tokenizer:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte not in missing), "▁", "a", "é", "▁▁▁▁"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    defaults = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], **{**defaults, **settings}))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizer or normalizers.Sequence(steps)
    return made


def test_bytes_written_as_characters_are_counted_as_bytes():
    assert most_bytes_per_token(byte_level()) == 6
    split = pre_tokenizers.Split(Regex(r"\s+"), behavior="isolated")
    llama3 = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert most_bytes_per_token(byte_level(pre_tokenizer=llama3)) == 6


def test_an_added_token_counts_with_its_text():
    made = byte_level()
    made.add_special_tokens(["<|endoftext|>"])
    assert most_bytes_per_token(made) == 13


def test_tokens_with_a_marked_space_are_counted_in_utf8():
    assert most_bytes_per_token(sentencepiece()) == 12


def test_a_normal_form_may_shorten_a_text_by_its_factor():
    assert most_bytes_per_token(byte_level(normalizer=normalizers.NFC())) == 6 * 4


def removing_added_token() -> tokenizers.Tokenizer:
    made = byte_level()
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return made


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(byte_level(alphabet=ALPHABET[:-1]), id="a byte is missing and dropped"),
        pytest.param(sentencepiece(byte_fallback=False), id="unknown characters fuse"),
        pytest.param(sentencepiece(missing={200}), id="a byte is missing, so that characters fuse"),
        pytest.param(sentencepiece(byte_fallback=False, unk_token=None, fuse_unk=False), id="unknown are dropped"),
        pytest.param(sentencepiece(normalizers.Strip()), id="white space is stripped"),
        pytest.param(sentencepiece(normalizers.Replace(Regex(" +"), " ")), id="runs of spaces fuse"),
        pytest.param(sentencepiece(normalizers.Replace("  ", " ")), id="two spaces become one"),
        pytest.param(sentencepiece(normalizers.Lowercase()), id="small letters may be shorter"),
        pytest.param(byte_level(pre_tokenizer=pre_tokenizers.WhitespaceSplit()), id="white space is dropped"),
        pytest.param(
            byte_level(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(" ", behavior="removed"), pre_tokenizers.ByteLevel()]
                )
            ),
            id="a split drops",
        ),
        pytest.param(removing_added_token(), id="an added token takes the white space before it"),
        pytest.param(tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), id="words become one"),
        pytest.param(tokenizers.Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)), id="unigrams fuse unknown ones"),
    ],
)
def test_where_text_is_dropped_or_fused_there_is_no_bound(made):
    assert most_bytes_per_token(made) is None


@pytest.mark.parametrize(("form", "whole"), [("NFC", "NFD"), ("NFD", "NFD"), ("NFKD", "NFKD"), ("NFKC", "NFKD")])
def test_no_text_is_shortened_more_by_a_normal_form_than_its_factor_says(form, whole):
    """Each character of a normal form is made of characters that decompose to what it decomposes to. The bytes of each
    are shared out over what it decomposes to, and the dearest share of each counts."""
    letters = [chr(point) for point in range(sys.maxunicode + 1) if unicodedata.decomposition(chr(point))]
    letters += map(chr, range(0xAC00, 0xD7A4))  # Hangul, which decomposes by rule
    parts = {letter: unicodedata.normalize(whole, letter) for letter in letters}
    share = {part: float(len(part.encode())) for decomposed in parts.values() for part in decomposed}
    for letter, decomposed in parts.items():
        for part in decomposed:
            share[part] = max(share[part], len(letter.encode()) / len(decomposed))
    made_of = {letter: decomposed for letter, decomposed in parts.items() if form.endswith("C")}
    made_of |= {part: part for part in share}
    worst = max(sum(share[part] for part in parts) / len(letter.encode()) for letter, parts in made_of.items())
    assert NORMAL_FORMS[form] - 1 < worst <= NORMAL_FORMS[form]
