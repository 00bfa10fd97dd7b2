"""The experts that a request asks for are those of the reference, in both layouts, whatever shares the steps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import EXAMPLES
from served import Sent
from wire_tensors import wire

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.ensemble import ADDED_TOKEN_NAMES, TOKEN_NAMES
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.piece import join, join_by_answer
from triton_repo.errors import RequestError
from triton_repo.runtime.batching.loading import start
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from triton_repo.runtime.single.service import Request, Service
from triton_repo.runtime.steps.postprocessing import read_tokens
from triton_repo.runtime.steps.token_engine import Request as TokensRequest
from triton_repo.runtime.steps.token_engine import TokenEngine
from triton_repo.runtime.text.prompt import encode_prompt
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.routing import Routing
from trt_build.ort.session import Session

PROMPT = "def read_words(path):\n    "


@pytest.fixture(scope="module", params=["phixtral", "mixtral"])
def trained(request, made_once, trained_phixtral):
    """A trained example in fp32: its checkpoint, a session and the tokenizer. Its engine has the experts reversed."""
    source = trained_phixtral if request.param == "phixtral" else EXAMPLES / "tiny-mixtral/checkpoint"
    engine = made_once(
        f"routed-{request.param}",
        lambda folder: build_engine(BuildOptions(checkpoint=str(source), output=folder, precision="fp32")),
    )
    session = Session(open_engine(engine))
    assert session.routing.expert_order != tuple(sorted(session.routing.expert_order))
    return source, session, load_tokenizer(engine)


def expected_routing(source, prompt_ids, token_ids):
    """The two largest logits of the reference's routers, [T, M, 2], at the positions that the tokens' own logits come
    from, and the softmax over these two."""
    reference = Reference(read_model(open_checkpoint(source)))
    [(_, routers)] = reference.run([[*prompt_ids, *token_ids]])
    start = len(prompt_ids) - 1
    logits = routers[:, start : start + len(token_ids)].transpose(1, 0, 2)
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :2]
    exponents = np.exp(np.take_along_axis(logits, experts, axis=-1).astype(np.float64))
    return experts, exponents / exponents.sum(axis=-1, keepdims=True), routers.shape[-1]


def split(routing):
    pairs = np.array(routing)
    return pairs[..., 0].astype(int), pairs[..., 1]


def check(source, prompt_ids, answer):
    experts, weights, count = expected_routing(source, prompt_ids, answer.token_ids)
    found, shares = split(answer.routing)
    assert len(answer.routing) == len(answer.token_ids)
    np.testing.assert_array_equal(found, experts)
    np.testing.assert_allclose(shares, weights, atol=2e-4)
    assert answer.num_experts == count
    return found


def test_a_texts_experts_are_the_references(trained):
    source, session, tokenizer = trained
    options = GenerationOptions(prompt=PROMPT, max_tokens=24, return_routed_experts=True, end_id=-1, stream=True)
    pieces = list(generate(session, tokenizer, options))
    assert all(len(piece.routing) == len(piece.token_ids) for piece in pieces)
    experts = check(source, encode_prompt(tokenizer, PROMPT, 999), join(pieces))
    assert len(np.unique(experts)) == join(pieces).num_experts  # so that a swapped order would be seen


def test_an_ensembles_engine_gives_them_too_to_each_of_several_answers(trained):
    source, session, tokenizer = trained
    engine = TokenEngine(start(session, ModelParameters(slots=3)))
    prompt_ids = encode_prompt(tokenizer, PROMPT, 999)
    tensors = {
        "input_ids": np.array([prompt_ids], np.int32), "request_output_len": np.array([[9]], np.int32),
        "num_return_sequences": np.array([[2]], np.int32), "runtime_top_p": np.array([[1.0]], np.float32),
        "return_routed_experts": np.array([[True]]), "streaming": np.array([[True]]),
        "answer_key": np.array([[b"k"]], dtype=object),
    }  # fmt: skip
    sent = Sent(TokensRequest, request_id="", tensors=tensors)
    names = TOKEN_NAMES | ADDED_TOKEN_NAMES
    try:
        engine.submit(sent.request)
        found = [read_tokens({names[n]: value for n, value in one.items() if n in names}) for one in sent.all()]
    finally:
        engine.runner.close()
    for index in range(2):
        own = [tokens for tokens in found if tokens.sequence_index == index]
        answer = SimpleNamespace(
            token_ids=sum((tokens.token_ids for tokens in own), ()), num_experts=own[0].num_experts,
            routing=sum((tokens.routing for tokens in own), ()),
        )  # fmt: skip
        assert len(answer.token_ids) == 9
        check(source, prompt_ids, answer)


def test_requests_that_ask_and_that_do_not_share_steps_and_a_prompts_beginning(trained):
    """Prompts of several chunks, whose beginning the second takes over; others join and leave between, and some have
    several answers."""
    source, session, tokenizer = trained
    service = Service(start(session, ModelParameters(slots=4)), tokenizer)
    long = "import os\nimport sys\n" * 24
    prompts = [PROMPT, long + "x = ", long + "def f(", "class A:"] * 2
    asks = [number % 3 != 1 for number in range(len(prompts))]
    counts = [2 if number in (3, 6) else 1 for number in range(len(prompts))]
    try:
        sent = []
        for number, prompt in enumerate(prompts):
            values = {"text_input": prompt, "max_tokens": 3 + 4 * number, "stream": number % 2 == 0, "end_id": -1}
            values |= {"return_routed_experts": True} if asks[number] else {}
            if counts[number] > 1:
                values |= {"num_return_sequences": counts[number], "top_p": 1.0, "temperature": 1.0, "seed": number}
            sent.append(Sent(Request, request_id=str(number), tensors=wire(**values)))
            service.submit(sent[-1].request)
        for number, prompt in enumerate(prompts):
            answers = join_by_answer(sent[number].all())
            assert len(answers) == counts[number]
            for answer in answers:
                if asks[number]:
                    check(source, encode_prompt(tokenizer, prompt, 999), answer)
                else:
                    assert (answer.routing, answer.num_experts) == ((), None)
    finally:
        service.runner.close()


def test_tokens_that_were_drafted_have_their_own_experts(trained):
    """A text that repeats itself, so that a step computes several of its tokens, some of which are thrown away. Steps
    take no time by the engine's clock, so that every draft is computed."""
    source, session, tokenizer = trained
    service = Service(start(session, ModelParameters(slots=1)), tokenizer)
    service.runner.engine._clock = lambda: 0.0
    prompt = "x = [1, 2, 3]\ny = [4, 5, 6]\n" * 6
    sampled = {"temperature": 0.8, "top_p": 1.0, "seed": 3}
    values = wire(text_input=prompt, max_tokens=60, end_id=-1, return_routed_experts=True, **sampled)
    sent = Sent(Request, request_id="", tensors=values)
    try:
        service.submit(sent.request)
        [answer] = sent.all()
        stats = service.runner.engine.stats
    finally:
        service.runner.close()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    check(source, encode_prompt(tokenizer, prompt, 999), answer)


