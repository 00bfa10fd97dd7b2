"""Every refusal of a merge by its text, that nothing is left behind, and the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from merging import SPELLINGS, leftovers, run, write_five_experts, write_yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from cli.main import main
from export.errors import CheckpointError, ConfigError, MergeError, OutputError
from export.merge import merge as merge_module


@pytest.fixture
def five(tmp_path):
    """The YAML of a merge of five experts."""
    return write_five_experts(tmp_path)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"hidden_size": 80}, "has hidden_size 80, the base 40"),
        ({"ffn_size": 48}, "has ffn_size 48, the base 56"),
        ({"num_layers": 2}, "has num_layers 2, the base 3"),
        ({"num_heads": 4}, "has num_heads 4, the base 5"),
        ({"rotary_dim": 6}, "has rotary_dim 6, the base 4"),
    ],
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_expert_of_other_dimensions_is_refused(tmp_path, dims, message, spelling):
    write_phi_checkpoint(tmp_path / "e0", seed=0)
    write_phi_checkpoint(tmp_path / "e1", seed=1, spelling=spelling, **dims)
    with pytest.raises(MergeError) as caught:
        run(write_yaml(tmp_path))
    assert f"expert 1 ({tmp_path / 'e1'}) {message}" in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_base_that_is_no_expert_is_held_to_every_expert(tmp_path):
    write_phi_checkpoint(tmp_path / "base", seed=0)
    write_phi_checkpoint(tmp_path / "e0", seed=1, ffn_size=48)
    write_phi_checkpoint(tmp_path / "e1", seed=2)
    with pytest.raises(MergeError, match=r"expert 0 .* has ffn_size 48, the base 56"):
        run(write_yaml(tmp_path, base_model="./base"))


def test_every_unfitting_expert_is_named_in_one_error(five):
    write_phi_checkpoint(five.parent / "e1", seed=1, ffn_size=48)
    write_phi_checkpoint(five.parent / "e4", seed=1, num_layers=2)
    with pytest.raises(MergeError, match=r"expert 1 .* has ffn_size 48[\s\S]*expert 4 .* has num_layers 2"):
        run(five)


def test_a_mixture_as_an_expert_is_refused(tmp_path):
    write_phi_checkpoint(tmp_path / "e0", seed=0)
    write_phixtral_checkpoint(tmp_path / "e1", seed=0, num_experts=3, experts_per_token=2)
    with pytest.raises(
        MergeError, match=r"expert 1 .* is of family phixtral, the base of phi; a phixtral is merged from"
    ):
        run(write_yaml(tmp_path))


def test_another_architecture_is_refused(five):
    config = five.parent / "e1" / "config.json"
    config.write_text(json.dumps({"model_type": "gemma"}))
    with pytest.raises(ConfigError, match="model_type 'gemma' is not among those that moeship builds"):
        run(five)


def test_another_rotary_base_is_refused_since_the_layout_has_no_key_for_it(tmp_path):
    for index in range(2):
        folder = write_phi_checkpoint(tmp_path / f"e{index}", seed=index)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 500000.0
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="has rope_theta 500000; the phi-msft layout has no key for it"):
        run(write_yaml(tmp_path))


def test_a_missing_tensor_is_named(five):
    path = five.parent / "e2" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.fc2.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.fc2\.bias is missing, expected \[40\]"):
        run(five)


@pytest.mark.parametrize(("dtype", "asked"), [("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_nan_in_an_expert_is_refused_and_leaves_nothing(tmp_path, dtype, asked):
    write_phi_checkpoint(tmp_path / "e0", seed=0, dtype=dtype)
    path = write_phi_checkpoint(tmp_path / "e1", seed=1, dtype=dtype, spelling="phi-msft") / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["transformer.h.2.mlp.fc1.weight"][3, 5] = float("nan")
    save_torch(tensors, path)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.2\.mlp\.fc1\.weight .*NaN or infinite"):
        run(write_yaml(tmp_path, dtype=asked))
    assert leftovers(tmp_path) == []


def test_a_value_too_large_for_float16_is_refused_with_its_size(five):
    path = five.parent / "e1" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.0.mlp.fc1.bias"][0] = -70000.0
    save_file(tensors, path)
    message = r"fc1\.bias: a value of magnitude 70000 does not fit float16; set dtype to bfloat16 or float32"
    with pytest.raises(MergeError, match=message):
        run(write_yaml(five.parent, 5, dtype="float16"))
    assert leftovers(five.parent) == []


def test_a_base_of_two_dtypes_needs_one_to_be_asked(five):
    path = five.parent / "e0" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    save_file(tensors, path)
    with pytest.raises(MergeError, match="it stores F16 and F32; say which to write with dtype in the YAML: float16,"):
        run(five)
    assert run(write_yaml(five.parent, 5, dtype="bfloat16")).dtype == "BF16"


def test_a_base_without_a_tokenizer_is_refused_even_where_gates_need_none(five):
    (five.parent / "e0" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; save one beside the weights"):
        run(write_yaml(five.parent, 5, gate_mode="random"))


def test_an_existing_output_is_refused_and_kept(five):
    (five.parent / "out").mkdir()
    (five.parent / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="out exists already"):
        run(five)
    assert (five.parent / "out" / "mine").read_text() == "x"


def test_a_disk_without_room_is_refused_before_anything_is_written(five, monkeypatch):
    usage = shutil.disk_usage(five)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"it takes 0\.00 GB, .* has 0\.00 GB free; make room"):
        run(five)
    assert leftovers(five.parent) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_half_way_leaves_nothing_behind(five, monkeypatch, failure):
    chunks = merge_module.MergeSources.chunks

    def stop_at_layer_2(self, tensor):
        if tensor.layer == 2:
            raise failure
        return chunks(self, tensor)

    monkeypatch.setattr(merge_module.MergeSources, "chunks", stop_at_layer_2)
    with pytest.raises(failure):
        run(five)
    assert leftovers(five.parent) == []


def test_a_killed_merge_leaves_nothing_under_the_final_name(five):
    script = f"""
