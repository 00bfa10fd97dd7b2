"""A checkpoint with a SentencePiece model and no tokenizer.json, against sentencepiece's own ids."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from mixtral_checkpoints import write_mixtral_checkpoint

from export.errors import CheckpointError
from export.tokenizer import from_sentencepiece
from export.tokenizer.loading import load_tokenizer
from export.tokenizer.settings import read_settings

pytestmark = pytest.mark.skipif(find_spec("sentencepiece") is None, reason="sentencepiece is not installed")
TEXTS = sorted((Path(__file__).parents[3] / "trt_build" / "comparison" / "texts").glob("*.txt"))
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SETTINGS |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A byte-pair model of Llama's kind, trained on the texts."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("\n".join(path.read_text() for path in TEXTS))
    settings = {
        "input": str(folder / "corpus.txt"), "model_prefix": str(folder / "tokenizer"), "vocab_size": 1000,
        "model_type": "bpe", "byte_fallback": True, "character_coverage": 0.999, "normalization_rule_name": "identity",
        "split_digits": True, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    alone(f"sentencepiece.SentencePieceTrainer.train(**{settings!r})")
    return folder / "tokenizer.model"


def alone(code, module="sentencepiece"):
    """The value of an expression in a process of its own: with torch's libraries loaded sentencepiece may crash."""
    program = f"import json, os, {module}\nprint(json.dumps({code}), flush=True)\nos._exit(0)"
    command = [sys.executable, "-c", program]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def checkpoint(folder, model):
    write_mixtral_checkpoint(folder, seed=1, vocab_size=1000)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    shutil.copy(model, folder / "tokenizer.model")
    return folder


def test_the_ids_are_sentencepieces_own_on_every_text(tmp_path, model):
    folder = checkpoint(tmp_path / "c", model)
    settings = read_settings(folder, {"model_type": "mixtral"})
    (tmp_path / "out").mkdir()
    settings.write(tmp_path / "out")
    written = load_tokenizer(tmp_path / "out")
    assert settings.sizes()["tokenizer.json"] == (tmp_path / "out" / "tokenizer.json").stat().st_size
    texts = [path.read_text() for path in TEXTS]
    expected = alone(f"sentencepiece.SentencePieceProcessor(model_file={str(model)!r}).encode({texts!r})")
    assert len(texts) > 20
    for text, ids in zip(texts, expected, strict=True):
        assert written.encode_prompt(text) == settings.tokenizer.encode_prompt(text) == [1, *ids]


def test_the_ids_are_those_of_transformers_also_where_sentencepiece_has_others(tmp_path, model):
    folder = checkpoint(tmp_path / "c", model)
    settings = read_settings(folder, {"model_type": "mixtral"})
    texts = [" a text that begins with a space", "  two", "", "</s> and <s>", "\n", "naïve café 😀"]
    theirs = f"transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
    expected = alone(f"[*map({theirs}.encode, {texts!r})]", "transformers")
    assert [settings.tokenizer.encode_prompt(text) for text in texts] == expected


def test_a_damaged_model_is_refused(tmp_path, model):
    folder = checkpoint(tmp_path / "c", model)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x07damaged")
    with pytest.raises(CheckpointError, match=r"tokenizer.model cannot be converted \(.*\); put the model's own"):
        read_settings(folder, {"model_type": "mixtral"})


def test_without_the_packages_the_message_has_the_command(tmp_path, model, monkeypatch):
    folder = checkpoint(tmp_path / "c", model)
    monkeypatch.setattr(from_sentencepiece, "find_spec", lambda _name: None)
    with pytest.raises(CheckpointError) as caught:
        read_settings(folder, {"model_type": "mixtral"})
    assert "transformers and sentencepiece, which convert it, are not installed here" in str(caught.value)
    assert "pip install 'moeship[sentencepiece]'" in str(caught.value)
    assert "T.from_pretrained('FOLDER').save_pretrained('FOLDER')" in str(caught.value)


def test_with_neither_file_the_missing_one_is_named(tmp_path, model):
    folder = checkpoint(tmp_path / "c", model)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer.json; save one beside the weights"):
        read_settings(folder, {"model_type": "mixtral"})
