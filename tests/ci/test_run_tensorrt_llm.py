"""The script for a machine with a GPU, run from its shell to its JSON: engines by TensorRT-LLM's stand-in, and in the
place of the server that needs a GPU, a real Triton with the same ensemble over the ONNX Runtime engine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load, save

from export.tokenizer.loading import load_tokenizer
from triton_repo.errors import ServerError
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

SCRIPTS = Path(__file__).parents[2] / "ci" / "gpu"
LOAD = ["--concurrency", "1,3", "--rounds", "1", "--prompt-tokens", "24", "--output-tokens", "6"]
WORDS = ["--precisions", "fp16", "--verify-tokens", "32", "--text-tokens", "8", *LOAD]


@pytest.fixture(scope="module")
def script():
    """The program's module, with its neighbours on the path as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import run_tensorrt_llm

        yield run_tensorrt_llm


@pytest.fixture(scope="module")
def failed_at_serving(container, tiny_checkpoint, tmp_path_factory):
    """What the shell script did where the server does not come up, and its output."""
    output = tmp_path_factory.mktemp("gpu") / "results"
    return container.run("--checkpoint", tiny_checkpoint, "--output", output, *WORDS), output


def exchange_experts(path: Path) -> None:
    """Give the first two experts of the first layer of a stand-in's engine each other's place."""
    tensors = load(path.read_bytes())
    experts = tensors["transformer.layers.0.mlp.proj.weight"]
    experts[[0, 1]] = experts[[1, 0]]
    path.write_bytes(save(tensors))


@contextlib.contextmanager
def served_by_nobody(*_folders):
    raise ServerError("serving: no server is needed for this")
    yield


