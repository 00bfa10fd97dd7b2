"""Engines of dense Mistrals and Llamas against transformers' own classes, and what cannot be built of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from cuda_kernels import check_types
from decoding import KINDS, each
from dense_checkpoints import write_dense_checkpoint
from torch_reference import ByTransformers
from transformers import LlamaForCausalLM, MistralForCausalLM

from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, ExportError
from export.families import read_model
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine

CLASSES = {"mistral": MistralForCausalLM, "llama": LlamaForCausalLM}
TOKENS = np.random.default_rng(3).integers(0, 365, 120).tolist()
SIZES = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 192}


def write(folder, family, **more):
    config = {"sliding_window": 23} if family == "mistral" else {}
    return write_dense_checkpoint(folder, seed=4, family=family, config=config, **SIZES | more)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("kind", each(KINDS))
def test_an_engine_gives_the_logits_of_transformers_class(tmp_path, family, kind):
    folder = write(tmp_path / "c", family)
    options = BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision=kind[0], kernels=kind[1])
    engine = build_engine(options)
    theirs = CLASSES[family].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    report = verify.compare(engine, ByTransformers(theirs), [TOKENS], lambda _: None)
    assert report.num_decoded_tokens == len(TOKENS) // 2
    if kind[0] == "fp32":
        with torch.no_grad():
            largest = float(theirs(torch.tensor([TOKENS])).logits.abs().max())
        assert max(report.max_logit_difference, report.max_decoded_difference) <= 1e-4 * largest
        assert report.failures(parity.THRESHOLDS["fp32"]) == []
    else:
        assert report.mean_kl <= {"int8": 1e-3, "int4": 0.2}[kind[0]]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_graph_for_cuda_has_kernels_for_its_types(tmp_path, precision):
    folder = write(tmp_path / "c", "mistral", dtype="float16")
    options = BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision=precision, provider="cuda")
    engine = build_engine(options)
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        problems, operators = check_types(onnx.load(str(engine.folder / name), load_external_data=False))
        assert problems == []
        assert {"Sigmoid", "Mul"} <= operators


@pytest.mark.parametrize("family", CLASSES)
def test_tensorrt_llm_is_refused_by_the_familys_name(tmp_path, family):
    with pytest.raises(ExportError, match=f"engines of mixtral, phi, phixtral, not of {family}; build for onnxruntime"):
        plan_checkpoint(read_model(open_checkpoint(write(tmp_path / "c", family))), CheckpointOptions())


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_is_refused(tmp_path, key):
    folder = write_dense_checkpoint(tmp_path / "c", seed=1, family="llama", config={key: True})
    with pytest.raises(ConfigError, match=f"{key} is True; moeship builds only False"):
        read_model(open_checkpoint(folder))
