"""The frontier: its figures, and the model that llama.cpp gets."""

from __future__ import annotations

import numpy as np
import pytest
from mixtral_checkpoints import write_mixtral_checkpoint

from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError
from export.families import read_model
from frontier.measures import distance, perplexity
from frontier.peers import describe, types_of, write_gguf
from quality import claim, compare, measure, windows_of


def test_the_distance_of_two_distributions_worked_by_hand():
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    found = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], np.float32)) + np.float32(3)
    result = distance(found, expected)
    # KL of the first: 0.5 log 2 + 0.25 log 0.5 = 0.25 log 2; of the second 0
    assert result.kl == pytest.approx(0.125 * np.log(2), rel=1e-6)
    assert result.kl_error == pytest.approx(0.125 * np.log(2) / np.sqrt(2), rel=1e-6)
    assert result.top1 == 0.5


def test_perplexity_leaves_out_the_first_token_of_each_window():
    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], np.float32))
    assert perplexity(logits, [[0, 1, 0], [1]]) == pytest.approx(1 / np.sqrt(0.5 * 0.25))


def test_the_file_for_llama_cpp_has_the_checkpoint_s_weights(tmp_path):
    sizes = {"hidden_size": 64, "ffn_size": 96, "num_heads": 4, "head_dim": 16}
    folder = write_mixtral_checkpoint(tmp_path / "c", seed=1, **sizes)
    model = read_model(open_checkpoint(str(folder)))
    (tmp_path / "gguf").mkdir()
    write_gguf(model, tmp_path / "gguf" / "model.gguf")
    again = read_model(open_checkpoint(str(tmp_path / "gguf" / "model.gguf")))
    assert again.weights.table.keys() == model.weights.table.keys()
    for name in model.weights.table:
        assert (again.weights.load(name) == model.weights.load(name)).all(), name
    assert types_of(tmp_path / "gguf" / "model.gguf").keys() == {"F32"}
    assert describe(tmp_path / "gguf" / "model.gguf", model.architecture).bits_per_weight == 32


def point(name, method, bits, kl):
    return {"name": name, "method": method, "bits": bits, "bytes_per_token": 1000 * bits, "kl": kl}


def test_points_are_compared_with_llama_cpp_s_frontier_at_the_same_bits():
    theirs = [
        point("Q4", "llama.cpp", 4.0, 0.04),
        point("Q5", "llama.cpp", 5.0, 0.05),
        point("Q6", "llama.cpp", 6.0, 0.01),
    ]
    ours = [
        point("q5", "gptq", 5.0, 0.01),
        point("q5", "search", 5.0, 0.01),
        point("q3", "gptq", 3.0, 0.1),
        point("q7", "gptq", 7.0, 0.001),
    ]
    found = compare([*theirs, *ours])
    # Q5 is not on the frontier, since Q4 is smaller and better. Half-way between 0.04 and 0.01 is 0.02.
    assert [(row["name"], row["kept"]) for row in found] == [("q5", True), ("q3", False), ("q7", False)]
    assert found[0]["bits"] == found[0]["bytes_per_token"] == pytest.approx(0.5)
    assert found[1]["bits"] == pytest.approx(2.5)  # compared with Q4, the smallest
    assert found[2]["bits"] is None


def test_each_window_begins_with_the_start_token(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "c", seed=1)
    (tmp_path / "text").write_text("the quick brown fox " * 2000)
    found = windows_of(read_model(open_checkpoint(str(folder))), tmp_path / "text", 1024)
    assert [len(window) for window in found] == [512, 512]
    assert [window[0] for window in found] == [1, 1]
    assert 1 not in [*found[0][1:], *found[1][1:]]
    with pytest.raises(ConfigError, match="asked for 5 tokens, expected 512 or more"):
        windows_of(read_model(open_checkpoint(str(folder))), tmp_path / "text", 5)


def test_a_folder_with_another_model_s_engines_is_refused(tmp_path):
    folders = [write_mixtral_checkpoint(tmp_path / f"c{seed}", seed=seed) for seed in (1, 2)]
    one, other = (read_model(open_checkpoint(str(folder))) for folder in folders)
    for _ in range(2):  # what is there is used again
        claim(tmp_path / "work", one)
    with pytest.raises(ConfigError, match="the engines in .*work were made of another model; name another folder"):
        measure(folders[1], tmp_path, tmp_path / "work", 512, 512)
    (tmp_path / "old" / "int4-search").mkdir(parents=True)
    (tmp_path / "old" / "int4-search" / "engine.json").write_text("{}")
    with pytest.raises(ConfigError, match="made of a model that it does not name"):
        claim(tmp_path / "old", other)