def refused(submit, sent):
    submit(sent.request)
    error = sent.last()
    assert isinstance(error, RequestError)
    assert error.kind == "INVALID_ARG"
    assert "return_routed_experts: found true, expected false; this engine gives no logits of routers" in str(error)


def test_an_engine_without_routers_refuses_by_name(scripted, byte_level):
    session = scripted("hello")
    service = Service(start(session, ModelParameters(slots=1)), byte_level)
    engine = TokenEngine(start(session, ModelParameters(slots=1)))
    values = wire(text_input="def ", max_tokens=2, return_routed_experts=True)
    tokens = {
        "input_ids": np.array([[5]], np.int32), "request_output_len": np.array([[2]], np.int32),
        "return_routed_experts": np.array([[True]]),
    }  # fmt: skip
    try:
        refused(service.submit, Sent(Request, request_id="", tensors=values))
        refused(engine.submit, Sent(TokensRequest, request_id="", tensors=tokens))
    finally:
        service.runner.close()
        engine.runner.close()
    with pytest.raises(RequestError, match="return_routed_experts: found true"):
        generate(session, byte_level, GenerationOptions(prompt="x", max_tokens=1, return_routed_experts=True))


def test_chosen_experts_are_in_the_checkpoints_numbers_the_heaviest_first():
    """By hand: three experts in the engine's order 2, 0, 1; expert 2 is left out of the second layer."""
    routing = Routing(layers=(0, 3), expert_order=(2, 0, 1), experts_per_token=2, dropped=((), (2,)))
    logits = np.array([[[1.0, 3.0, 2.0]], [[9.0, 0.0, 0.0]]], dtype=np.float32)  # [M, T, E]: one token
    experts, weights = routing.chosen(logits)
    assert experts.tolist() == [[[0, 1], [0, 1]]]
    np.testing.assert_allclose(weights[0], [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], [0.5, 0.5]], rtol=1e-6)
