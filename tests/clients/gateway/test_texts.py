"""Where a model's tokenizer and template are found, and which bytes its tokens stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_triton import echoed_prompt
from serve_command import wait_until

from clients.gateway.api.answers import answer_offsets, prompt_offsets, token_text
from clients.gateway.texts import find_folder, read_texts
from export.errors import ConfigError
from triton_repo.packaging.package import ENSEMBLE, SINGLE, PackageOptions, package_engine

EXAMPLES = Path(__file__).parents[3] / "examples"
TEXTS = ("def main():\n\treturn 1", "naïve café — 你好 😀🚀", "  two  spaces ")


@pytest.mark.parametrize("layout", [SINGLE, ENSEMBLE])
def test_the_tokenizer_of_a_package_is_its_engines(tmp_path, tiny_engine, layout):
    package_engine(PackageOptions(engine=tiny_engine, name="tiny", output=tmp_path / "repository", layout=layout))
    folder = find_folder(tmp_path / "repository", "tiny")
    assert (folder / "engine.json").is_file()
    texts = read_texts(folder)
    manifest = json.loads((tiny_engine / "engine.json").read_text())
    assert (texts.context, texts.special_tokens) == (manifest["max_sequence"], manifest["tokenizer"]["special_tokens"])
    assert find_folder(tmp_path, "tiny") is None


def test_the_tokenizer_is_that_of_the_version_which_triton_serves(tmp_path, tiny_engine):
    """Triton serves the version of the highest number, and passes over names that begin with 0."""
    for version in ("1", "9", "10", "011", "new"):
        (tmp_path / "tiny" / version / "engine").mkdir(parents=True)
    assert find_folder(tmp_path, "tiny") == tmp_path / "tiny/10/engine"
    (tmp_path / "tiny/11").mkdir()
    assert find_folder(tmp_path, "tiny") == tmp_path / "tiny/10/engine"
    (tmp_path / "tiny[1]/1/engine").mkdir(parents=True)
    assert find_folder(tmp_path, "tiny[1]") == tmp_path / "tiny[1]/1/engine"


def test_a_model_that_was_replaced_has_its_own_tokenizer_and_template(gateway_of, server, tmp_path, tiny_engine):
    """The package is replaced as `package` does it, by rename, while Triton and gateway go on."""
    server.answer, folder = echoed_prompt, tmp_path / "model"
    shutil.copytree(tiny_engine, folder)
    template = tmp_path / "model.jinja"
    template.write_text("one {{ messages[0]['content'] }}")
    gateway = gateway_of(tokenizers={"": folder}, chat_template=template)
    messages = [{"role": "user", "content": "hi"}]

    def chat() -> str:
        answer = gateway.client().chat.completions.create(model="phixtral", messages=messages)
        return answer.choices[0].message.content

    def context() -> int | None:
        return gateway.client().models.list().data[0].max_model_len

    assert (chat(), context()) == ("one hi", 640)
    manifest = json.loads((folder / "engine.json").read_text())
    shutil.copytree(folder, tmp_path / "next")
    (tmp_path / "next" / "engine.json").unlink()
    (tmp_path / "next" / "engine.json").write_text(json.dumps({**manifest, "max_sequence": 320}))
    folder.rename(tmp_path / "old")
    (tmp_path / "next").rename(folder)
    template.write_text("two {{ messages[0]['content'] }}")
    assert wait_until(lambda: (chat(), context()) == ("two hi", 320))


def test_a_model_that_was_replaced_has_its_own_inputs(gateway, server):
    """Whether experts can be asked for is asked again."""

    def told() -> bool:
        return gateway.client().models.list().data[0].moeship["return_routed_experts"]

    assert told()
    server.more_inputs = ()
    assert wait_until(lambda: not told())


def test_the_bytes_of_byte_level_tokens_are_those_of_the_text(trained_phixtral):
    texts = read_texts(trained_phixtral)
    for text in TEXTS:
        ids = texts.tokenizer.encode(text)
        assert b"".join(map(texts.token_bytes, ids)).decode() == text
    assert texts.token_bytes(texts.tokenizer.backend.token_to_id("<|endoftext|>")) == b"<|endoftext|>"
    assert texts.token_bytes(10**6) == b""
    assert not texts.adds_tokens


def test_the_bytes_of_sentencepiece_tokens_are_those_of_the_text():
    texts = read_texts(EXAMPLES / "tiny-mixtral/checkpoint")
    for text in TEXTS:
        found = b"".join(map(texts.token_bytes, texts.tokenizer.encode(text))).decode()
        assert found in (text, f" {text}")  # Llama's puts a space before a text
    assert texts.adds_tokens


@pytest.mark.parametrize("example", ["phixtral", "mixtral"])
def test_tokens_begin_where_the_text_has_them(trained_phixtral, example):
    """Characters of several tokens, a begin token, the space that SentencePiece puts before a text, and an end token
    in an answer: none of them may move what follows."""
    texts = read_texts(trained_phixtral if example == "phixtral" else EXAMPLES / "tiny-mixtral/checkpoint")
    for text in (*TEXTS, "def f(x):"):
        ids = texts.tokenizer.encode_prompt(text)
        offsets, end = prompt_offsets(texts, ids, text)
        assert end == len(text)
        for token, offset in zip(ids, offsets, strict=True):
            whole = token_text(texts, token)
            if token not in texts.special and not whole.startswith("bytes:"):
                assert text[offset:].startswith((whole, whole.removeprefix(" "))), (token, whole, offset)
        spelt = texts.tokenizer.encode("é x")
        found, behind = answer_offsets(texts, [min(texts.special), *spelt], end)
        shown = b"".join(map(texts.token_bytes, spelt)).decode()
        assert (found[:2], behind) == ([end, end], end + len(shown))
        assert found[-1] == behind - len(token_text(texts, spelt[-1]))
    assert answer_offsets(texts, [], 7) == ([], 7)


def test_a_template_that_is_no_text_is_refused(tmp_path, tiny_engine):
    manifest = json.loads((tiny_engine / "engine.json").read_text())
    manifest["tokenizer"]["chat_templates"] = {"default": 1}
    (tmp_path / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="that are no texts"):
        read_texts(tmp_path)
