"""What `moeship verify` refuses: one error each, exit status 2, and engine.json as it was. A failure is recorded."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from cli.main import main
from triton_repo.serving.deployment import read_deployment
from trt_build.manifest import digested_text
from trt_build.ort.engine import open_engine


@pytest.fixture
def engine(tmp_path, tiny_engines):
    return shutil.copytree(tiny_engines("fp32"), tmp_path / "engine")


@pytest.fixture
def checkpoint(tmp_path, tiny_checkpoint):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def refused(engine, checkpoint, tmp_path, capsys):
    """Verify, and return the one line of the error."""

    def refused(*words, content="What is it? " * 200):
        (tmp_path / "text").write_text(content)
        before = (engine / "engine.json").read_bytes()
        words = words or ("--tokens", "64")
        status = main(["verify", str(engine), "--reference", str(checkpoint), "--text", str(tmp_path / "text"), *words])
        assert status == 2
        assert (engine / "engine.json").read_bytes() == before
        [line] = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
        return line

    return refused


def test_a_text_shorter_than_a_window_is_refused_with_both_counts(refused):
    told = refused("--tokens", "2048", content="Short. ")
    assert ": the text has " in told
    assert (
        " tokens, expected at least 640, the first window of a measurement of 2048 tokens; pass a longer text" in told
    )


def test_a_short_text_is_told_the_flag_that_measures_all_of_it(refused):
    told = refused("--tokens", "2048", content="What is it? " * 8)
    count = re.search(r"the text has (\d+) tokens", told)[1]
    assert told.endswith(f"; pass a longer text, or --tokens {count}")


def test_a_text_below_the_least_is_not_told_to_ask_for_less_than_the_least(refused):
    told = refused("--tokens", "2048", content="a")
    assert told.endswith("; pass a longer text")


def test_fewer_tokens_than_the_least_are_refused(refused):
    assert "asked for 0 tokens, expected at least 4; ask for more" in refused("--tokens", "0")


def test_help_states_the_least_number_of_tokens(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "tokens to score, 4 or more" in " ".join(capsys.readouterr().out.split())


def test_a_reference_with_another_config_is_refused(refused, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0.5}))
    told = refused()
    assert f"against {checkpoint}: config.json is not what the engine was built from (digest " in told
    assert told.endswith("build the engine again, or name the checkpoint as it was")


def test_a_reference_with_other_sizes_is_another_model(refused, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.5}))
    assert "they are not the same model (" in refused()


def test_a_checkpoint_that_changed_since_the_build_is_refused(refused, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.linear.bias"][3] += 1
    save_file(tensors, checkpoint / "model.safetensors")
    assert "model.safetensors is not what the engine was built from (digest " in refused()


def test_the_tokenizer_of_another_model_is_refused(refused, checkpoint):
    values = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (checkpoint / "tokenizer.json").write_text(json.dumps(values))
    assert "the engine's tokenizer is not the checkpoint's (2 of " in refused()


def test_an_engine_of_another_format_is_refused(refused, engine):
    values = json.loads((engine / "engine.json").read_text())
    values["format_version"] = 99
    del values["digest"]
    (engine / "engine.json").write_text(digested_text(values))
    assert "it has the format version 99, and this moeship reads " in refused()


def test_a_failure_is_recorded_and_keeps_what_passed_before(engine, checkpoint, tmp_path, capsys, caplog, monkeypatch):
    words = ["verify", str(engine), "--reference", str(checkpoint), "--tokens", "64"]
    assert main(["-q", *words]) == 0
    passed = open_engine(engine).manifest.verification
    monkeypatch.setattr("trt_build.comparison.serving_ways.Way.failure", lambda *_: "served wrongly")
    for _ in range(2):
        assert main(words) == 1
    assert [text for text in caplog.messages if "said that" in text] == [
        f"engine.json said that {engine} passed; this failure is written in its place"
    ]
    found = open_engine(engine).manifest.verification
    assert found["failures"][0] == "served wrongly"
    assert found["last_passed"] == passed
    assert main(["doctor", str(engine)]) in (0, 1)
    assert "failed: served wrongly, and 2 more" in capsys.readouterr().out
    repository = tmp_path / "repository"
    assert main(["package", str(engine), "--name", "wrong", "--output", str(repository)]) == 0
    assert f"packaging {engine}: its last verification failed: served wrongly, and 2 more" in caplog.messages
    assert read_deployment(repository).failed == {"wrong": "served wrongly, and 2 more"}
    monkeypatch.undo()
    assert main(["-q", *words]) == 0
    assert "last_passed" not in open_engine(engine).manifest.verification
