"""Engines of checkpoints in unusual forms: built, verified, and the same as from the usual form."""

from __future__ import annotations

import json

import numpy as np
from mixtral_checkpoints import write_llama_tokenizer, write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.inspection import describe

FILE = "model.safetensors"


def usual(folder):
    size = write_llama_tokenizer(folder).get_vocab_size()
    return write_mixtral_checkpoint(folder, seed=7, num_experts=3, num_layers=1, vocab_size=size, max_positions=300)


def unusual(folder):
    """Without the base model's prefix, with matrices in float64, and with a vocabulary entry that nothing reaches."""
    usual(folder)
    tensors = {
        name.removeprefix("model."): values.astype(np.float64) if values.ndim > 1 else values
        for name, values in load_file(folder / FILE).items()
    }
    save_file(tensors, folder / FILE)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["zz never"] = len(raw["model"]["vocab"])
    path.write_text(json.dumps(raw))
    return folder


def test_an_engine_of_an_unusual_form_is_that_of_the_usual_one(tmp_path, capsys):
    for name, write in (("a", usual), ("b", unusual)):
        folder = str(write(tmp_path / name))
        engine = str(tmp_path / f"{name}-engine")
        arguments = ["--checkpoint", folder, "--output", engine, "--precision", "fp32"]
        assert main(["build", *arguments]) == 0, capsys.readouterr().err
    one, other = (sorted(tmp_path.glob(f"{name}-engine/*")) for name in "ab")
    assert [path.name for path in one] == [path.name for path in other]
    same = [first for first, second in zip(one, other, strict=True) if first.read_bytes() == second.read_bytes()]
    records = {"engine.json", "tokenizer.json", "weights.jsonl"}  # digests of the source, and a tokenizer written anew
    assert {path.name for path in one} - {path.name for path in same} == records
    assert main(["verify", str(tmp_path / "b-engine"), "--reference", str(tmp_path / "b"), "--tokens", "64"]) == 0
    assert "F64" in describe(open_checkpoint(tmp_path / "b")).dtype_bytes
