"""A Mixtral for CUDA without a GPU: its graphs fit the kernels, and its numbers are transformers' own."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from cuda_kernels import check_types
from mixtral_checkpoints import write_mixtral_checkpoint
from torch_reference import ByTransformers, load_reference

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.provider import PROVIDERS
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device

TOKENS = np.random.default_rng(4).integers(0, 250, 160).tolist()
# In blocks of 64; fewer key heads than query heads.
SIZES = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 448, "dtype": "float16"}


def by_transformers(checkpoint):
    return ByTransformers(load_reference(read_model(open_checkpoint(checkpoint))))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_mixtral_checkpoint(tmp_path_factory.mktemp("mixtral") / "checkpoint", seed=3, **SIZES)


@pytest.fixture
def run_on_the_cpu(monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))


def build(checkpoint, output, precision):
    options = BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, provider="cuda")
    return build_engine(options)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_every_node_has_a_cuda_kernel_of_its_types(tmp_path, checkpoint, precision):
    engine = build(checkpoint, tmp_path / "engine", precision)
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        problems, operators = check_types(onnx.load(str(engine.folder / name), load_external_data=False))
        assert problems == []
        assert {"SimplifiedLayerNormalization", "GroupQueryAttention"} < operators


@pytest.mark.usefixtures("run_on_the_cpu")
def test_float16_differs_from_transformers_by_its_rounding(tmp_path, checkpoint):
    engine = build(checkpoint, tmp_path / "engine", "fp16")
    report = verify.compare(engine, by_transformers(checkpoint), [TOKENS], lambda _: None)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement == 1.0


@pytest.mark.usefixtures("run_on_the_cpu")
def test_queries_that_lost_their_factor_are_caught(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("export.onnx_graph.weight_planner.WeightJob", lambda **job: _without_factor(job))
    engine = build(checkpoint, tmp_path / "engine", "fp16")
    report = verify.compare(engine, by_transformers(checkpoint), [TOKENS], lambda _: None)
    assert report.mean_kl > 1e-3


def _without_factor(job):
    from export.onnx_graph.weights import WeightJob

    return WeightJob(**{**job, "scaled_rows": 0})
