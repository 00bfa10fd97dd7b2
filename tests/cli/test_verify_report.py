"""`moeship verify ENGINE... --report OUT.html`: what is written, what is refused, and how the command ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint
from conftest import QUANTIZABLE
from html_pages import Page, loads_nothing
from manifests import edit_manifest, read_values

from cli.main import main
from export.reference.model import Reference
from trt_build.comparison.parity import THRESHOLDS
from trt_build.engine_files import record_files
from trt_build.errors import LibraryMissing
from trt_build.manifest import TRTLLM_BACKEND
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.trtllm.engine import (
    FORMAT_VERSION,
    GpuRecord,
    ParallelRecord,
    TrtllmManifest,
    TrtllmPrecisionRecord,
    write_trtllm_manifest,
)


@pytest.fixture
def engines(tmp_path, tiny_engines):
    """(precision, kernels) -> a copy of an engine, whose engine.json this test may write."""

    def engines(precision, kernels=None):
        return shutil.copytree(tiny_engines(precision, kernels=kernels), tmp_path / precision)

    return engines


@pytest.fixture
def judged(monkeypatch):
    """Few tokens are judged as many are."""
    for name, limits in THRESHOLDS.items():
        monkeypatch.setitem(THRESHOLDS, name, dataclasses.replace(limits, judged_tokens=0))


@pytest.fixture
def verify(tiny_checkpoint, capsys):
    """Runs the command over 64 tokens; returns its status, and what it said on stdout and stderr."""

    def verify(*words, reference=tiny_checkpoint):
        status = main(["-q", "verify", *map(str, words), "--reference", str(reference), "--tokens", "64"])
        return status, *capsys.readouterr()

    return verify


def trtllm_engine(folder, source, verification):
    """An engine for TensorRT-LLM of the model of the engine `source`: a true manifest around files of a few bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "rank0.engine").write_bytes(b"rank")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    tiny = open_engine(source, check_digests=False).manifest
    manifest = TrtllmManifest(
        format_version=FORMAT_VERSION, model="tiny", family=tiny.family, backend=TRTLLM_BACKEND,
        precision=TrtllmPrecisionRecord(
            name="int4", quant_algo="W4A16", dtype="float16", group_size=None, average_bits_per_weight=4.5
        ),
        architecture=tiny.architecture, parallel=ParallelRecord(tp_size=1, pp_size=1, moe_tp_size=1, moe_ep_size=1),
        gpu=GpuRecord(name="NVIDIA <A100>", sm=80), max_sequence=640, max_batch=8, max_num_tokens=512,
        kv_cache_fraction=0.85, use_paged_context_fmha=True, tokenizer_size=tiny.tokenizer_size,
        head_masks_unused_ids=True, eos_token_ids=tiny.eos_token_ids, tokenizer=tiny.tokenizer, source=tiny.source,
        routing=None, left_out_experts=(), libraries={"tensorrt_llm": "1.2.0"}, flags=(), settings={},
        files=record_files(folder), verification=verification,
    )  # fmt: skip
    write_trtllm_manifest(folder, manifest)
    return folder


