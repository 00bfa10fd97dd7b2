"""Facts that several files state, over combinations of files; transformers, on the same folder, says what is right."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
from pathlib import Path

import pytest
from mixtral_checkpoints import write_llama_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig

from export.checkpoint.token_ids import read_token_ids
from export.errors import CheckpointError, ConfigError
from export.tokenizer.loading import load_tokenizer
from export.tokenizer.settings import check_token_ids, read_settings

END_OF_TEXT = "<|endoftext|>"
EXAMPLES = Path(__file__).parents[3] / "examples"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CLASSES = (
    None, "GPT2Tokenizer", "CodeGenTokenizer", "CodeGenTokenizerFast", "GPTNeoXTokenizer", "Qwen2Tokenizer",
    "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend",
)  # fmt: skip
MODEL_TYPES = (
    "phi",
    "phi-msft",
    "mixtral",
    "granitemoe",
    "olmoe",
    "flex_olmo",
    "gpt_oss",
    "qwen2_moe",
    "qwen2",
    "qwen3",
    "phimoe",
    "mistral",
    "llama",
)
TEXTS = (
    "def main()  hello",
    "<s> the</s> fox<|endoftext|>x",
    " naïve <extra> café <|im_start|>user\n",
    "the fox<extra>the",
    "<pad>a <x> b <new>the",
    "日本 ﬁ Å",
    "it'S 1234 we'll\r\n\n  x = [7,8]; \u00e9e\u0301 ",
)
ABSENT = object()


class TwoFormsError(Exception):
    """Two files state a token that the vocabulary lacks with different flags: refused."""


class UnreadableError(Exception):
    """transformers raises a TypeError for the folder."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """tokenizer.json of three kinds: GPT-2's bytes, Llama's with a normalizer, Llama's as transformers 5 writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["def main() -> None: hello the quick brown fox jumps over "] * 3, trainer)
    llama = write_llama_tokenizer(tmp_path_factory.mktemp("llama"))
    metaspace = (EXAMPLES / "tiny-mixtral" / "checkpoint" / "tokenizer.json").read_text()
    return {"bytes": tokenizer.to_str(), "llama": llama.to_str(), "metaspace": metaspace}


