"""What a machine with a GPU runs, walked through on the CPU's kernels: arithmetic, refusals, verdict and report."""

from __future__ import annotations

import ast
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import pytest

from trt_build.comparison.parity import THRESHOLDS
from trt_build.ort.engine import open_engine

SCRIPTS = Path(__file__).parents[2] / "ci" / "gpu"


@pytest.fixture
def script(monkeypatch):
    """The module ci/gpu/onnxruntime_cuda.py, with its neighbours on the path as when it is run."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import onnxruntime_cuda

    return onnxruntime_cuda


def run(name, *words):
    """A script as a program in a process of its own, on a machine without a GPU."""
    command = [sys.executable, SCRIPTS / name, *map(str, words)]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=no_gpu)


def run_here(name, *words):
    """The same in this process, which has loaded torch and transformers already: a fresh one takes seconds for them."""
    command, out, err = [str(SCRIPTS / name), *map(str, words)], io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.syspath_prepend(SCRIPTS)
        patch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(command[0], run_name="__main__")
    return subprocess.CompletedProcess(command, ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tiny_engines):
    """An int4 CUDA engine with golden logits of 48 tokens."""
    folder = tmp_path_factory.mktemp("gpu") / "engine"
    shutil.copytree(tiny_engines("int4", "cuda"), folder)
    done = run("write_golden.py", folder, "--tokens", 48)
    assert done.returncode == 0, done.stderr
    return folder


def measure(engine, output, *words):
    sizes = ["--prompt", 12, "--steps", 3, "--batch", 1, 3, "--copy-gb", 0.01]
    return run("onnxruntime_cuda.py", engine, "--output", output, "--provider", "cpu", *sizes, *words)


def test_the_gpu_machine_needs_onnx_runtime_and_numpy_alone():
    for name in ("onnxruntime_cuda", "device_engine", "golden"):
        tree = ast.parse((SCRIPTS / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        outside = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
        assert outside <= {"numpy", "onnxruntime", "device_engine", "golden"}


def test_an_engine_is_judged_measured_and_reported(tmp_path, engine):
    done = measure(engine, tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert report["provider"] == "cpu"
    [found] = report["engines"]
    assert found["parity"]["failures"] == []
    assert found["parity"]["tokens"] == 48
    assert found["parity"]["mean_kl"] <= 1e-6
    assert [row["batch"] for row in found["speed"]] == [1, 3]
    for row in found["speed"]:
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        share = row["bytes_per_step"] / row["step_s"] / report["bandwidth_bytes_per_s"]
        assert row["share_of_bandwidth"] == pytest.approx(share)
    assert "within its limits" in done.stdout


def test_a_run_that_is_cut_off_keeps_what_it_measured(tmp_path, engine, script, monkeypatch):
    def cut_off(*words):
        yield {"batch": 1, "prefill_tokens_per_s": 2.0, "decode_tokens_per_s": 1.0, "share_of_bandwidth": 0.5}
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "measure_speed", cut_off)
    sizes = ["--prompt", "12", "--steps", "3", "--batch", "1", "3", "--copy-gb", "0.01"]
    options = script.read_options([str(engine), "--output", str(tmp_path), "--provider", "cpu", *sizes])
    with pytest.raises(KeyboardInterrupt):
        script.run(options)
    [path] = tmp_path.iterdir()
    [found] = json.loads(path.read_text())["engines"]
    assert found["parity"]["tokens"] == 48
    assert [row["batch"] for row in found["speed"]] == [1]


@pytest.mark.parametrize(
    ("edit", "failure"),
    [
        (lambda golden: golden.update(logits=golden["logits"][:, ::-1]), "mean_kl"),
        (lambda golden: golden.update(logits=np.full_like(golden["logits"], np.nan)), "mean_decoded_kl nan"),
        (lambda golden: golden.update(router_logits=golden["router_logits"][..., ::-1]), "routing_agreement"),
    ],
)
def test_an_engine_that_differs_from_its_golden_logits_ends_with_status_1(tmp_path, engine, edit, failure):
    wrong = Path(shutil.copytree(engine, tmp_path / "wrong"))
    golden = dict(np.load(wrong / "golden.npz"))
    edit(golden)
    np.savez(wrong / "golden.npz", **golden)
    done = measure(wrong, tmp_path)
    assert done.returncode == 1
    assert failure in done.stdout
    [report] = tmp_path.glob("*.json")
    assert json.loads(report.read_text())["engines"][0]["parity"]["failures"]


def test_the_reference_as_golden_is_held_to_what_verify_allows(tmp_path, tiny_checkpoint, tiny_engines):
    folder = Path(shutil.copytree(tiny_engines("fp16", "cuda"), tmp_path / "engine"))
    assert run_here("write_golden.py", folder, "--reference", tiny_checkpoint, "--tokens", 48).returncode == 0
    with np.load(folder / "golden.npz") as golden:
        assert json.loads(str(golden["limits"]))["mean_kl"] == THRESHOLDS["fp16"].mean_kl
        assert str(golden["source"]).startswith("transformers in float32")
    assert measure(folder, tmp_path).returncode == 0


def test_the_weights_are_counted_by_what_reads_them(engine):
    manifest = open_engine(engine).manifest
    with np.load(engine / "golden.npz") as golden:
        experts, embedding, others = (int(golden[f"{n}_bytes"]) for n in ("expert", "embedding", "other"))
    # 5 experts of fc1 [448, 192] and fc2 [192, 448] in 3 layers: 4 bits, a float16 scale for 64, float16 biases.
    assert experts == 3 * 5 * (2 * 448 * 192 * (4 / 8 + 2 / 64) + 2 * (448 + 192))
    # 352 rows of 192: 8 bits, a float32 scale and a zero point for 64.
    assert embedding == 352 * 192 * (1 + 5 / 64)
    weights = 3 * (5 * (2 * 448 * 192 + 448 + 192) + 5 * 192 + 4 * 192 * 192 + 4 * 192 + 2 * 192) + 2 * 192
    weights += 2 * 352 * 192 + 352
    total = manifest.precision.average_bits_per_weight * weights / 8
    assert experts + embedding + others == pytest.approx(total, rel=1e-3)


def test_a_step_reads_the_experts_that_its_tokens_touch(script, engine):
    assert script.experts_touched(4, 2, 1) == 2
    assert script.experts_touched(4, 2, 2) == 3  # two tokens leave a given expert untouched with probability 1/4
    assert script.experts_touched(8, 2, 1000) == pytest.approx(8)
    facts, golden = script.read_facts(engine), script.read_golden(engine / "golden.npz")
    assert facts.cache_bytes_per_token == 2 * 3 * 6 * 32 * 2
    one = golden.other_bytes + golden.expert_bytes * 2 / 5 + golden.embedding_bytes / 352 + 10 * 2304
    assert script.step_bytes(facts, golden, 1, 10) == pytest.approx(one)


def test_the_model_that_measures_bandwidth_is_what_onnx_reads(script):
    model = onnx.load_from_string(script.neg_model())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Neg"]
    assert script.measure_bandwidth("cpu", 4096) > 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--provider", "cuda"], "looking for the GPU: ONNX Runtime"),
        (["--prompt", "700"], "prompt and steps exceed its context of 640"),
        (["--output", "/nowhere"], "writing into /nowhere: no such folder"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(tmp_path, engine, words, text):
    done = measure(engine, tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_cuda_engine_are_refused(tmp_path, tiny_engine, tiny_engines):
    for folder, text in (
        (tiny_engine, "built for cpu; build it with --provider cuda"),
        (tiny_engines("int4", "cuda"), "no golden.npz there"),
        (tmp_path, "no engine there"),
    ):
        done = measure(folder, tmp_path)
        assert done.returncode == 2
        assert text in done.stderr
    assert "is built for cpu, expected cuda" in run("write_golden.py", tiny_engine).stderr


def test_without_the_gpu_package_the_null_runtime_says_what_to_install(engine):
    done = run("null_cuda.py", engine)
    assert (done.returncode, done.stdout) == (2, "")
    assert "libonnxruntime_providers_cuda.so: this onnxruntime has none; install onnxruntime-gpu" in done.stderr


def test_kernels_are_named_by_what_they_do(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import null_cuda

    assert null_cuda.short_name("void flash::forward<96, float>(int)") == "flash::forward"
    assert (
        null_cuda.short_name("_ZN7cutlass6KernelINS_9MoeFCGemmINS_11GELU_taylorE") == "cutlass MoeFCGemm, GELU_taylor"
    )
    log = "running 5\nlaunched a\nrunning 1\nlaunched b\nrunning 1\nlaunched c\nlaunched c\n"
    assert null_cuda.report(Path("engine"), log).splitlines() == [
        "engine: taken whole; a decode step launches 2 kernels", "     2 c",
    ]  # fmt: skip


def test_the_reference_in_float16_is_timed_in_the_same_rows(tmp_path, tiny_checkpoint):
    words = ["--device", "cpu", "--batch", 1, 2, "--prompt", 8, "--steps", 2]
    done = run_here("transformers_fp16.py", tiny_checkpoint, "--output", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    [report] = tmp_path.iterdir()
    for row in json.loads(report.read_text())["speed"]:
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
    refused = run_here("transformers_fp16.py", tiny_checkpoint, "--output", tmp_path)
    assert refused.returncode == 2
    assert "sees none; install its build for CUDA" in refused.stderr


def test_texts_of_the_serving_session_are_written_and_compared(tmp_path, tiny_engines):
    engine = tiny_engines("fp32", "cpu")
    written = run("serving_texts.py", engine, "--write", tmp_path / "texts.json")
    assert written.returncode == 0, written.stderr
    assert len(json.loads((tmp_path / "texts.json").read_text())) == 8
    compared = run_here("serving_texts.py", engine, "--expect", tmp_path / "texts.json")
    assert compared.stdout.startswith("8 of 8 greedy texts of 64 tokens are equal\n"), compared.stderr
    (tmp_path / "texts.json").write_text(json.dumps({"def main(": "another"}))
    compared = run_here("serving_texts.py", engine, "--expect", tmp_path / "texts.json")
    assert compared.stdout.startswith("0 of 8")


def test_a_profile_without_a_gpu_says_what_is_missing(engine):
    done = run_here("profile_decode.py", engine, "--prompt", 12)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sees none; install its build for CUDA" in done.stderr
