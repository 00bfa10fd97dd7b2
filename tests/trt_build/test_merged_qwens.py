"""Merged Qwens as engines: trained dense models are merged, and every engine is held to transformers' mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoding import KINDS, each
from merging import run, write_yaml
from qwen_checkpoints import split_into_experts, tell_mixtral_as_qwen2, tell_mixtral_as_qwen3
from torch_reference import ByTransformers
from transformers import AutoModelForCausalLM

from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral" / "checkpoint"
TEXT = (EXAMPLE.parent / "train.py").read_text()
TELL = {"qwen2_moe": tell_mixtral_as_qwen2, "qwen3_moe": tell_mixtral_as_qwen3}


@pytest.fixture(scope="module", params=TELL)
def merged(request, tmp_path_factory):
    """The trained example's experts as dense Qwens, merged."""
    folder = tmp_path_factory.mktemp(request.param)
    number = len(split_into_experts(TELL[request.param](EXAMPLE, folder / "mixture"), folder))
    prompts = [["def main() -> None:", "return"], ["import numpy as np"], ['"""Train a small model'], ["for step in"]]
    experts = [{"source_model": f"e{i}", "positive_prompts": prompts[i % 4] + [f"{i}"]} for i in range(number)]
    shared = [{"source_model": "e0", "positive_prompts": ["def main"], "residual_scale": 0.1}]
    more = {"shared_experts": shared} if request.param == "qwen2_moe" else {}
    return run(write_yaml(folder, gate_mode="hidden", dtype="float32", experts=experts, **more)).folder


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_an_engine_of_a_merge_keeps_parity_at_every_precision(tmp_path, merged, precision, kernels):
    options = BuildOptions(checkpoint=str(merged), output=tmp_path / "e", precision=precision, kernels=kernels)
    engine = build_engine(options)
    theirs = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    windows = list(parity.split_windows(load_tokenizer(merged).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(theirs), windows, lambda _: None)
    assert report.failures(parity.THRESHOLDS[precision]) == []
