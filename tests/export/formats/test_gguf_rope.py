"""Scaled rotary embeddings of GGUF files: transformers' logits with the scaling that the file was written for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_files import write_file
from torch_reference import load_reference, run_model
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export.checkpoint.folder import open_checkpoint
from export.errors import MoeshipError
from export.families import read_model
from export.reference.model import Reference
from trt_build.ort.build import BuildOptions, build_engine

POSITIONS, BASE, WIDTH = 512, 500000.0, 64
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHORT_LLAMA_3 = {**LLAMA_3, "original_max_position_embeddings": 96}
LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def divisors(scaling):
    """rope_freqs.weight: the quotient of transformers' plain and scaled frequencies."""
    config = AutoConfig.for_model(
        "llama", hidden_size=2 * WIDTH, num_attention_heads=2, head_dim=WIDTH, rope_theta=BASE,
        rope_scaling=dict(scaling), max_position_embeddings=POSITIONS,
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / BASE ** (torch.arange(0, WIDTH, 2, dtype=torch.float32) / WIDTH)
    return (plain / scaled).numpy()


def written(path, tensors=None, **metadata):
    """A Llama of two heads of 64."""
    shapes = {"token_embd.weight": (40, 128), "output_norm.weight": (128,)}
    layer = {"attn_norm": (128,), "ffn_norm": (128,), "ffn_down": (128, 32), "ffn_gate": (32, 128), "ffn_up": (32, 128)}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (128, 128))
    rng = np.random.default_rng(1)
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    values = {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()}
    facts = {"embedding_length": 128, "context_length": POSITIONS, "rope.freq_base": BASE}
    return write_file(path, tensors=values | (tensors or {}), **facts, **metadata)


TOKENS = np.random.default_rng(3).integers(0, 40, POSITIONS).tolist()
CASES = {
    "Llama 3.1": (LLAMA_3, {}, True),
    "another original length": (SHORT_LLAMA_3, {}, True),
    "linear": (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, False),
    "linear without its name": (LINEAR, {"rope.scaling.factor": 2.5}, False),
    "linear as of old": (LINEAR, {"rope.scale_linear": 2.5}, False),
    "yarn": (
        YARN,
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
         "rope.scaling.finetuned": True},
        False,
    ),
    "yarn with its ramp": (
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
         "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        False,
    ),
    "none": (None, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, False),
}  # fmt: skip


def with_config(model, **changes):
    """The model with other values of config.json, for transformers alone."""
    checkpoint = model.weights.checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "rope_scaling"} | changes
    return replace(model, weights=replace(model.weights, checkpoint=replace(checkpoint, config=config)))


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_transformers_up_to_the_last_position(tmp_path, name):
    scaling, metadata, has_divisors = CASES[name]
    tensors = {"rope_freqs.weight": divisors(scaling)} if has_divisors else {}
    model = read_model(open_checkpoint(written(tmp_path / "m.gguf", tensors, **metadata)))
    found = next(Reference(model).run([TOKENS]))[0]
    more = {} if scaling is None else {"rope_scaling": dict(scaling)}
    expected = run_model(load_reference(with_config(model, **more)), TOKENS)[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert model.architecture.max_positions == POSITIONS
    if scaling is not None and scaling != LLAMA_3:  # whose long waves turn by nothing within 512 positions
        plain = run_model(load_reference(with_config(model)), TOKENS)[0]
        assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max()


def test_llama_3s_divisors_are_told_by_their_name(tmp_path):
    model = read_model(open_checkpoint(written(tmp_path / "m.gguf", {"rope_freqs.weight": divisors(LLAMA_3)})))
    assert model.weights.checkpoint.config["rope_scaling"] == LLAMA_3
    ones = np.ones(WIDTH // 2, np.float32)
    model = read_model(open_checkpoint(written(tmp_path / "ones.gguf", {"rope_freqs.weight": ones})))
    assert model.architecture.rotary_scaling is None


def test_an_engine_of_a_file_with_divisors_is_built(tmp_path):
    path = written(tmp_path / "m.gguf", {"rope_freqs.weight": divisors(LLAMA_3)}, **{
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"t{index}" for index in range(40)],
        "tokenizer.ggml.scores": [0.0] * 40, "tokenizer.ggml.eos_token_id": 2,
    })  # fmt: skip
    engine = build_engine(BuildOptions(checkpoint=str(path), output=tmp_path / "engine", precision="fp32"))
    assert engine.manifest.architecture.rotary_scaling.kind == "llama3"


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({}, {"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope', moeship reads none, linear and yarn"),
        ({}, {"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn', and there is no rope.scaling.factor"),
        ({}, {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 0.5},
         "llama.rope.scaling.yarn_ext_factor is 0.5, which moeship does not support in a GGUF file"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, {}, "rope_freqs.weight has 8 values, expected 32 positive"),
        ({"rope_freqs.weight": np.zeros(32, np.float32)}, {}, "rope_freqs.weight has 32 values, expected 32 positive"),
        ({"rope_freqs.weight": np.ones(32, np.float16)}, {}, "rope_freqs.weight is F16, expected F32"),
        ({"rope_freqs.weight": np.ones(32, np.float32)}, {"rope.scaling.factor": 2.0},
         "rope_freqs.weight and rope.scaling.factor both scale the rotary embedding"),
    ],
)  # fmt: skip
def test_scalings_that_are_not_read_are_refused(tmp_path, tensors, metadata, said):
    with pytest.raises(MoeshipError) as caught:
        read_model(open_checkpoint(written(tmp_path / "m.gguf", tensors, **metadata)))
    assert said in str(caught.value)
