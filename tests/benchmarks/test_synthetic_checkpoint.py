"""The synthetic checkpoints: the published layout, seeded, and fit to be built from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from export.checkpoint.folder import file_digest, open_checkpoint
from export.families import families, mixtral
from export.inspection import describe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "synthetic_checkpoint.py"


def write(output, *words):
    command = [sys.executable, SCRIPT, "--like", "phixtral-2x2_8", "--output", output, "--layers", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def module():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("synthetic_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    done = write(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_is_read_as_the_published_model_with_fewer_layers(checkpoint):
    report = describe(open_checkpoint(checkpoint))
    facts = report.architecture
    assert (facts.hidden_size, facts.ffn_size, facts.head_size, facts.rotary_dim) == (2560, 10240, 80, 32)
    assert (facts.num_experts, facts.experts_per_token, facts.num_layers, facts.vocab_size) == (2, 2, 1, 51200)
    # Worked by hand: embedding and head 2*51200*2560 + 51200, final norm 2*2560; a layer: norm 2*2560, Wqkv
    # 7680*2560 + 7680, out_proj 2560*2560 + 2560, gate 2*2560, experts 2*(2*2560*10240 + 10240 + 2560).
    assert report.total_parameters == 393_318_400


def test_matrices_have_the_scale_of_their_width_and_tensors_differ(checkpoint):
    opened = open_checkpoint(checkpoint)
    first, second = (opened.read_float32(f"transformer.h.0.moe.mlp.{e}.fc1.weight", slice(0, 64)) for e in (0, 1))
    assert np.std(first) == pytest.approx(1 / np.sqrt(2560), rel=0.02)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    assert (opened.read("transformer.h.0.ln.weight") == 1).all()


def test_the_same_seed_gives_the_same_bytes_and_an_existing_folder_is_kept(checkpoint, tmp_path):
    assert write(tmp_path / "again").returncode == 0
    assert file_digest(tmp_path / "again" / "model.safetensors") == file_digest(checkpoint / "model.safetensors")
    done = write(checkpoint)
    assert done.returncode == 2
    assert "exists already" in done.stderr


def test_every_model_is_planned_with_the_published_names_and_bytes(module):
    # total_size in the published index of Mixtral-8x7B; the phixtrals' by hand, as above.
    for like, num_bytes, sample in (
        ("mixtral-8x7b", 93_405_585_408, "model.layers.31.block_sparse_moe.experts.7.w3.weight"),
        ("phixtral-2x2_8", 2 * (262_200_320 + 32 * 131_118_080), "transformer.h.31.moe.mlp.1.fc2.bias"),
        # total_size of the index of openai/gpt-oss-20b, and 3_298_793_472 parameters of Granite-3.1-3B-A800M.
        ("gpt-oss-20b", 13_761_264_768, "model.layers.23.mlp.experts.down_proj_scales"),
        ("granite-3.1-3b-a800m", 2 * 3_298_793_472, "model.layers.31.block_sparse_moe.input_linear.weight"),
    ):
        facts = module.MODELS[like]
        planned = module.planned_tensors(facts, module.DTYPES[facts.source_dtype])
        assert sum(tensor.num_bytes for tensor in planned) == num_bytes
        assert sample in [tensor.name for tensor in planned]
    config = module.llama_config(module.MIXTRAL)
    # The end tokens are read by export.tokenizer.settings.
    assert mixtral.read_config(config) == replace(module.MIXTRAL, eos_token_ids=())


@pytest.mark.parametrize("like", ["granite-3.1-3b-a800m", "gpt-oss-20b", "qwen3-30b-a3b", "olmoe-1b-7b"])
def test_the_configuration_of_a_model_is_read_as_its_facts(module, like):
    facts = module.shortened(module.MODELS[like], 3)
    [family] = [family for family in families() if family.name == facts.family]
    config = module.llama_config(facts)
    config.pop("quantization_config", None)  # the opened checkpoint reads it
    assert family.read_config(config) == replace(facts, eos_token_ids=())


def test_experts_of_gpt_oss_are_in_mxfp4_at_the_scale_of_their_width(module, tmp_path):
    facts = replace(
        module.shortened(module.GPT_OSS, 1), hidden_size=256, num_heads=4, num_kv_heads=2, ffn_size=128, num_experts=2,
        experts_per_token=1, vocab_size=2048,
    )  # fmt: skip
    num_bytes = module.write(facts, tmp_path / "mixture", seed=0)
    opened = open_checkpoint(tmp_path / "mixture")
    assert sum(path.stat().st_size for path in opened.folder.glob("*.safetensors")) - num_bytes < 4096
    experts = opened.packed["model.layers.0.mlp.experts.down_proj_blocks"]
    rows = experts.read(opened, 0, experts.num_rows)
    assert rows.shape == (2 * 256, 128)
    # The largest code is cut: it stands for 1.5 to 3 standard deviations.
    assert np.std(rows) == pytest.approx(1 / np.sqrt(128), rel=0.1)
    # By hand: the exponent of 128 features is floor(log2(3 / 6 / 11.3)) = -5, and values of 0.02, -0.1 and 0.3 are
    # 0.64, -3.2 and 9.6 of its scale: codes 1, 8 + 5 and 7.
    assert module.mxfp4_exponent(128) == -5
    pairs = module.mxfp4_pairs(np.array([0.02, -0.1, 0.3, 0.0], np.float32), -5)
    assert pairs.tolist() == [0xD1, 0x07]


def test_mixtral_values_have_the_scale_of_their_width(module):
    chunks = module.draws(0)
    planned = {t.name: t for t in module.planned_tensors(replace(module.MIXTRAL, num_layers=1), "BF16")}
    first = next(chunks(planned["model.layers.0.block_sparse_moe.experts.0.w2.weight"]))
    assert first.dtype == ml_dtypes.bfloat16
    assert np.std(first.astype(np.float32)) == pytest.approx(1 / np.sqrt(14336), rel=0.02)
    assert (next(chunks(planned["model.layers.0.input_layernorm.weight"])) == 1).all()
    assert next(chunks(planned["model.embed_tokens.weight"])).astype(np.float32).std() == pytest.approx(1, rel=0.02)
