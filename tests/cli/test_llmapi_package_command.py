"""`moeship package --backend llmapi`: its flags, its result, and flags of the other kind of package."""

from __future__ import annotations

import json

import pytest
import yaml
from mixtral_checkpoints import write_mixtral_checkpoint

from cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_mixtral_checkpoint(tmp_path_factory.mktemp("package") / "mixtral", seed=5, num_experts=4)


def words(source, tmp_path, *more: str) -> list[str]:
    return ["package", str(source), "--name", "m", "--output", str(tmp_path / "repository"), *more]


def test_the_flags_become_model_yaml(checkpoint, tmp_path, capsys):
    flags = ["--tp-size", "2", "--moe-ep-size", "2", "--max-seq-len", "64", "--kv-cache-free-gpu-mem-fraction", "0.5"]
    flags += ["--cancellation-check-period-ms", "50", "--max-batch-size", "0", "--copy", "--json"]
    assert main(words(checkpoint, tmp_path, "--backend", "llmapi", *flags)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["copied_bytes"] == result["engine_bytes"] > 0
    settings = yaml.safe_load((tmp_path / "repository" / "m" / "1" / "model.yaml").read_text())
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "moe_tensor_parallel_size", "moe_expert_parallel_size")
    assert [settings[name] for name in sizes] == [2, 1, 1, 2]
    assert (settings["max_seq_len"], settings["kv_cache_config"]) == (64, {"free_gpu_memory_fraction": 0.5})
    assert settings["triton_config"]["cancellation_check_period_ms"] == 50
    assert settings["triton_config"]["max_batch_size"] == 0


def test_the_result_names_the_checkpoint(checkpoint, tmp_path, capsys):
    assert main(words(checkpoint, tmp_path, "--backend", "llmapi")) == 0
    assert "MB of checkpoint, linked, not copied" in capsys.readouterr().out


def test_flags_of_engines_are_refused_for_a_checkpoint(checkpoint, tmp_path, capsys):
    flags = ["--layout", "ensemble", "--slots", "2", "--gpu-device-ids", "0,1"]
    assert main(words(checkpoint, tmp_path, "--backend", "llmapi", *flags)) == 2
    errors = capsys.readouterr().err
    for flag in ("--layout", "--slots", "--gpu-device-ids"):
        assert f"{flag} is for engines; leave it out" in errors
    assert "--copy" not in errors


def test_flags_of_the_llm_api_are_refused_for_an_engine(tiny_engine, tmp_path, capsys):
    assert main(words(tiny_engine, tmp_path, "--tp-size", "2", "--max-seq-len", "9")) == 2
    assert "--tp-size, --max-seq-len is for --backend llmapi; an engine was built" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


def test_an_engine_is_no_checkpoint(tiny_engine, tmp_path, capsys):
    assert main(words(tiny_engine, tmp_path, "--backend", "llmapi")) == 2
    assert "Error: " in capsys.readouterr().err