def write_files(folder, config, **contents):
    """A folder of JSON files; `tokenizer` is tokenizer.json's text or content, the others' names lack `.json`."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config": config, **contents}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def expect_as_transformers(folder, config):
    """Class, ids, texts, special and added tokens, size and templates, as built and as an engine has them."""
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except TypeError as error:
        raise UnreadableError from error
    try:
        ours = read_settings(folder, config)
    except ConfigError as error:
        raise (TwoFormsError if "in two different ways" in str(error) else AssertionError)(str(error)) from error
    made = folder / "made"
    made.mkdir()
    ours.write(made)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            for tokenizer in (ours.tokenizer, load_tokenizer(made)):
                assert tokenizer.backend.encode(text, add_special_tokens=special).ids == ids, text
                assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    facts, template = ours.facts, theirs.chat_template
    assert facts.tokenizer_class == type(theirs).__name__
    assert facts.special_tokens == theirs.special_tokens_map
    assert {token.id: (token.content, token.special) for token in facts.added_tokens} == {
        index: (token.content, token.special) for index, token in theirs.added_tokens_decoder.items()
    }
    assert ours.tokenizer.size == max(theirs.get_vocab().values()) + 1
    expected = {} if template is None else {"default": template} if isinstance(template, str) else template
    assert facts.chat_templates == expected
    assert facts.model_max_length in (theirs.model_max_length, None)
    return ours


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["bytes", "llama", "metaspace"])
def test_every_class_of_every_family_encodes_as_transformers_does(tmp_path, kinds, kind, model_type, name):
    settings = {"tokenizer_class": name, "eos_token": END_OF_TEXT} if name else {"add_prefix_space": True}
    write_files(tmp_path, {"model_type": model_type}, tokenizer=kinds[kind], tokenizer_config=settings)
    expect_as_transformers(tmp_path, {"model_type": model_type})


@pytest.mark.parametrize("group", range(12))
def test_random_combinations_of_files_give_what_transformers_makes_of_them(tmp_path, kinds, group):
    compared = 0
    for seed in range(10 * group, 10 * group + 10):
        folder = tmp_path / str(seed)
        config = write_random_files(folder, kinds, random.Random(seed))
        with contextlib.suppress(TwoFormsError, UnreadableError):
            expect_as_transformers(folder, config)
            compared += 1
    assert compared >= 7


def write_random_files(folder, kinds, rng):
    """A folder whose files state the same facts in several places, in several forms; returns config.json."""
    tokenizer = json.loads(kinds[rng.choice(sorted(kinds))])
    size = len(tokenizer["model"]["vocab"])
    if rng.random() < 0.3:
        tokenizer["added_tokens"].append({"id": size, "content": "<extra>", "single_word": False, **flags(rng)})
    if rng.random() < 0.2:
        tokenizer["normalizer"] = {"type": "NFC"}
    if rng.random() < 0.2:
        tokenizer["post_processor"] = None
    if rng.random() < 0.1:
        tokenizer["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    config = {"model_type": rng.choice(["phi", "phi-msft", "mixtral"])}
    contents = {"tokenizer": tokenizer}
    if rng.random() < 0.85:
        contents["tokenizer_config"] = random_settings(rng, tokenizer, size)
    if rng.random() < 0.4:
        contents["special_tokens_map"] = {
            key: random_token(rng, legacy=True) for key in ("bos_token", "eos_token", "pad_token") if rng.random() < 0.4
        }
        if rng.random() < 0.2:
            contents["special_tokens_map"]["additional_special_tokens"] = ["<x>", "<|im_start|>"]
    if rng.random() < 0.3:
        contents["added_tokens"] = {"<new>": size + rng.choice([0, 1, 3])}
    write_files(folder, config, **contents)
    if rng.random() < 0.2:
        (folder / "chat_template.jinja").write_text("of the file")
    if rng.random() < 0.1:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("with a name")
    return config


def flags(rng):
    return {name: rng.random() < 0.5 for name in ("lstrip", "rstrip", "normalized", "special")}


def random_token(rng, *, legacy=False):
    text = rng.choice(["<s>", "</s>", END_OF_TEXT, "<extra>", "<new>", "<pad>"])
    if rng.random() < 0.5:
        return text
    return {"content": text, **flags(rng), "single_word": False, **({} if legacy else {"__type": "AddedToken"})}


def random_settings(rng, tokenizer, size):
    maybe = {
        "tokenizer_class": rng.choice(CLASSES[1:]),
        **{key: rng.choice([None, random_token(rng)]) for key in ("bos_token", "eos_token", "unk_token", "pad_token")},
        "add_bos_token": rng.random() < 0.5,
        "add_eos_token": rng.random() < 0.5,
        "add_prefix_space": rng.choice([True, False, None]),
        "legacy": rng.choice([True, False, None]),
        "additional_special_tokens": [rng.choice(["<x>", "<extra>", "<|im_start|>"])],
        "extra_special_tokens": rng.choice([["<x>", "<new>"], {"image_token": "<x>"}, []]),
        "clean_up_tokenization_spaces": rng.random() < 0.5,
        "model_max_length": rng.choice([512, 10**30]),
        "chat_template": rng.choice(["text", [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]]),
    }
    if rng.random() < 0.35:
        listed = {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]
        }
        new = {str(size + rng.choice([0, 1, 5])): {"content": "<new>", "single_word": False, **flags(rng)}}
        maybe["added_tokens_decoder"] = listed | (new if rng.random() < 0.4 else {})
    kept = {key: value for key, value in maybe.items() if key == "added_tokens_decoder" or rng.random() < 0.3}
    return kept | ({"tokenizer_class": maybe["tokenizer_class"]} if rng.random() < 0.7 else {})


IDS = (ABSENT, None, 7, [7, 9], [], 0)


@pytest.mark.parametrize("of_generation", [None, *IDS])
@pytest.mark.parametrize("of_config", IDS)
def test_end_begin_and_pad_ids_are_those_that_generate_uses(tmp_path, of_config, of_generation):
    """The other file is asked where transformers is left without an id; [] is none."""
    config = {} if of_config is ABSENT else {"eos_token_id": of_config}
    single = of_config if isinstance(of_config, int) else 3
    config |= {"bos_token_id": single, "pad_token_id": single + 1}
    write_files(tmp_path, config)
    if of_generation is not None or of_generation is ABSENT:
        stated = {} if of_generation is ABSENT else {"eos_token_id": of_generation}
        write_files(tmp_path, config, generation_config={**stated, "bos_token_id": 5})
    try:
        theirs = GenerationConfig.from_pretrained(tmp_path)
    except OSError:  # as GenerationMixin.adjust_generation_fn does
        theirs = GenerationConfig.from_pretrained(tmp_path, config_file_name="config.json", _from_model_config=True)
    ours = read_token_ids(tmp_path, config)
    expected = theirs.eos_token_id or config.get("eos_token_id") if theirs.eos_token_id != 0 else 0
    expected = [] if expected is None else expected
    assert list(ours.eos) == (expected if isinstance(expected, list) else [expected])
    assert ours.bos == theirs.bos_token_id
    assert ours.pad == (config["pad_token_id"] if theirs.pad_token_id is None else theirs.pad_token_id)


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["2", 1.5, True, -2, [1, None], {"a": 1}])
def test_what_is_no_token_id_is_refused_with_its_file(tmp_path, name, key, value):
    config = {key: value} if name == "config" else {}
    write_files(tmp_path, config, **({} if name == "config" else {name: {key: value}}))
    with pytest.raises(ConfigError, match=rf"reading {name}\.json: {key} is .*, expected a token id"):
        read_token_ids(tmp_path, config)


def test_an_end_token_that_stands_for_no_text_is_refused(tmp_path, kinds):
    config = {"model_type": "phi", "eos_token_id": [1, 304]}
    settings = read_settings(write_files(tmp_path, config, tokenizer=kinds["bytes"]), config)
    check_token_ids(read_settings(tmp_path, config | {"eos_token_id": [1, 298]}), 400)
    with pytest.raises(ConfigError, match=r"holds 304, and the tokenizer has ids below 299 alone; .* never chosen"):
        check_token_ids(settings, 400)
    with pytest.raises(ConfigError, match=r"holds 304, expected token ids below 302; correct it in generation_config"):
        check_token_ids(settings, 302)


def test_no_end_token_in_any_file_is_told_and_built(tmp_path, kinds, caplog):
    config = {"model_type": "mixtral"}
    settings = read_settings(write_files(tmp_path, config, tokenizer=kinds["llama"]), config)
    with caplog.at_level(logging.WARNING):
        check_token_ids(settings, 400)
    assert settings.ids.eos == ()
    assert "no file names one, so every answer runs to its limit" in caplog.text


def test_the_tokenizers_end_token_is_taken_where_neither_file_of_the_model_names_one(tmp_path, kinds):
    config = {"model_type": "mixtral"}
    write_files(tmp_path, config, tokenizer=kinds["llama"], generation_config={"eos_token_id": None})
    write_files(tmp_path, config, special_tokens_map={"eos_token": {"content": "</s>", "lstrip": False}})
    assert read_settings(tmp_path, config).ids.eos == (2,)


@pytest.mark.parametrize(
    ("name", "content"),
    [*itertools.product(FILES, [b"[1]", b"{", b"\xff\xfe", b'"text"']), ("chat_template.jinja", b"\xff\xfe")],
)
def test_a_file_that_is_damaged_is_refused_by_name(tmp_path, kinds, name, content):
    write_files(tmp_path, {}, tokenizer=kinds["bytes"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        read_settings(tmp_path, {})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "holds tokenizer_class 'T5Tokenizer'; .* set tokenizer_class to PreTr"),
        ({"tokenizer_class": 3}, "holds tokenizer_class 3, expected the name of a class"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "names code for its tokenizer .*, which is never executed"),
        ({"split_special_tokens": True}, "sets split_special_tokens, which is not supported"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "keep tokenizer.json alone and remove the key"),
        ({"init_inputs": [1]}, "holds init_inputs, which are not supported"),
        ({"bos_token": 1}, "holds bos_token 1, expected a token's text, or an object with its content"),
        ({"extra_special_tokens": "x"}, "holds extra_special_tokens 'x', expected a list of tokens"),
        ({"added_tokens_decoder": {"a": {}}}, "holds added_tokens_decoder .*, expected tokens by their ids"),
        ({"chat_template": 3}, "chat_template in tokenizer_config.json is 3, expected a text"),
        ({"chat_template": [{"name": "a"}]}, "expected a text, or a list of objects with name and template"),
        (
            {"clean_up_tokenization_spaces": True,
             "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True},
            "transformers removes spaces from what the model writes",
        ),
    ],
)  # fmt: skip
def test_what_would_be_tokenised_otherwise_is_refused_by_name(tmp_path, kinds, settings, text):
    write_files(tmp_path, {}, tokenizer=kinds["bytes"], tokenizer_config=settings)
    with pytest.raises(ConfigError, match=text):
        read_settings(tmp_path, {"model_type": "phi"})


def test_a_template_that_is_no_template_is_refused_for_its_size(tmp_path, kinds):
    write_files(tmp_path, {}, tokenizer=kinds["bytes"])
    (tmp_path / "chat_template.jinja").write_text("x" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="has 1048577 bytes, expected at most 1048576"):
        read_settings(tmp_path, {})


def test_a_flag_that_has_no_effect_is_told(tmp_path, kinds, caplog):
    write_files(tmp_path, {}, tokenizer=kinds["llama"], tokenizer_config={"add_bos_token": False})
    with caplog.at_level(logging.WARNING):
        facts = read_settings(tmp_path, {"model_type": "mixtral"}).facts
    assert (facts.begins_with, facts.ends_with) == ((1,), ())
    assert "add_bos_token of tokenizer_config.json is False, and tokenizer.json puts [1] there" in caplog.text


def test_a_tokenizer_that_says_everything_already_is_copied_byte_for_byte(tmp_path):
    for example in ("tiny-mixtral/checkpoint", "tiny-phixtral/experts/code"):
        folder = EXAMPLES / example
        settings = read_settings(folder, json.loads((folder / "config.json").read_text()))
        target = tmp_path / folder.name
        target.mkdir()
        settings.write(target)
        assert settings.tokenizer_json is None
        assert (target / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert settings.sizes() == {path.name: path.stat().st_size for path in target.iterdir()}
