"""Where an answer ends: at the tokens at which transformers' `generate` ends on the same checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PhiForCausalLM

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.piece import join
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.session import Session

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-phixtral" / "experts" / "code"
PROMPT, TOKENS = "def main(", 40
CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A copy of the example's expert, a trained Phi whose text does not repeat itself at once."""
    return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("ends") / "phi"))


def state(checkpoint, of_config, of_generation):
    """Have the two files name these end tokens; None removes the name, and the second file."""
    config = json.loads((checkpoint / CONFIG).read_text())
    (checkpoint / CONFIG).write_text(json.dumps({**config, "eos_token_id": of_config}))
    (checkpoint / GENERATION).unlink(missing_ok=True)
    if of_generation is not None:
        (checkpoint / GENERATION).write_text(json.dumps({"bos_token_id": 0, "eos_token_id": of_generation}))


def theirs(checkpoint):
    """The ids that transformers generates, greedily; its end token is the last where it comes to one."""
    model, tokenizer = PhiForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def ours(checkpoint, folder):
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=folder, precision="fp32"))
    options = GenerationOptions(prompt=PROMPT, max_tokens=TOKENS)
    return join(list(generate(Session(engine), load_tokenizer(engine.folder), options)))


@pytest.mark.parametrize("files", ["the list has another", "the files disagree", "config.json alone", "a list in it"])
def test_an_answer_ends_where_generate_does(checkpoint, tmp_path, files):
    state(checkpoint, 0, None)
    told = theirs(checkpoint)
    # Ids that the model writes for certain, each for the first time at its place.
    early, late = [token for place, token in enumerate(told) if token not in told[:place]][2:5:2]
    of_config, of_generation = {
        "the list has another": (0, [0, late]),
        "the files disagree": (early, late),
        "config.json alone": (late, None),
        "a list in it": ([0, early], None),
    }[files]
    state(checkpoint, of_config, of_generation)
    expected, answer = theirs(checkpoint), ours(checkpoint, tmp_path / "engine")
    assert len(expected) < TOKENS
    assert list(answer.token_ids) == expected
