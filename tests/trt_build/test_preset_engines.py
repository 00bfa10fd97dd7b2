"""Engines of the presets q2 to q8 of the trained phixtral: sound, and the nearer to the checkpoint the more bits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.quantize.recipe import SEARCH
from export.reference.model import Reference
from export.tokenizer.settings import read_settings
from trt_build.calibration import Calibration
from trt_build.comparison.evaluation_text import own_text
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.weights import ask_about_weights
from trt_build.ort.session import ScoringSession

PRESETS = ("q2", "q3", "q4", "q5", "q6", "q8")
NUM_TOKENS = 512


@pytest.fixture(scope="module")
def engines(made_once, trained_phixtral):
    def built(precision):
        return made_once(
            f"trained-{precision}",
            lambda folder: build_engine(
                BuildOptions(
                    checkpoint=str(trained_phixtral),
                    output=folder,
                    precision=precision,
                    calibration=Calibration(method=SEARCH),
                )
            ),
        )

    return {precision: open_engine(built(precision), check_digests=False) for precision in PRESETS}


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.needs_kernels
def test_kl_falls_from_q2_to_q8(engines, trained_phixtral):
    checkpoint = open_checkpoint(trained_phixtral)
    tokens = read_settings(checkpoint.folder, checkpoint.config).tokenizer.encode_prompt(own_text().content)
    tokens = tokens[:NUM_TOKENS]
    [(logits, _)] = Reference(read_model(checkpoint)).run([tokens])
    wanted = log_softmax(logits)
    found = []
    for engine in engines.values():
        theirs = log_softmax(ScoringSession(engine).run(tokens)[0])
        found.append(float((np.exp(wanted) * (wanted - theirs)).sum(axis=-1).mean()))
    assert found == sorted(found, reverse=True)
    assert found[0] < 0.3
    assert found[-1] < 2e-3
    assert all(more > 1.3 * less for more, less in pairwise(found))


@pytest.mark.needs_kernels
@pytest.mark.parametrize("precision", PRESETS)
def test_an_engine_of_a_preset_has_the_checkpoints_weights(engines, trained_phixtral, precision):
    model = read_model(open_checkpoint(trained_phixtral))
    assert ask_about_weights(engines[precision], model).failures == ()
    assert engines[precision].manifest.judged_as == precision