def read(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def entries(output: Path) -> dict[str, dict]:
    [model] = read(output)["models"].values()
    return model["engines"]["fp16"]


def options_of(script, tiny_checkpoint, output):
    words = ["--checkpoint", str(tiny_checkpoint), "--output", str(output), *WORDS]
    return script.read_options(script.read_arguments(None, words))


@pytest.fixture
def rerun(script, container, failed_at_serving, tiny_checkpoint, monkeypatch):
    """Run the script again in this process; the server is given."""
    output = failed_at_serving[1]

    def rerun(serving=None, **changes):
        options = replace(options_of(script, tiny_checkpoint, output), **changes)
        with monkeypatch.context() as inside:
            for name in ("PATH", "PYTHONPATH"):
                inside.setenv(name, container.environment[name])
            # The programs are those of the first run, by their commands.
            started = {**vars(sys), "executable": container.environment["PYTHON"]}
            inside.setattr("engine_steps.sys", SimpleNamespace(**started))
            return script.run(options, script.read_readings(), serving)

    return rerun


@pytest.fixture
def onnx_serving(tiny_engines):
    """Serves the same checkpoint's ONNX Runtime engine, in float32, through the same three steps."""

    @contextlib.contextmanager
    def serving(_engine, repository, log):
        from serving_steps import MODEL, Endpoint

        options = PackageOptions(engine=tiny_engines("fp32"), name=MODEL, output=repository, layout="ensemble")
        package_engine(options)
        with pytest.MonkeyPatch.context() as outside:
            outside.setenv("PATH", os.pathsep.join(os.environ["PATH"].split(os.pathsep)[2:]))
            outside.delenv("PYTHONPATH")
            with running_server(ServerOptions(repository=repository, log=log)) as server:
                yield Endpoint(grpc_url=server.grpc_url, http_url=server.http_url, model=MODEL, world_size=1)

    return serving


def test_engines_are_built_compared_and_kept_where_the_server_fails(failed_at_serving):
    done, output = failed_at_serving
    assert done.returncode == 1, done.stderr
    found = entries(output)
    assert {step: entry["status"] for step, entry in found.items()} == {
        "checkpoint": "done", "engine": "done", "verify": "done", "serve": "failed",
    }  # fmt: skip
    assert found["verify"]["failures"] == []
    assert 0 < found["verify"]["mean_kl"] < 1e-4
    assert found["engine"]["rank_bytes"] == {"rank0.engine": found["engine"]["bytes"]}
    assert found["engine"]["bytes"] == (output / "engines/tiny-phixtral-fp16/rank0.engine").stat().st_size
    assert found["engine"]["flags"][:2] == ["--model_cls_file", "--model_cls_name"]
    assert found["engine"]["gpu"] == {"name": "Stand-in SM80", "sm": 80}
    assert "tritonserver ended with status 7 before it was ready" in found["serve"]["error"]
    assert "this driver has no GPU behind it" in found["serve"]["error"]
    data = read(output)
    assert data["errors"] == [f"tiny-phixtral fp16 serve: {found['serve']['error']}"]
    assert data["machine"] == {
        "gpus": [{"name": "Stand-in SM80", "sm": 80, "memory_bytes": 81559 << 20}],
        "driver": "590.44.01",
        "driver_cuda": "13.1",
        "packages": data["machine"]["packages"],
        "image": {},
    }
    assert data["machine"]["packages"]["tensorrt_llm"] == "1.2.0"
    assert "FAILED tiny-phixtral fp16 serve: ServerError" in done.stdout
    # The backend is the C++ one: it is the repository that `moeship package` makes of such an engine.
    config = (output / "repositories/tiny-phixtral-fp16/tensorrt_llm/config.pbtxt").read_text()
    assert 'backend: "tensorrtllm"' in config


def test_the_references_answers_are_those_of_another_runtime(failed_at_serving, tiny_engines):
    engine = open_engine(tiny_engines("fp32"))
    tokenizer, session = load_tokenizer(engine.folder), Session(engine)
    [model] = read(failed_at_serving[1])["models"].values()
    assert len(model["reference"]["answers"]) == 4
    for answer in model["reference"]["answers"]:
        cache, step = session.new_cache(), tokenizer.encode_prompt(answer["prompt"])
        for token, margin in zip(answer["token_ids"], answer["margins"], strict=True):
            logits = session.run(cache, step)[: tokenizer.size].copy()  # the ids after these stand for no text
            assert int(logits.argmax()) == token
            second, first = np.sort(logits)[-2:]
            assert margin == pytest.approx(first - second, abs=2e-4)
            step = [token]


def test_a_second_run_takes_up_what_is_done_and_measures_a_real_server(rerun, failed_at_serving, onnx_serving, capsys):
    output = failed_at_serving[1]
    before = entries(output)
    assert rerun(onnx_serving) == 0
    after = entries(output)
    assert [after[step] for step in ("checkpoint", "engine", "verify")] == [
        before[step] for step in ("checkpoint", "engine", "verify")
    ]
    serve = after["serve"]
    assert (serve["status"], serve["failures"], read(output)["errors"]) == ("done", [], [])
    assert serve["triton"].count(".") == 2
    assert [text["equals_reference"] for text in serve["texts"]] == [True] * 4
    assert all(text["streamed_equals_whole"] and text["text"] == text["reference_text"] for text in serve["texts"])
    for level, streams, requests in zip(serve["levels"], (1, 3), (8, 12), strict=True):
        assert level["concurrency"] == streams
        [one] = level["rounds"]
        assert (
            one["tokens"]
            == 6 * requests
            == sum(tokens for sample in one["samples"] for _, tokens in sample["arrivals"])
        )
        assert level["tokens_per_s"]["median"] == pytest.approx(one["tokens"] / one["wall_s"], rel=1e-3)
        assert level["time_to_first_token_s"]["n"] == requests
        assert 0 < level["time_to_first_token_s"]["p50"] <= level["time_to_first_token_s"]["p99"] < one["wall_s"]
        assert level["inter_token_s"]["n"] > 0
        assert len(one["samples"]) == requests
    said = capsys.readouterr().out
    assert "greedy texts as the reference's: 4 of 4" in said
    assert "  3 streams: " in said
    assert len(read(output)["runs"]) == 2
    assert serve["moeship"].startswith("0.1.0")


def test_an_engine_that_differs_from_the_reference_ends_with_status_1(rerun, failed_at_serving, tiny_checkpoint):
    output = failed_at_serving[1]
    exchange_experts(output / "engines/tiny-phixtral-fp16/rank0.engine")
    assert rerun(served_by_nobody, verify_tokens=8) == 1
    verify = entries(output)["verify"]
    assert verify["status"] == "done"
    assert any("logits differ" in failure for failure in verify["failures"])
    assert [text for text in read(output)["failures"] if text.startswith("tiny-phixtral fp16 verify: ")]