def test_two_sound_engines_side_by_side(tmp_path, trained_phixtral, verify):
    """Of trained weights int8 keeps its limits."""
    out, fp32, int8 = (tmp_path / name for name in ("report.html", "fp32", "int8"))
    for precision, folder in (("fp32", fp32), ("int8", int8)):
        build_engine(BuildOptions(checkpoint=str(trained_phixtral), output=folder, precision=precision))
    status, printed, said = verify(fp32, int8, "--report", out, reference=trained_phixtral)
    assert (status, said) == (0, "")
    assert printed.count("Are these the checkpoint's weights? yes") == 2
    assert f"{int8} (int8)\n" in printed
    assert "What did the quantiser cost? not asked: no weight is quantised at fp32" in printed
    content = out.read_text()
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    assert loads_nothing(content)
    text = Page(content).text
    for words in ("fp32", "int8", "No figures: no weight is quantised at fp32.", "64 tokens in 2 windows", "layer 2",
                  "moeship verify ", f"--report {out}", "The reference would have written the same."):  # fmt: skip
        assert words in text, words
    assert text.count("✗") == 0
    assert open_engine(int8).manifest.verification["cost"]["tokens"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32", "int8", "report.html"]


def test_a_failing_engine_is_exit_1_and_the_report_is_written(tmp_path, engines, judged, verify):
    """Of random weights int4 leaves too little where every matrix of a layer has 4 bits."""
    out = tmp_path / "report.html"
    status, _, said = verify(engines("int4", "onnxruntime"), engines("fp32"), "--report", out)
    assert status == 1
    assert f"verifying {tmp_path / 'int4'} (int4) against " in said
    assert str(tmp_path / "fp32") not in said
    text = Page(out.read_text()).text
    assert "int4 failed:" in text
    assert "FAILED" in text
    assert "fp32 failed:" not in text


def test_several_engines_without_a_report_are_verified_one_after_the_other(engines, judged, verify):
    status, printed, said = verify(engines("fp32"), engines("int8"), "--json")
    assert status == 1
    assert "(fp32)" not in said
    found = json.loads(printed)["engines"]
    assert [one["engine"].rpartition("/")[2] for one in found] == ["fp32", "int8"]
    assert [bool(one["verification"]["failures"]) for one in found] == [False, True]
    assert ["cost" in one["verification"] for one in found] == [False, True]  # a failure says which part costs most
    parts = ["files", "weights", "graph", "reference", "scoring", "decoding", "serving"]
    assert [list(one["verification"]["seconds"]) for one in found] == [parts, [*parts, "cost"]]
    kept = [open_engine(Path(one["engine"])).manifest.verification for one in found]
    assert [one.get("seconds") for one in kept] == [None, None]  # so that verifying again writes the same engine.json


def test_too_few_tokens_for_a_verdict_are_a_finding_and_no_failure(engines, verify):
    """Of random weights int8 changes more choices than the limits allow, over 64 tokens too few to tell."""
    status, printed, _ = verify(engines("int8"), "--json")
    record = json.loads(printed)
    assert record["top1_agreement"] < THRESHOLDS["int8"].top1_agreement
    assert (status, record["failures"]) == (0, [])
    finding = record["findings"][0]
    assert finding.startswith("too few tokens to judge: 64, at least 2048: ")
    assert f"top-1 agreement {record['top1_agreement']:.2%}, expected 96.00%" in finding


def test_the_reference_of_several_engines_is_computed_once(tmp_path, engines, verify, monkeypatch):
    """Of each engine's own codes the reference is computed too, which is the second question."""
    runs, run = [], Reference.run
    monkeypatch.setattr(Reference, "run", lambda *words, **more: runs.append(words[1]) or run(*words, **more))
    _, alone, _ = verify(engines("fp32"), "--json")
    assert len(runs) == 2
    runs.clear()
    _, together, _ = verify(tmp_path / "fp32", shutil.copytree(tmp_path / "fp32", tmp_path / "again"), "--json")
    assert len(runs) == 3
    first, again = json.loads(together)["engines"][0]["verification"], json.loads(alone)
    assert first.pop("seconds").keys() == again.pop("seconds").keys()
    assert first == again


def test_what_is_recorded_of_an_engine_for_another_machine_is_shown(tmp_path, engines, verify, monkeypatch):
    def missing(*_):
        raise LibraryMissing("verifying needs TensorRT-LLM and a GPU: no GPU")

    monkeypatch.setattr("trt_build.trtllm.command.verify", missing)
    fp32 = engines("fp32")
    record = {"mean_kl": 0.0625, "mean_decoded_kl": 0.05, "failures": []}
    shown = trtllm_engine(tmp_path / "gpu", fp32, record)
    status, _, said = verify(fp32, shown, "--report", tmp_path / "a.html")
    assert (status, said) == (0, "")
    text = Page((tmp_path / "a.html").read_text()).text
    for words in (
        "NVIDIA <A100>", "gpu: it needs TensorRT-LLM and a GPU, which are not here; the figures are those that ",
        "that engine.json recorded", "0.062 ≤ 0.10 ✓", "Its text is not shown.",
    ):  # fmt: skip
        assert words in text, words
    failed = trtllm_engine(tmp_path / "failed", fp32, {**record, "failures": ["mean KL 9 nats"]})
    status, _, said = verify(fp32, failed, "--report", tmp_path / "b.html")
    assert status == 1
    assert "mean KL 9 nats (recorded in engine.json)" in said
    never = trtllm_engine(tmp_path / "never", fp32, None)
    assert verify(fp32, never, "--report", tmp_path / "c.html")[0] == 0
    assert "engine.json records no result" in Page((tmp_path / "c.html").read_text()).text
    assert verify(never, "--report", tmp_path / "d.html")[0] == 0
    status, _, said = verify(fp32, never)
    assert (status, "needs TensorRT-LLM and a GPU" in said) == (3, True)


def test_an_engine_of_an_earlier_format_says_that_it_cannot_be_asked(tmp_path, engines, verify):
    old = engines("fp32")
    (old / "model_serving.onnx").unlink()
    values = read_values(old)
    values["files"].pop("model_serving.onnx")
    edit_manifest(old, format_version=4, files=values["files"])
    status, _, said = verify(old, "--report", tmp_path / "report.html")
    assert (status, said) == (0, "")
    text = Page((tmp_path / "report.html").read_text()).text
    assert text.count("not asked: format 4 is not read back; build the engine again") == 2
    assert "No figures: format 4 is not read back; build the engine again." in text


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """An engine of a checkpoint of the same sizes with other weights."""
    folder = tmp_path_factory.mktemp("another")
    write_phixtral_checkpoint(folder / "checkpoint", seed=8, num_experts=5, experts_per_token=2, **QUANTIZABLE)
    build_engine(BuildOptions(checkpoint=str(folder / "checkpoint"), output=folder / "other", precision="fp32"))
    return folder / "other"


@pytest.mark.parametrize(
    ("out", "second", "message"),
    [
        ("nowhere/report.html", None, "the folder {folder}/nowhere does not exist; create it first"),
        ("", None, "{folder} is a folder, expected the name of an HTML file in it"),
        ("taken.html", None, "{folder}/taken.html exists already"),
        ("report.html", "another", "were built from different checkpoints (model.safetensors has the digest "),
        ("report.html", "same", "is named twice; name each engine once"),
        ("report.html", "more experts", "the first takes 2 experts per token and the second 3"),
        ("report.html", "absent", "absent: no such folder, expected the folder of an engine"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_anything_is_done(
    tmp_path, tiny_checkpoint, engines, another, verify, out, second, message
):
    fp32 = engines("fp32")
    more = tmp_path / "more"
    if second == "more experts":
        build_engine(BuildOptions(checkpoint=str(tiny_checkpoint), output=more, precision="fp32", experts_per_token=3))
    (tmp_path / "taken.html").write_text("mine")
    before, names = (fp32 / "engine.json").read_bytes(), sorted(tmp_path.iterdir())
    others = {
        "another": [another],
        "same": [fp32 / "..", fp32],
        "more experts": [more],
        "absent": [tmp_path / "absent"],
    }
    others["same"] = [tmp_path / "." / "fp32"]
    status, printed, said = verify(fp32, *others.get(second, []), "--report", tmp_path / out)
    assert (status, printed) == (2, "")
    assert message.format(folder=tmp_path) in said
    assert said.count("\n") == 1
    assert (fp32 / "engine.json").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == names
    assert (tmp_path / "taken.html").read_text() == "mine"


def test_engines_of_different_models_are_refused_without_a_report_too(engines, another, verify):
    status, _, said = verify(engines("fp32"), another)
    assert status == 2
    assert "verify engines of one model together" in said


def test_a_report_that_cannot_be_written_at_the_end_leaves_nothing(tmp_path, engines, verify, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cli.verify_report.replace_file", full)
    status, _, said = verify(engines("fp32"), "--report", tmp_path / "report.html")
    assert status == 2
    assert "writing the report to " in said
    assert "No space left on device" in said
    assert not (tmp_path / "report.html").exists()
