"""An engine as the harness asks it: the same answers as lm_eval's own model `hf` of the same checkpoint, and as the
reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import EXAMPLES
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast

from triton_repo.evaluation.errors import EvaluationError
from triton_repo.evaluation.model import EngineModel

BAR = 1e-3
CODE = (EXAMPLES / "tiny-mixtral" / "train.py").read_text()
LONG = CODE * 6  # more tokens than the engine takes
PAIRS = [
    ("import os\nimport ", "sys"),  # the space at the context's end belongs to the continuation
    ("import os\nimport ", " re\n"),
    ("def main(", ")))"),
    ("", "x = 1"),  # an empty context is the start token
    ("<s>import", "os"),  # a context that begins with the start token gets no second one
    ("</s>import", "os"),
    (CODE[:300], CODE[300:340]),
    (CODE[:300], CODE[300:380]),
    ("a ", "b c d"),
    ("for i in range(10):\n    ", "print(i)"),
    (LONG[:4000], " = 5"),  # loses its beginning
]
KWARGS = [
    {"until": ["\n\n"], "max_gen_toks": 40},
    {"until": "\n", "max_gen_toks": 60},
    {"until": [")", "n"], "max_gen_toks": 50, "do_sample": False, "temperature": 0.0},
    {"max_gen_toks": 30},
]
PROMPTS = ["import os\n", "def main(", "class A", "<s>def", LONG[:6000]]


def asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def model_of(example, lanes=3):
    return EngineModel(example.session, example.tokenizer, lanes)


@pytest.fixture(scope="module")
def hf(mixtral):
    """lm_eval's model `hf` over transformers' own Mixtral."""
    from lm_eval.models.huggingface import HFLM

    model = MixtralForCausalLM.from_pretrained(
        mixtral.checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(mixtral.checkpoint)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, max_length=mixtral.session.max_sequence
    )


def test_scores_equal_those_of_the_harness_own_model(mixtral, hf):
    model = model_of(mixtral)
    found = model.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    expected = hf.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    assert max(abs(ours[0] - theirs[0]) for ours, theirs in zip(found, expected, strict=True)) < BAR
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert model.truncated == 1


def test_rolling_scores_equal_those_of_the_harness_own_model(mixtral, hf):
    texts = [("x",), (CODE[:900],), (LONG[:9000],), ("",)]
    found = model_of(mixtral).loglikelihood_rolling(asked("loglikelihood_rolling", texts))
    expected = hf.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-6, abs=BAR)


def test_answers_equal_those_of_the_harness_own_model(mixtral, hf):
    requests = [(prompt, dict(kwargs)) for prompt in PROMPTS for kwargs in KWARGS]
    model = model_of(mixtral)
    found = model.generate_until(asked("generate_until", requests))
    # Its own batches are of one length of context, which pads the others on the left; one by one nothing is padded.
    expected = [
        hf.generate_until(asked("generate_until", [(prompt, dict(kwargs))]), disable_tqdm=True)[0]
        for prompt, kwargs in requests
    ]
    assert found == expected
    assert len(set(found)) > 6
    assert model.truncated == len(KWARGS)


def test_blocks_of_requests_change_nothing(mixtral, monkeypatch):
    """Neither scores nor texts, nor which seed an answer is drawn by, nor the count of what is done."""

    def answers():
        shown = []
        model = EngineModel(mixtral.session, mixtral.tokenizer, 3, lambda *each: shown.append(each))
        drawn = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
        return (
            model.loglikelihood(asked("loglikelihood", PAIRS)),
            model.loglikelihood_rolling(asked("loglikelihood_rolling", [(CODE[:900],), (LONG[:4000],), ("x",)])),
            model.generate_until(asked("generate_until", [("def main(", drawn)] * 4)),
            [[done for what, done, _ in shown if what == kind][-1] for kind in ("continuations", "texts", "answers")],
            all(done <= total for _, done, total in shown),
        )

    whole = answers()
    monkeypatch.setattr("triton_repo.evaluation.model.BLOCK_LETTERS", 20)
    scores, rolling, texts, counts, within = answers()
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in whole[0]], abs=1e-4)
    assert rolling == pytest.approx(whole[1], abs=1e-2)
    assert (texts, counts, within) == (whole[2], [len(PAIRS), 3, 4], True)


def test_scores_are_those_of_the_reference(example):
    """Of the tokens that transformers' tokenizer gives: the context's own, and those of both together that come after
    as many. One of the two checkpoints puts a start token before a prompt."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(example.checkpoint / "tokenizer.json"))
    pairs = [("def main(", ")))"), ("def main(", " x"), (CODE[:300], CODE[300:350])]
    expected = []
    for context, continuation in pairs:
        before = tokenizer(context).input_ids
        expected.append((before, tokenizer(context + continuation).input_ids[len(before) :]))
    found = model_of(example).loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    for ours, theirs in zip(found, example.scores(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=BAR)


def test_the_tokenizers_differ_in_their_start_token(phixtral, mixtral):
    assert model_of(phixtral).tok_encode("x")[0] != model_of(phixtral).prefix_token_id
    assert model_of(mixtral).tok_encode("x")[0] == model_of(mixtral).prefix_token_id == 1
    assert model_of(mixtral).tok_encode("<s>x") == model_of(mixtral).tok_encode("x")
    assert 1 not in model_of(mixtral).tok_encode("x", add_special_tokens=False)


def test_the_tokens_of_an_empty_context_and_of_an_end_are_those_of_transformers(example):
    tokenizer = AutoTokenizer.from_pretrained(example.checkpoint)
    found = model_of(example).prefix_token_id, model_of(example).eot_token_id
    assert found == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_an_empty_context_without_a_start_token_is_the_end_token(mixtral):
    manifest = mixtral.session.engine.manifest
    facts = dataclasses.replace(manifest.tokenizer, special_tokens={"eos_token": "</s>"})
    assert model_with(mixtral, tokenizer=facts).prefix_token_id == 2
    assert model_with(mixtral, tokenizer=None).prefix_token_id == manifest.eos_token_ids[0]


def test_a_model_without_any_end_token_says_so_when_one_is_needed(mixtral):
    model = model_with(mixtral, tokenizer=None, eos_token_ids=())
    with pytest.raises(EvaluationError, match="names an end token"):
        model.loglikelihood(asked("loglikelihood", [("", "x")]), disable_tqdm=True)


def model_with(example, **changes):
    engine = dataclasses.replace(
        example.session.engine, manifest=dataclasses.replace(example.session.engine.manifest, **changes)
    )

    class Changed:
        def __getattr__(self, name):
            return engine if name == "engine" else getattr(example.session, name)

    return EngineModel(Changed(), example.tokenizer, 2)


@pytest.mark.parametrize("continuation", ["", "self"])
def test_a_continuation_without_a_token_of_its_own_is_refused(mixtral, continuation):
    """This tokenizer has a token for "(self", so "def main(" and "def main(self" have equally many."""
    with pytest.raises(EvaluationError, match="continuation of 0, expected at least one"):
        model_of(mixtral).loglikelihood(asked("loglikelihood", [("def main(", continuation)]), disable_tqdm=True)


def test_more_new_tokens_than_the_engine_takes_are_refused(mixtral):
    longest = mixtral.session.max_sequence
    with pytest.raises(EvaluationError, match=f"asks for {longest} new tokens, expected fewer than the {longest}"):
        model_of(mixtral).generate_until(asked("generate_until", [("x", {"max_gen_toks": longest})]))


def test_drawn_answers_repeat_with_their_place_and_differ_between_places(phixtral):
    requests = asked("generate_until", [("def ", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12})] * 3)
    found = model_of(phixtral).generate_until(requests)
    assert found == model_of(phixtral, lanes=1).generate_until(requests)
    assert len(set(found)) == 3


def test_a_template_is_applied_to_a_conversation(mixtral):
    facts = mixtral.session.engine.manifest.tokenizer
    templated = dataclasses.replace(
        facts, chat_templates={"default": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"}
    )
    model = model_with(mixtral, tokenizer=templated)
    messages = [{"role": "user", "content": "hello"}]
    assert model.apply_chat_template(messages) == "[user]hello[answer]"
    assert model.apply_chat_template(messages, add_generation_prompt=False) == "[user]hello"
