"""The tokenizer is part of the model: verify refuses an engine whose tokenizer is not the checkpoint's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint
from conftest import EXAMPLES, QUANTIZABLE

from cli.main import main
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine


def edited(source, folder, name, edit) -> Path:
    """A copy of a checkpoint in which `edit` changed the values of one JSON file."""
    shutil.copytree(source, folder)
    values = json.loads((folder / name).read_text())
    edit(values)
    (folder / name).write_text(json.dumps(values))
    return folder


def permute(values) -> None:
    """The same texts, each under another id; the added tokens keep theirs."""
    vocab, added = values["model"]["vocab"], {token["content"] for token in values["added_tokens"]}
    texts = [text for text in vocab if text not in added]
    ids = np.random.default_rng(0).permutation([vocab[text] for text in texts]).tolist()
    vocab.update(zip(texts, ids, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_another_tokenizer_of_the_same_size_is_wrong_input(tmp_path, tiny_checkpoint, tiny_engines, capsys, precision):
    other = edited(tiny_checkpoint, tmp_path / "other", "tokenizer.json", permute)
    before = (tiny_engines(precision) / "engine.json").read_bytes()
    words = ["-q", "verify", str(tiny_engines(precision)), "--reference", str(other), "--tokens", "64"]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "the engine's tokenizer is not the checkpoint's (" in message
    assert "of 257 ids stand for another text, first id " in message
    assert (tiny_engines(precision) / "engine.json").read_bytes() == before  # no result of an earlier text is replaced


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("tokenizer_config.json", "add_prefix_space", True, "(pre_tokenizer of tokenizer.json is {'"),
        ("config.json", "eos_token_id", 5, "not the same model (eos_token_ids: engine (256,), checkpoint (5,))"),
        ("tokenizer_config.json", "bos_token", "!", "(added_tokens of tokenizer.json is [{'"),
    ],
)
def test_the_difference_is_named(tmp_path, tiny_checkpoint, tiny_engines, capsys, name, key, value, message):
    other = edited(tiny_checkpoint, tmp_path / "other", name, lambda values: values.update({key: value}))
    assert main(["-q", "verify", str(tiny_engines("fp32")), "--reference", str(other), "--tokens", "64"]) == 2
    assert message in capsys.readouterr().err


def test_an_end_token_that_the_tokenizer_alone_names_is_the_checkpoints(tmp_path, capsys):
    source = write_phi_checkpoint(tmp_path / "source", seed=3, **QUANTIZABLE)
    silent = edited(source, tmp_path / "silent", "config.json", lambda values: values.pop("eos_token_id", None))
    build_engine(BuildOptions(checkpoint=str(silent), output=tmp_path / "engine", precision="fp32"))
    words = ["-q", "verify", str(tmp_path / "engine"), "--reference", str(silent), "--tokens", "64"]
    assert main(words) == 0, capsys.readouterr().err


def test_a_reference_that_is_worse_than_guessing_is_a_finding_and_no_failure(tmp_path, capsys):
    """The engine was built with the wrong tokenizer, so the two agree; only the perplexity tells."""
    source = EXAMPLES / "tiny-phixtral" / "experts" / "code"
    wrong = edited(source, tmp_path / "wrong", "tokenizer.json", permute)
    found = {}
    for name, checkpoint in (("right", source), ("wrong", wrong)):
        engine = tmp_path / f"{name}-engine"
        build_engine(BuildOptions(checkpoint=str(checkpoint), output=engine, precision="fp32"))
        words = ["-q", "verify", str(engine), "--reference", str(checkpoint), "--tokens", "256"]
        assert main([*words, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
        assert main(words) == 0
        assert ("finding: " in capsys.readouterr().out) == (name == "wrong")
        assert open_engine(engine).manifest.verification["findings"] == found[name]["findings"]
    assert found["right"]["findings"] == []
    [finding] = found["wrong"]["findings"]
    assert "worse than guessing among the " in finding
    assert found["wrong"]["failures"] == []
