"""Tokenizers of GGUF files: those that transformers makes of the same metadata, on texts of many kinds."""

from __future__ import annotations

import json

import gguf
import pytest
from gguf_files import write_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from export.checkpoint.folder import open_checkpoint
from export.errors import MoeshipError
from export.families import read_model
from export.tokenizer.from_gguf import _SPLITS, merges_of
from export.tokenizer.surplus import model_settings
from trt_build.comparison.evaluation_text import own_text
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine

TEXT = own_text().content
TEXTS = [
    *(TEXT[start : start + 400] for start in range(0, len(TEXT), 400)),
    "", " ", "a", "  two  spaces ", "a\tb\r\n\n c", "naïve 😀 北京 привет", "1234567 12.5", "it's I'LL we've",
    "<s>text</s>", "<|begin|> hello <|mark|>world", "\u00a0\u200b", "x" * 300,
]  # fmt: skip
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = (int(kind) for kind in list(gguf.TokenType)[:6])


def sentencepiece(**more):
    """The metadata of a vocabulary of pieces: byte tokens, and scores by which the best merge comes first."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.train_from_iterator(TEXT.split("\n"), trainers.BpeTrainer(vocab_size=1200, special_tokens=special))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    tokens, kinds = [*tokens, "<|mark|>"], [*kinds, USER]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def byte_level(pre, **more):
    """The metadata of a byte-level vocabulary whose text is split as `pre` says (None: not said)."""
    split = _SPLITS[pre or "default"]
    tokenizer = Tokenizer(models.BPE())
    pieces = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT.split("\n"), trainers.BpeTrainer(vocab_size=1200, initial_alphabet=sorted(alphabet))
    )
    stored = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    merges = [" ".join(merge) for merge in stored["merges"]]
    added = ["<|endoftext|>", "<|begin|>", "<|mark|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": [*tokens, *added],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [*[NORMAL] * len(tokens), CONTROL, CONTROL, USER],
        "tokenizer.ggml.bos_token_id": len(tokens) + 1,
        "tokenizer.ggml.eos_token_id": len(tokens),
        **more,
    }


def written(path, metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    return write_file(path, tensors={"token_embd.weight": (len(tokens), 32)}, vocab_size=len(tokens), **metadata)


def ours(path):
    return model_settings(read_model(open_checkpoint(path)))


CASES = {
    "llama": lambda: sentencepiece(),
    "llama without a begin token": lambda: sentencepiece(**{"tokenizer.ggml.add_bos_token": False}),
    "gpt2": lambda: byte_level(None),
    "phi-2": lambda: byte_level("phi-2"),
    "llama-bpe": lambda: byte_level("llama-bpe", **{"tokenizer.ggml.add_bos_token": True}),
    "tekken": lambda: byte_level("tekken", **{"tokenizer.ggml.add_bos_token": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_texts_are_those_of_transformers_conversion(tmp_path, name):
    path = written(tmp_path / "model.gguf", CASES[name]())
    found = ours(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert found.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert list(found.tokenizer.backend.encode(text).ids) == theirs.encode(text), text
        ids = found.tokenizer.encode(text)
        assert found.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert found.facts.special_tokens["eos_token"] == theirs.eos_token
    assert found.facts.special_tokens["bos_token"] == theirs.bos_token


def test_a_vocabulary_that_puts_no_space_before_a_text_says_so(tmp_path):
    """transformers' conversion leaves this out; llama.cpp does not."""
    path = written(tmp_path / "model.gguf", sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    tokenizer = ours(path).tokenizer
    with_space = ours(written(tmp_path / "with.gguf", sentencepiece())).tokenizer
    assert tokenizer.encode(" the text") == with_space.encode("the text")
    assert tokenizer.encode("the text") != with_space.encode("the text")
    assert tokenizer.decode(tokenizer.encode(" the text")) == " the text"


def test_words_of_llama_3s_vocabulary_win_over_merges(tmp_path):
    """As llama.cpp and the published tokenizer.json have it: a word that no merge makes is one token."""
    metadata = byte_level("llama-bpe")
    metadata["tokenizer.ggml.tokens"][-4] = "zqxj"
    metadata["tokenizer.ggml.merges"].pop()
    tokenizer = ours(written(tmp_path / "model.gguf", metadata)).tokenizer
    assert tokenizer.encode("zqxj") == [len(metadata["tokenizer.ggml.tokens"]) - 4]


def test_rows_that_pad_the_embedding_are_no_tokens(tmp_path):
    metadata = byte_level(None)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [UNUSED, UNUSED]
    path = written(tmp_path / "model.gguf", metadata)
    assert ours(path).tokenizer.size == size
    assert read_model(open_checkpoint(path)).architecture.vocab_size == size + 2


def test_merges_of_pieces_are_those_worked_by_hand():
    """abc can be a + bc and ab + c; of equal scores the longer left part comes first."""
    tokens, scores = ["a", "b", "c", "ab", "bc", "abc"], [0.0, 0.0, 0.0, -1.0, -1.0, -0.5]
    assert merges_of(tokens, scores) == [("ab", "c"), ("a", "bc"), ("a", "b"), ("b", "c")]


def test_an_engine_of_a_gguf_file_alone_has_its_tokenizer_and_its_chat_template(tmp_path):
    path = written(tmp_path / "model.gguf", sentencepiece(**{"tokenizer.chat_template": "{{ messages }}"}))
    options = BuildOptions(checkpoint=str(path), output=tmp_path / "engine", precision="fp32")
    manifest = open_engine(build_engine(options).folder).manifest
    assert manifest.tokenizer.chat_templates == {"default": "{{ messages }}"}
    assert manifest.tokenizer.begins_with == (1,)
    assert manifest.eos_token_ids == (2,)
    stored = Tokenizer.from_file(str(tmp_path / "engine" / "tokenizer.json"))
    assert stored.encode(TEXTS[3]).ids == list(ours(path).tokenizer.backend.encode(TEXTS[3]).ids)


def test_a_tokenizer_beside_a_gguf_file_is_the_one_that_is_taken(tmp_path):
    path = written(tmp_path / "model.gguf", sentencepiece())
    other = Tokenizer(models.BPE(vocab={"q": 0}, merges=[]))
    other.save(str(tmp_path / "tokenizer.json"))
    assert ours(path).tokenizer.size == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "its kind is 'rwkv', moeship makes llama and gpt2; put the original"),
        ({"tokenizer.ggml.model": None}, "its kind is None, moeship makes llama and gpt2; put the original"),
        ({"tokenizer.ggml.scores": None}, "its metadata have no tokenizer.ggml.scores, or not as many as tokens"),
        ({"tokenizer.ggml.scores": [0.5]}, "its metadata have no tokenizer.ggml.scores, or not as many as tokens"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "it has the merge 'a b c', which makes no token of two"),
        ({"tokenizer.ggml.merges": ["<s> zzzz"]}, "it has the merge '<s> zzzz', which makes no token of two"),
        ({"tokenizer.ggml.bos_token_id": 5000}, "tokenizer.ggml.bos_token_id is 5000, expected a number below"),
        ({"tokenizer.ggml.add_bos_token": 3}, "tokenizer.ggml.add_bos_token is 3, expected true or false"),
    ],
)
def test_metadata_of_which_no_tokenizer_can_be_made_are_refused(tmp_path, changes, said):
    with pytest.raises(MoeshipError) as caught:
        ours(written(tmp_path / "model.gguf", sentencepiece(**changes)))
    assert said in str(caught.value)


def test_a_way_to_split_text_that_is_not_known_is_refused_by_name(tmp_path):
    metadata = byte_level(None, **{"tokenizer.ggml.pre": "starcoder"})
    with pytest.raises(MoeshipError, match="tokenizer.ggml.pre is 'starcoder', and moeship knows how to split text"):
        ours(written(tmp_path / "model.gguf", metadata))
