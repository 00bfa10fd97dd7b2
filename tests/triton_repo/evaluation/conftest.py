"""fp32 engines of the two trained examples, and what the float32 reference says of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.reference.model import Reference
from export.tokenizer.loading import Tokenizer, load_tokenizer
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

EXAMPLES = Path(__file__).parents[3] / "examples"


@dataclass(frozen=True)
class Example:
    """A trained example: its checkpoint, an fp32 engine of it, and both loaded."""

    checkpoint: Path
    engine: Path
    session: Session
    tokenizer: Tokenizer
    reference: Reference

    def logits(self, windows):
        """The reference's logits of each window of token ids."""
        return [np.array(logits, dtype=np.float64) for logits, _ in self.reference.run(windows)]

    def scores(self, pairs):
        """(log-probability, is greedy) of each (context, target) by the reference, in float64."""
        found = []
        windows = [[*context, *target][:-1] for context, target in pairs]
        for (_, target), logits in zip(pairs, self.logits(windows), strict=True):
            last = logits[-len(target) :]
            logs = (
                last
                - np.log(np.exp(last - last.max(1, keepdims=True)).sum(1, keepdims=True))
                - last.max(1, keepdims=True)
            )
            found.append((logs[np.arange(len(target)), target].sum(), bool((last.argmax(1) == target).all())))
        return found

    def greedy(self, token_ids, count):
        """The tokens that the reference continues with."""
        found = list(token_ids)
        for _ in range(count):
            found.append(int(self.logits([found])[0][-1].argmax()))
        return found[len(token_ids) :]


def load(checkpoint, engine):
    reference = Reference(read_model(open_checkpoint(str(checkpoint))))
    opened = open_engine(engine)
    return Example(checkpoint, engine, Session(opened), load_tokenizer(engine), reference)


def build(checkpoint):
    return lambda folder: build_engine(BuildOptions(checkpoint=str(checkpoint), output=folder, precision="fp32"))


@pytest.fixture(scope="session")
def phixtral(made_once, trained_phixtral) -> Example:
    """Its tokenizer puts nothing before a prompt."""
    return load(trained_phixtral, made_once("eval-phixtral-fp32", build(trained_phixtral)))


@pytest.fixture(scope="session")
def mixtral(made_once) -> Example:
    """Its tokenizer puts <s> before a prompt."""
    checkpoint = EXAMPLES / "tiny-mixtral/checkpoint"
    return load(checkpoint, made_once("eval-mixtral-fp32", build(checkpoint)))


@pytest.fixture(params=["phixtral", "mixtral"])
def example(request) -> Example:
    return request.getfixturevalue(request.param)
