"""OpenAI's own client, through the gateway, to a real Triton that serves a trained example at fp32.

ci/gateway_clients.py has the clients whose packages tests do not install.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest
from gateway_in_thread import CHATML, Gateway, running

from clients.gateway.settings import Settings
from clients.generation import Client, GenerationRequest
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.ort.build import BuildOptions, build_engine

MODEL = "tiny"
PROMPTS = ["def main(self):\n    return", "import os\nimport sys", "class A:"]


@dataclass
class Live:
    gateway: Gateway
    grpc_url: str
    checkpoint: str

    @property
    def client(self) -> openai.OpenAI:
        return self.gateway.client()

    def direct(self, prompt: str, **fields):
        """The greedy answer of the model itself, without the gateway."""
        with Client(self.grpc_url) as client:
            return client.generate(GenerationRequest(model=MODEL, prompt=prompt, **{"max_tokens": 12, **fields}))


@pytest.fixture(scope="module")
def live(tmp_path_factory, made_once, trained_phixtral) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    engine = made_once(
        "eval-phixtral-fp32",
        lambda made: build_engine(BuildOptions(checkpoint=str(trained_phixtral), output=made, precision="fp32")),
    )
    package_engine(
        PackageOptions(engine=engine, name=MODEL, output=folder / "repository", onnxruntime=ModelParameters(threads=1))
    )
    template = folder / "template.jinja"
    template.write_text("{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}" + CHATML)
    with (
        running_server(ServerOptions(repository=folder / "repository")) as server,
        running(
            Settings(tritons=(server.grpc_url,), repository=folder / "repository", chat_template=template)
        ) as gateway,
    ):
        yield Live(gateway, server.grpc_url, str(trained_phixtral))


def test_a_chat_is_the_models_own_answer_to_the_rendered_template(live):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "import os"}]
    expected = live.direct("<|system|>be brief\n<|user|>import os\n<|assistant|>")
    asked = {"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = live.client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.num_input_tokens
    chunks = list(live.client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_log_probabilities_are_the_models(live):
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    answer = live.client.completions.create(**asked, prompt="def main(", logprobs=2, echo=True)
    own = live.direct("def main(", max_tokens=6, return_log_probs=True, num_log_probs=2, return_prompt_log_probs=True)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == "def main(" + own.text == "".join(found.tokens)
    assert found.token_logprobs == [None, *own.prompt_log_probs, *own.log_probs]
    places = zip(found.text_offset, found.tokens, strict=True)
    assert all(answer.choices[0].text[place:].startswith(token) for place, token in places)
    assert [max(top.values()) for top in found.top_logprobs[-6:]] == list(own.log_probs)
    assert [max(top.values()) for top in found.top_logprobs[1:-6]] == [top[0][1] for top in own.prompt_top_log_probs]
    chat = live.client.chat.completions.create(
        **asked, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3
    )
    tokens = chat.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == chat.choices[0].message.content
    assert [token.logprob for token in tokens] == [token.top_logprobs[0].logprob for token in tokens]


def test_several_answers_are_drawn_by_one_seed(live):
    asked = {"model": MODEL, "prompt": "def ", "max_tokens": 8, "temperature": 1, "n": 3, "seed": 7}
    texts = [choice.text for choice in live.client.completions.create(**asked).choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in live.client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_an_answer_keeps_to_a_json_schema(live):
    schema = {"enum": ["yes", "no"]}
    answer = live.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=40, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content) in ("yes", "no")


def test_a_call_that_is_required_fits_its_functions_schema(live):
    """By a model that was trained on none."""
    parameters = {"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"],
                  "additionalProperties": False}  # fmt: skip
    asked = {
        "model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 120, "temperature": 0,
        "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("a", "b")],
    }  # fmt: skip
    for choice, names, reason in (
        ("required", ("a", "b"), "tool_calls"),
        ({"type": "function", "function": {"name": "b"}}, ("b",), "stop"),
    ):
        whole = live.client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        with live.client.chat.completions.stream(**asked, tool_choice=choice) as events:
            streamed = events.get_final_completion().choices[0]
        for found in (whole, streamed):
            (call,) = found.message.tool_calls
            assert call.function.name in names
            assert json.loads(call.function.arguments)["size"] in ("small", "large")
            assert found.finish_reason == reason


def test_token_ids_reach_the_model_as_they_are(live):
    """Also where the tokenizer would make others of their text."""
    tokenizer = load_tokenizer(live.gateway.state._folder(MODEL))
    apart = [tokenizer.encode(letter)[0] for letter in "return"]
    assert tokenizer.encode("return") != apart
    answer = live.client.completions.create(
        model=MODEL, prompt=[apart, tokenizer.encode("x = ")], max_tokens=0, echo=True, logprobs=0
    )
    assert [choice.text for choice in answer.choices] == ["return", "x = "]
    assert len(answer.choices[0].logprobs.tokens) == 6
    assert answer.usage.completion_tokens == 0


def test_what_the_server_refuses_is_openais_error(live):
    with pytest.raises(openai.BadRequestError, match=r"found a prompt of .* tokens, expected at most 511"):
        live.client.completions.create(model=MODEL, prompt="a b c " * 600)
    with pytest.raises(openai.NotFoundError, match="does not exist; this gateway has: tiny"):
        live.client.completions.create(model="gpt-4", prompt="a")


def reference_scores(live: Live, pairs):
    """(log-probability, is greedy) of each continuation by the float32 reference."""
    tokenizer = load_tokenizer(live.gateway.state._folder(MODEL))
    windows, targets = [], []
    for context, continuation in pairs:
        whole, before = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        windows.append([*tokenizer.encode(context), *whole[before:]][:-1])
        targets.append(whole[before:])
    reference = Reference(read_model(open_checkpoint(live.checkpoint)))
    for (logits, _), target in zip(reference.run(windows), targets, strict=True):
        last = np.array(logits, dtype=np.float64)[-len(target) :]
        logs = last - np.log(np.exp(last).sum(1, keepdims=True))
        yield float(logs[np.arange(len(target)), target].sum()), bool((last.argmax(1) == target).all())


def test_the_prompts_log_probabilities_are_the_references(live):
    """What lm-evaluation-harness sums (ci/gateway_clients.py runs it): the prompt as token ids, echoed."""
    tokenizer = load_tokenizer(live.gateway.state._folder(MODEL))
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    answer = live.client.completions.create(model=MODEL, prompt=prompts, max_tokens=1, echo=True, logprobs=1)
    reference = Reference(read_model(open_checkpoint(live.checkpoint)))
    for choice, ids, (logits, _) in zip(answer.choices, prompts, reference.run(prompts), strict=True):
        logs = np.array(logits, dtype=np.float64)[:-1]
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        found = choice.logprobs
        assert found.token_logprobs[1:-1] == pytest.approx(logs[np.arange(len(ids) - 1), ids[1:]].tolist(), abs=1e-3)
        tops = [max(top.values()) for top in found.top_logprobs[1:-1]]
        assert tops == pytest.approx(logs.max(1).tolist(), abs=1e-3)


def test_the_commands_of_the_docs_work(live):
    """Each block of docs/gateway.md that begins with curl, with this gateway's address and model in place of its."""
    page = Path(__file__).parents[3].joinpath("docs/gateway.md").read_text()
    blocks = re.findall(r"^```sh\n(curl .*?)^```", page, re.S | re.M)
    assert len(blocks) >= 5
    for block in blocks:
        command = block.replace("http://127.0.0.1:8080", live.gateway.url).replace("phixtral", MODEL)
        ran = subprocess.run(["bash", "-c", command.replace("curl", "curl -sS --fail-with-body")],
                             capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
        assert ran.returncode == 0, f"{block}\n{ran.stdout}{ran.stderr}"
        assert '"error"' not in ran.stdout, block
