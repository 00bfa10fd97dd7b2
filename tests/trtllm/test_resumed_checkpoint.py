"""Checkpoints that were not finished, or that an earlier run finished: what the next run makes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint
from trtllm.conftest import SMALL
from trtllm.ranks import understood

from export.errors import CheckpointError, ExportError, OutputError, QuantizationError
from export.files.resume import partial_path
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint, require_written, write_checkpoint
from export.trtllm.parallel import Parallelism

TWO = Parallelism(tp_size=2)


@pytest.fixture
def source(tmp_path, small_phixtral):
    """A copy that a test may change."""
    return Path(shutil.copytree(small_phixtral, tmp_path / "source"))


def write(source, output, progress=None, **options):
    return write_checkpoint(understood(source), CheckpointOptions(**options), output, progress)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Interrupted:
    """Raises KeyboardInterrupt once `parts` are finished."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, progress):
        if progress.parts >= self.parts:
            raise KeyboardInterrupt


def interrupt(source, output, parts=5, **options):
    with pytest.raises(KeyboardInterrupt):
        write(source, output, Interrupted(parts), **options)
    assert not output.exists()
    return partial_path(output)


# Where a process ends itself as SIGKILL would end it.
MOMENTS = {
    "before a part's record": ("if self.count == 7: die()", 7),
    "inside a part's record": ("if self.count == 7: os.write(self._journal.fileno(), TORN); die()", 7),
    "before the rename": ("pass", 27),
}
PROGRAM = """
import os, signal, sys
from pathlib import Path
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.files.resume import PartialFolder
from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint
from export.trtllm.parallel import Parallelism
TORN = b'{{"part":"tra'
def die(*words):
    os.kill(os.getpid(), signal.SIGKILL)
append, PartialFolder.count = PartialFolder.append, -1
def dying(self, record):
    PartialFolder.count += 1
    {moment}
    append(self, record)
PartialFolder.append = dying
if {moment!r} == "pass":
    Path.rename = die
options = CheckpointOptions(precision="int4", parallel=Parallelism(tp_size=2))
write_checkpoint(read_model(open_checkpoint(sys.argv[1])), options, Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_is_taken_up_to_the_same_bytes(tmp_path, source, moment):
    code, parts = MOMENTS[moment]
    write(source, tmp_path / "expected", precision="int4", parallel=TWO)
    output, seen = tmp_path / "ranks", []
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(moment=code), source, output], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not output.exists()
    write(source, output, seen.append, precision="int4", parallel=TWO)
    assert seen[0].resumed_parts == parts
    assert contents(output) == contents(tmp_path / "expected")
    assert not partial_path(output).exists()


def test_a_part_damaged_between_two_runs_is_made_again(tmp_path, source):
    write(source, tmp_path / "expected", precision="int8", parallel=TWO)
    output, seen = tmp_path / "ranks", []
    partial = interrupt(source, output, parts=9, precision="int8", parallel=TWO)
    finished = (partial / "journal").read_text().splitlines()[1:]
    region = json.loads(finished[3])["regions"][-1]
    with (partial / "content" / region["name"].partition("#")[0]).open("r+b") as file:
        file.seek(region["offset"])
        file.write(b"\xff" * 4)
    write(source, output, seen.append, precision="int8", parallel=TWO)
    assert seen[0].resumed_parts == len(finished) - 1
    assert contents(output) == contents(tmp_path / "expected")


def test_other_options_start_anew_and_say_which(tmp_path, source, caplog):
    seen = []
    interrupt(source, tmp_path / "ranks", precision="int8")
    write(source, tmp_path / "ranks", seen.append, precision="int4")
    assert seen[0].resumed_parts == 0
    assert (
        "starting the TensorRT-LLM checkpoint from the beginning: the interrupted run had other settings" in caplog.text
    )
    assert "precision: found int4, it was int8" in caplog.text


def test_a_source_that_changed_under_an_interrupted_run_is_refused_and_nothing_is_lost(tmp_path, source):
    shard, output, seen = source / "model.safetensors", tmp_path / "ranks", []
    partial = interrupt(source, output)
    data, facts = shard.read_bytes(), shard.stat()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        write(source, output)
    told = str(caught.value)
    assert f"resuming the TensorRT-LLM checkpoint {output}: its source changed since the run was interrupted" in told
    assert f"model.safetensors: found bytes {len(data)}" in told
    assert f"rm -r {partial}" in told
    shard.write_bytes(data)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    write(source, output, seen.append)
    assert seen[0].resumed_parts >= 5


def test_a_source_that_changes_while_it_is_read_makes_no_checkpoint(tmp_path, source):
    def touch(_progress):
        os.utime(source / "model.safetensors", ns=(0, 0))

    with pytest.raises(CheckpointError, match="model.safetensors changed while it was read"):
        write(source, tmp_path / "ranks", touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_output_that_exists_is_kept(tmp_path, small_phixtral):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks/note").write_text("mine")
    with pytest.raises(OutputError, match=r"writing the TensorRT-LLM checkpoint: .*ranks exists already; name another"):
        write(small_phixtral, tmp_path / "ranks")
    assert contents(tmp_path / "ranks") == {"note": b"mine"}
    with pytest.raises(OutputError, match="the folder .*nowhere does not exist"):
        write(small_phixtral, tmp_path / "nowhere/ranks")


@pytest.mark.parametrize(
    ("tensor", "precision", "told"),
    [
        ("lm_head.linear.bias", "fp16", "writing lm_head.linear.bias: a value of magnitude 70000 is beyond float16"),
        ("transformer.h.1.ln.weight", "int4", "writing transformer.h.1.ln.weight: a value of magnitude 70000"),
        ("transformer.h.0.moe.mlp.2.fc1.weight", "int8", "the scales of transformer.h.0.moe.mlp.fc1.weight: a"),
        ("transformer.h.0.mixer.out_proj.weight", "int4_gptq", "the scales of transformer.h.0.mixer.out_proj.weight"),
    ],
)
def test_a_value_beyond_float16_is_refused_with_the_dtype_that_has_room(tmp_path, tensor, precision, told):
    from safetensors.numpy import load_file, save_file

    sizes = {**SMALL, "dtype": "float32"}
    source = write_phixtral_checkpoint(tmp_path / "source", seed=1, num_experts=4, experts_per_token=2, **sizes)
    tensors = load_file(source / "model.safetensors")
    tensors[tensor].reshape(-1)[-1] = 1e8 if "scales" in told else 70000
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizationError, match=rf"{told}.*; build with --dtype bfloat16, which has float32's range"):
        write(source, tmp_path / "ranks", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    if precision != "fp16":
        write(source, tmp_path / "ranks", precision=precision, dtype="bfloat16")


# A finished checkpoint that is taken up -------------------------------------------------------------------------------

DIFFERENT = {
    "precision": ({"precision": "int8"}, "its setting precision is int4, expected int8"),
    "dtype": ({"dtype": "bfloat16"}, "its setting dtype is absent, expected bfloat16"),
    "ranks": ({"parallel": TWO}, r"its setting parallel is \{'world_size': 1.*expected \{'world_size': 2"),
    "GPU": ({"sm": 90}, "its setting packed for is every GPU but SM 90, expected SM 90"),
    "form": ({"plain": True}, "its setting plain is False, expected True"),
    "ids": ({"mask_from": 257}, "its setting mask_from is absent, expected 257"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_phixtral):
    folder = tmp_path_factory.mktemp("finished") / "ranks"
    write(small_phixtral, folder, precision="int4")
    return folder


def test_a_finished_checkpoint_is_taken_up_wherever_its_source_lies(tmp_path, small_phixtral, finished):
    elsewhere = Path(shutil.copytree(small_phixtral, tmp_path / "elsewhere"))
    os.utime(elsewhere / "model.safetensors", ns=(0, 0))
    for source in (small_phixtral, elsewhere):
        digests = require_written(plan_checkpoint(understood(source), CheckpointOptions(precision="int4")), finished)
        assert set(digests) == {"config.json", "model.safetensors"}
    # On an H100 it is another, on an A100 or L40S it is not.
    for sm in (86, 89, 120):
        require_written(
            plan_checkpoint(understood(small_phixtral), CheckpointOptions(precision="int4", sm=sm)), finished
        )


# Forms whose bytes are laid out when they are loaded: what a laptop wrote is any GPU's.
UNPACKED = {
    "floats": {"precision": "fp16"},
    "plain int8": {"precision": "int8", "plain": True},
    "plain int4": {"precision": "int4", "plain": True},
    "pairs": {"precision": "int4_awq"},
}


@pytest.mark.parametrize("form", UNPACKED)
def test_what_is_not_packed_is_taken_up_on_an_h100(tmp_path, small_phixtral, form):
    model, options = understood(small_phixtral), CheckpointOptions(**UNPACKED[form])
    for_h100 = dataclasses.replace(options, sm=90)
    write_checkpoint(model, options, tmp_path / "here")
    require_written(plan_checkpoint(model, for_h100), tmp_path / "here")
    write_checkpoint(model, for_h100, tmp_path / "there")
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_checkpoint_of_other_settings_is_refused_naming_each(small_phixtral, finished, what):
    changes, told = DIFFERENT[what]
    plan = plan_checkpoint(understood(small_phixtral), CheckpointOptions(**{"precision": "int4", **changes}))
    with pytest.raises(ExportError, match=told) as caught:
        require_written(plan, finished)
    remedy = "name another with --trtllm-checkpoint, or remove it to have it written again"
    assert f"reusing the TensorRT-LLM checkpoint {finished}: it was made from something else; {remedy}:" in str(
        caught.value
    )


def test_a_checkpoint_of_another_source_is_refused(tmp_path, small_phixtral, finished):
    sizes = {**SMALL, "vocab_size": 291}
    other = write_phixtral_checkpoint(tmp_path / "other", seed=4, num_experts=4, experts_per_token=2, **sizes)
    plan = plan_checkpoint(understood(other), CheckpointOptions(precision="int4"))
    with pytest.raises(ExportError, match=r"its source file model.safetensors is \{'bytes': "):
        require_written(plan, finished)


def test_a_checkpoint_that_lost_a_rank_or_its_end_is_refused(tmp_path, small_phixtral):
    options = CheckpointOptions(precision="int4", parallel=TWO)
    plan = write_checkpoint(understood(small_phixtral), options, tmp_path / "ranks")
    with (tmp_path / "ranks/rank0.safetensors").open("r+b") as file:
        file.truncate(100)
    (tmp_path / "ranks/rank1.safetensors").unlink()
    told = r"rank0.safetensors has 100 bytes, expected \d+\n.*rank1.safetensors has None bytes"
    with pytest.raises(ExportError, match=told):
        require_written(plan, tmp_path / "ranks")
    (tmp_path / "ranks/checkpoint.json").unlink()
    with pytest.raises(ExportError, match=r"checkpoint.json.*; name another with --trtllm-checkpoint, or remove it"):
        require_written(plan, tmp_path / "ranks")
