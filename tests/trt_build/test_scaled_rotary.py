"""ONNX engines of models with a scaled rotary embedding, against transformers up to the last position."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mixtral_checkpoints import write_mixtral_checkpoint
from torch_reference import ByTransformers
from transformers import MixtralForCausalLM

from cli.main import main
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine

POSITIONS = 512
TOKENS = np.random.default_rng(3).integers(0, 365, POSITIONS).tolist()
FACTORS = np.linspace(1.0, 1.7, 8).tolist()
SCALINGS = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 2.0,
        "original_max_position_embeddings": POSITIONS,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_an_engine_gives_transformers_logits(tmp_path, kind, capsys):
    config = {"rope_scaling": SCALINGS[kind]}
    folder = write_mixtral_checkpoint(
        tmp_path / "c", seed=7, num_experts=3, num_layers=1, max_positions=POSITIONS, config=config
    )
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    engine = build_engine(
        BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision="fp32", kernels="onnxruntime")
    )
    report = verify.compare(engine, ByTransformers(model), [TOKENS], lambda _text: None)
    assert report.failures(parity.THRESHOLDS["fp32"]) == []
    assert report.num_tokens == POSITIONS
    kept = json.loads((tmp_path / "e" / "engine.json").read_text())["architecture"]["rotary_scaling"]
    assert kept["kind"] == kind
    assert main(["inspect", str(folder)]) == 0
    assert kind in capsys.readouterr().out
