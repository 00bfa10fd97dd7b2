"""The flags of this backend say of its options what the options are."""

from __future__ import annotations

import dataclasses

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