import os, signal
import shutil
from pathlib import Path
from export.merge import merge
from export.merge.config import read_merge_config
chunks = merge.MergeSources.chunks
def kill_at_layer_2(self, tensor):
    if tensor.layer == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunks(self, tensor)
merge.MergeSources.chunks = kill_at_layer_2
merge.merge(read_merge_config(Path({str(five)!r})), Path({str(five.parent / "out")!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == -9
    assert not (five.parent / "out").exists()
    assert run(five).folder.is_dir()


def test_the_command_prints_what_it_wrote(five, capsys):
    assert main(["merge", str(five), str(five.parent / "out"), "--max-shard-size", "100KB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{five.parent / 'out'}: phixtral of 5 experts, 2 per token, 3 layers, 0.1 M parameters, F32")


def test_the_command_exits_with_2_and_one_error_for_a_wrong_yaml(five, capsys):
    five.write_text("base_model: ./e0\nexpert: []\n")
    assert main(["merge", str(five), str(five.parent / "out")]) == 2
    assert "expert: no such key (did you mean experts?)" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "0.5", "5 apples", "-1GB", "GB", "9" * 400, "9" * 5000 + "GB"])
def test_a_shard_size_that_is_none_is_refused(five, capsys, size):
    with pytest.raises(SystemExit):
        main(["merge", str(five), str(five.parent / "out"), f"--max-shard-size={size}"])
    said = capsys.readouterr().err
    assert "is not a size; write for example 5GB, 500MB or 2GiB" in said
    assert len(said) < 1000


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", "9" * 5000])
def test_a_seed_that_is_none_is_refused(five, capsys, seed):
    with pytest.raises(SystemExit):
        main(["merge", str(five), str(five.parent / "out"), f"--seed={seed}"])
    said = capsys.readouterr().err
    assert "is not a seed; give a whole number of 0 to" in said
    assert len(said) < 1000


def test_an_expert_that_is_rewritten_while_it_is_read_leaves_nothing(tmp_path, five, monkeypatch):
    shard, write_sharded = tmp_path / "e3" / "model.safetensors", merge_module.write_sharded

    def rewriting(*arguments, **options):
        write_sharded(*arguments, **options)
        facts = shard.stat()
        with shard.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\1\1")
        os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    monkeypatch.setattr(merge_module, "write_sharded", rewriting)
    with pytest.raises(CheckpointError, match=r"reading .*e3: model.safetensors changed while it was read"):
        run(five)
    assert leftovers(tmp_path) == []
