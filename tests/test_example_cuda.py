"""CUDA engines of the committed experts' mixture, through the CPU's kernels, and what a GELU in erf form would cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.config import read_merge_config
from export.merge.merge import merge
from export.provider import PROVIDERS
from export.tokenizer.loading import load_tokenizer
from trt_build.build_engine import BuildOptions, build_engine
from trt_build.comparison import parity
from trt_build.comparison.evaluation_text import standard_text
from trt_build.comparison.torch_reference import load_reference
from trt_build.ort.device import Device

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-phixtral"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "mixture"
    merge(read_merge_config(EXAMPLE / "merge.yml"), folder)
    return folder


@pytest.fixture(scope="module")
def reference(mixture):
    return load_reference(read_model(open_checkpoint(mixture)))


@pytest.fixture(scope="module")
def windows(mixture):
    return list(parity.split_windows(load_tokenizer(mixture).encode(standard_text()), 512, 2048))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_parity_of_a_cuda_engine_holds_on_text(tmp_path, mixture, reference, windows, precision, monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    options = BuildOptions(checkpoint=str(mixture), output=tmp_path / "e", precision=precision, provider="cuda")
    report = parity.compare(build_engine(options), reference, windows, lambda _text: None)
    assert report.num_decoded_tokens == 256
    assert report.failures(parity.THRESHOLDS[precision]) == []
    if precision == "fp16":
        assert report.mean_kl <= 5e-5


def test_erf_gelu_in_place_of_tanh_costs_no_more_than_float16_does(reference, windows, monkeypatch):
    exact = [parity.run_reference(reference, window)[0] for window in windows]
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x, approximate="none"))
    erf = [parity.run_reference(reference, window)[0] for window in windows]
    expected, found = (np.concatenate([parity.log_softmax(logits) for logits in run]) for run in (exact, erf))
    divergence = float((np.exp(expected) * (expected - found)).sum(-1).mean())
    assert 1e-7 < divergence <= 5e-5
    assert (expected.argmax(-1) == found.argmax(-1)).mean() >= 0.995
