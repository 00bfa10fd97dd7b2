"""The flags of this backend say of its options what the options are, and the other backend takes none of them."""

from __future__ import annotations

import dataclasses

import pytest

from cli.main import main
from export.trtllm.precision import TRTLLM_PRECISIONS
from trt_build.trtllm.options import TrtllmOptions
from trt_build.trtllm_flags import FLAGS, PRECISIONS

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrtllmOptions)}


def test_the_help_names_every_precision():
    assert tuple(TRTLLM_PRECISIONS) == PRECISIONS


def test_every_flag_is_an_option_with_the_default_that_the_help_names():
    named = {name: text for name, _, _, _, text in FLAGS}
    assert named.keys() <= DEFAULTS.keys()
    assert {name: str(DEFAULTS[name]) for name in named if DEFAULTS[name] is not None} == {
        name: text for name, text in named.items() if DEFAULTS[name] is not None
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--tp-size", "2"],
            "EngineError: reading the flags: --tp-size: for --backend tensorrt-llm only; leave them out",
        ),
        (
            ["--until", "plan", "--plain-weights"],
            "reading the flags: --until, --plain-weights: for --backend tensorrt-llm",
        ),
        (
            ["--backend", "tensorrt-llm", "--provider", "cpu"],
            "--provider: for --backend onnxruntime only; leave them out",
        ),
        (
            ["--backend", "tensorrt-llm", "--kernels", "moeship"],
            "reading the flags: --kernels: for --backend onnxruntime",
        ),
        (["--backend", "tensorrt"], "'tensorrt' is unknown. There are: onnxruntime, tensorrt-llm"),
        (["--backend", "tensorrt-llm", "--precision", "int3"], "QuantizationError: choosing the precision: 'int3'"),
    ],
)
def test_flags_of_the_other_backend_end_the_command(tmp_path, small_phixtral, capsys, words, told):
    command = ["build", "--checkpoint", str(small_phixtral), "--output", str(tmp_path / "engine")]
    assert main([*command, *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
