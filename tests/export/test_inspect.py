"""`moeship inspect`: figures against counts made with the safetensors library."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.inspection import describe


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "mixture"
    return write_phixtral_checkpoint(folder, seed=3, num_experts=5, experts_per_token=2, dtype="float16")


def inspect_json(capsys, *words):
    assert main(["inspect", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expert_parameters(tensors):
    return sum(values.size for name, values in tensors.items() if ".moe.mlp.0." in name)


def test_json_of_a_mixture_counts_what_the_file_holds(mixture, capsys):
    tensors = load_file(mixture / "model.safetensors")
    values = inspect_json(capsys, mixture)
    total = sum(values.size for values in tensors.values())
    assert values["family"] == "phixtral"
    assert values["total_parameters"] == total
    assert values["active_parameters"] == total - 3 * expert_parameters(tensors)
    assert values["num_tensors"] == len(tensors)
    assert values["num_bytes"] == 2 * total == sum(role["num_bytes"] for role in values["roles"].values())
    assert values["dtype_bytes"] == {"F16": 2 * total}
    assert values["shard_bytes"] == {"model.safetensors": (mixture / "model.safetensors").stat().st_size}
    assert values["architecture"]["num_experts"] == 5
    assert values["roles"]["router"]["num_parameters"] == 3 * 5 * 40
    assert values["roles"]["embedding"]["num_parameters"] == 263 * 40


def test_gates_are_diagnosed_from_the_stored_values(mixture, capsys):
    layers = inspect_json(capsys, mixture)["routing"]["layers"]
    tensors = load_file(mixture / "model.safetensors")
    for index, layer in enumerate(layers):
        gate = tensors[f"transformer.h.{index}.moe.gate.weight"].astype(np.float64)
        assert layer["condition_number"] == pytest.approx(np.linalg.cond(gate))
        assert layer["duplicate_groups"] == []


@pytest.mark.parametrize(("experts_per_token", "dead"), [(1, [1, 2, 3, 4]), (2, [2, 3, 4]), (5, [])])
def test_experts_per_token_can_be_replaced(mixture, tmp_path, capsys, experts_per_token, dead):
    tensors = load_file(mixture / "model.safetensors")
    for name in tensors:
        if name.endswith("gate.weight"):
            tensors[name] = np.repeat(tensors[name][:1], 5, axis=0)
    (tmp_path / "config.json").write_bytes((mixture / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    values = inspect_json(capsys, tmp_path, "--experts-per-token", experts_per_token)
    assert values["architecture"]["experts_per_token"] == experts_per_token
    assert values["routing"]["never_chosen"] == dead
    assert values["routing"]["layers"][0]["condition_number"] is None
    dropped = (5 - experts_per_token) * expert_parameters(tensors)
    assert values["active_parameters"] == values["total_parameters"] - dropped
    assert len(values["warnings"]) == 1


@pytest.mark.parametrize("spelling", ["transformers", "phi-msft"])
def test_a_dense_model_has_no_routing_and_all_parameters_active(tmp_path, capsys, spelling):
    folder = write_phi_checkpoint(tmp_path / "dense", seed=1, spelling=spelling)
    total = sum(values.size for values in load_file(folder / "model.safetensors").values())
    values = inspect_json(capsys, folder)
    assert values["family"] == "phi"
    assert values["routing"] is None
    assert values["active_parameters"] == values["total_parameters"] == total
    assert values["roles"]["ffn"]["num_parameters"] == 3 * 2 * 40 * 56


def test_text_says_the_same_in_the_fields_words(mixture, capsys):
    assert main(["inspect", str(mixture)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    total = sum(values.size for values in load_file(mixture / "model.safetensors").values())
    for line in (
        "family phixtral", "layers 3", "hidden size 40", "heads 5 of size 8, 5 key/value", "ffn size 56 of one expert",
        "vocabulary 263", "experts 5, 2 per token", f"parameters {total:,}", "equal rows none", "near-equal pairs 0",
        "never chosen none proved", f"stored as F16 {2 * total / 1000:.2f} kB",
    ):  # fmt: skip
        assert line in lines, lines


def test_text_is_plain_ascii_when_piped_in_a_bare_locale(mixture):
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "inspect", str(mixture)],
        capture_output=True, env={"LC_ALL": "C", "PATH": ""}, check=True,
    )  # fmt: skip
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_only_headers_and_gates_are_read(mixture, monkeypatch):
    checkpoint = open_checkpoint(mixture)
    read, original = [], type(checkpoint).read

    def note(self, name, *args):
        read.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(type(checkpoint), "read", note)
    describe(checkpoint)
    assert sorted(read) == [f"transformer.h.{layer}.moe.gate.weight" for layer in range(3)]


def test_k_beyond_the_experts_is_refused(mixture, capsys):
    assert main(["inspect", str(mixture), "--experts-per-token", "6"]) == 2
    assert "found 6, expected 1 to 5, the number of experts" in capsys.readouterr().err


def test_k_for_a_dense_model_is_refused(tmp_path, capsys):
    folder = write_phi_checkpoint(tmp_path / "dense", seed=1)
    assert main(["inspect", str(folder), "--experts-per-token", "1"]) == 2
    assert "phi is dense and has no experts to choose" in capsys.readouterr().err


def test_nan_in_a_gate_is_told(mixture, tmp_path, capsys):
    tensors = load_file(mixture / "model.safetensors")
    tensors["transformer.h.1.moe.gate.weight"][0, 0] = math.nan
    (tmp_path / "config.json").write_bytes((mixture / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "gate.weight" in (err := capsys.readouterr().err)
    assert "1 of 200 values are NaN or infinite" in err
