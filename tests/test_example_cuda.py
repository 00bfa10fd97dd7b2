"""CUDA engines of the committed experts' mixture, through the CPU's kernels, and what a GELU in erf form would cost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch_reference import load_reference, run_model

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.provider import PROVIDERS
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import parity
from trt_build.comparison.evaluation_text import own_text
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device


class Computed:
    """Stands for a reference; its logits and router logits were computed before."""

    def __init__(self, found):
        self._found = found

    def run(self, windows, progress):
        return (self._found[tuple(window)] for window in windows)


@pytest.fixture(scope="module")
def reference(trained_phixtral):
    return load_reference(read_model(open_checkpoint(trained_phixtral)))


@pytest.fixture(scope="module")
def windows(trained_phixtral):
    return list(parity.split_windows(load_tokenizer(trained_phixtral).encode(own_text().content), 256, 1024))


@pytest.fixture(scope="module")
def expected(reference, windows):
    """Window -> the reference's logits and router logits, computed once."""
    return {tuple(window): run_model(reference, window) for window in windows}


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_parity_of_a_cuda_engine_holds_on_text(tmp_path, trained_phixtral, windows, expected, precision, monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    options = BuildOptions(
        checkpoint=str(trained_phixtral), output=tmp_path / "e", precision=precision, provider="cuda"
    )
    report = verify.compare(build_engine(options), Computed(expected), windows, lambda _text: None)
    assert report.num_decoded_tokens == 128
    assert report.failures(parity.THRESHOLDS[precision]) == []
    if precision == "fp16":
        assert report.mean_kl <= 5e-5


def test_erf_gelu_in_place_of_tanh_costs_no_more_than_float16_does(reference, windows, expected, monkeypatch):
    exact = [expected[tuple(window)][0] for window in windows]
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x, approximate="none"))
    erf = [run_model(reference, window)[0] for window in windows]
    tanh, found = (np.concatenate([parity.log_softmax(logits) for logits in run]) for run in (exact, erf))
    divergence = float((np.exp(tanh) * (tanh - found)).sum(-1).mean())
    assert 1e-7 < divergence <= 5e-5
    assert (tanh.argmax(-1) == found.argmax(-1)).mean() >= 0.995
