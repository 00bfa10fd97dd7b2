"""Ask a gateway with clients that nobody here wrote.

    python ci/gateway_clients.py --url http://127.0.0.1:8080 --model tiny --checkpoint CHECKPOINT

It runs the clients that this Python has installed, and names the others. They are lm-evaluation-harness, LangChain's
client of OpenAI's API, llama-index's of Triton, and aiperf; the last three are no packages of the extra `dev`:

    python -m venv clients && clients/bin/pip install langchain-openai llama-index-llms-nvidia-triton aiperf

The model is one of the examples with a chat template (--chat-template of `moeship serve`). lm-evaluation-harness needs
--checkpoint, whose float32 reference its log-probabilities are compared with, so that the engine must be fp32; it is in
the extra `dev`, where it runs by --only lm_eval. llama-index's client asks Triton itself,
at --triton HOST:PORT. Exit status 1 where a client failed, or where none could run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_DIFFERENCE = 1e-3
PAIRS = [
    ("def main(self", "):\n    return"), ("import os", "\nimport sys"), ("x =", " 1"), ("class A", ":\n    def"),
    ("for i in", " range(10):"), ("def main(", "self"),
]  # fmt: skip


def lm_eval(arguments: argparse.Namespace) -> str:
    """Log-likelihoods by local-completions against the reference, and an answer by local-chat-completions."""
    sys.path.insert(0, str(ROOT))
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    asked = LocalCompletionsAPI(
        base_url=f"{arguments.url}/v1/completions", model=arguments.model, tokenizer=str(arguments.checkpoint),
        tokenizer_backend="huggingface", tokenized_requests=True, max_length=512, batch_size=2,
    )  # fmt: skip
    instances = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
    found = asked.loglikelihood(instances, disable_tqdm=True)
    expected = list(reference_scores(arguments.checkpoint))
    most = max(abs(value - known) for (value, _), (known, _) in zip(found, expected, strict=True))
    assert most <= MOST_DIFFERENCE, (found, expected)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected], (found, expected)
    chats = LocalChatCompletion(
        base_url=f"{arguments.url}/v1/chat/completions", model=arguments.model, tokenizer_backend=None
    )
    chat = JsonChatStr(json.dumps([{"role": "user", "content": "import os"}]))
    wish = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    (text,) = chats.generate_until([Instance("generate_until", {}, (chat, wish), 0)], disable_tqdm=True)
    assert text
    return f"{len(PAIRS)} log-likelihoods differ from the reference's by {most:.1e} at most; a chat: {text!r}"


def reference_scores(checkpoint: Path) -> Iterator[tuple[float, bool]]:
    """(log-probability, is greedy) of each continuation by the float32 reference."""
    import numpy as np
    from transformers import AutoTokenizer

    from export.checkpoint.folder import open_checkpoint
    from export.families import read_model
    from export.reference.model import Reference

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    reference = Reference(read_model(open_checkpoint(str(checkpoint))))
    for context, continuation in PAIRS:
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        target = whole[len(before) :]
        ((logits, _),) = reference.run([[*before, *target][:-1]])
        last = np.array(logits, dtype=np.float64)[-len(target) :]
        logs = last - np.log(np.exp(last).sum(1, keepdims=True))
        yield float(logs[np.arange(len(target)), target].sum()), bool((last.argmax(1) == target).all())


def langchain(arguments: argparse.Namespace) -> str:
    """A chat, whole and streamed, and a completion."""
    from langchain_openai import ChatOpenAI, OpenAI

    base = {"base_url": f"{arguments.url}/v1", "api_key": "none", "model": arguments.model, "temperature": 0}
    chat = ChatOpenAI(**base, max_tokens=12)
    messages = [("system", "be brief"), ("human", "import os")]
    whole = chat.invoke(messages)
    streamed = "".join(part.content for part in chat.stream(messages))
    assert whole.content == streamed, (whole.content, streamed)
    assert whole.usage_metadata["output_tokens"] > 0
    text = OpenAI(**base, max_tokens=8).invoke("def main(")
    assert text
    return f"chat {streamed!r}, completion {text!r}"


def llama_index(arguments: argparse.Namespace) -> str:
    """A completion, asked of Triton itself."""
    from llama_index.llms.nvidia_triton import NvidiaTriton

    model = NvidiaTriton(server_url=arguments.triton, model_name=arguments.model, tokens=12, temperature=1.0, top_k=1)
    text = model.complete("def main(").text
    assert text
    return f"completion {text!r}"


def aiperf(arguments: argparse.Namespace) -> str:
    """A load of 20 streamed chats, 4 at a time."""
    program = shutil.which("aiperf", path=str(Path(sys.executable).parent))
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(program, "profile", "--model", arguments.model, "--url", arguments.url, "--endpoint-type", "chat"),
            *("--streaming", "--request-count", "20", "--concurrency", "4", "--output-artifact-dir", folder),
            *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--ui", "none"),
            *("--tokenizer", str(arguments.checkpoint or arguments.model)),
        ]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
        (results,) = Path(folder).rglob("profile_export_aiperf.json")
        found = json.loads(results.read_text())
    count, errors = found["request_count"]["avg"], found.get("error_request_count", {}).get("avg", 0)
    assert (count, errors) == (20, 0), found
    return f"20 chats, first tokens after {found['time_to_first_token']['avg']:.1f} ms on average"


CLIENTS: dict[str, tuple[str, Callable[[argparse.Namespace], str]]] = {
    "lm_eval": ("lm_eval", lm_eval),
    "langchain-openai": ("langchain_openai", langchain),
    "llama-index-llms-nvidia-triton": ("llama_index.llms.nvidia_triton", llama_index),
    "aiperf": ("aiperf", aiperf),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of the gateway, without /v1")
    parser.add_argument("--triton", default="127.0.0.1:8001", help="gRPC address of the server behind it")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path, help="the model's checkpoint")
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    arguments = parser.parse_args()
    with urllib.request.urlopen(f"{arguments.url}/health", timeout=10) as response:
        assert arguments.model in json.loads(response.read())["models"]
    failed = ran = 0
    for name in arguments.only:
        module, ask = CLIENTS[name]
        try:
            if find_spec(module) is None:
                raise ModuleNotFoundError(module)
        except ModuleNotFoundError:
            print(f"{name}: not installed in this Python")
            continue
        ran += 1
        try:
            print(f"{name}: {ask(arguments)}", flush=True)
        except Exception:
            failed += 1
            print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
    return int(failed > 0 or not ran)


if __name__ == "__main__":
    sys.exit(main())
