"""Builds that were killed, interrupted or ran out of disk: what they leave, and what the same command makes of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint
from conftest import QUANTIZABLE
from mixtral_checkpoints import write_mixtral_checkpoint

from ci.kill_builds import DifferentEngine, compare, kill_builds
from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError, OutputError
from export.files.resume import partial_path
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine


def build(checkpoint, output, progress=None, **options):
    return build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, **options), progress)


@pytest.fixture
def checkpoint(tmp_path, tiny_checkpoint):
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny-phixtral"))


@pytest.fixture
def expected(tmp_path, checkpoint):
    """The engine of an undisturbed build."""
    return build(checkpoint, tmp_path / "expected").folder


class Interrupted:
    """Raises KeyboardInterrupt once `parts` are finished."""

    def __init__(self, parts):
        self.parts, self.seen = parts, []

    def __call__(self, progress):
        self.seen.append(progress)
        if progress.parts >= self.parts:
            raise KeyboardInterrupt


def interrupt(checkpoint, output, parts=5, **options):
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, output, Interrupted(parts), **options)
    return partial_path(output)


def test_builds_killed_at_random_moments_resume_to_the_same_bytes(tmp_path):
    sizes = {**QUANTIZABLE, "hidden_size": 512, "num_heads": 8, "ffn_size": 2048, "num_layers": 2, "dtype": "float16"}
    large = write_phixtral_checkpoint(tmp_path / "large", seed=3, num_experts=4, experts_per_token=2, **sizes)
    kills = kill_builds(large, tmp_path, "int4", kills=4, seed=11)
    assert len({one.parts for one in kills}) > 1  # at moments of their own, with parts finished


# Where a process ends itself, as SIGKILL would end it, when `count` parts are in the journal.
MOMENTS = {
    "before the first part": "if not self.count: die()",
    "before a part's record": "if self.count == 7: die()",
    "inside a part's record": "if self.count == 7: os.write(self._journal.fileno(), TORN); die()",
    "after a part's record": "append(self, record)\n    if self.count == 7: die()\n    return",
}
PROGRAM = """
import os, signal, sys
from pathlib import Path
from export.files.resume import PartialFolder
from trt_build.ort.build import BuildOptions, build_engine
TORN = b'{{"part":"tra'
def die():
    os.kill(os.getpid(), signal.SIGKILL)
append, PartialFolder.count = PartialFolder.append, -1
def dying(self, record):
    PartialFolder.count += 1
    {moment}
    append(self, record)
PartialFolder.append = dying
rename = Path.rename
def renaming(self, target):
    if "{rename}" == "before":
        die()
    rename(self, target)
    if "{rename}" == "after":
        die()
Path.rename = renaming
build_engine(BuildOptions(checkpoint=sys.argv[1], output=Path(sys.argv[2])))
"""


def die(checkpoint, output, moment="pass", rename=""):
    program = PROGRAM.format(moment=moment, rename=rename)
    done = subprocess.run([sys.executable, "-c", program, checkpoint, output], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_killed_around_a_record_resumes_from_the_parts_before_it(tmp_path, checkpoint, expected, moment):
    output = tmp_path / "engine"
    die(checkpoint, output, MOMENTS[moment])
    with pytest.raises(EngineError, match="no such folder"):
        open_engine(output)
    seen = []
    build(checkpoint, output, seen.append)
    assert seen[0].resumed_parts == {"before the first part": 0, "after a part's record": 8}.get(moment, 7)
    compare(output, expected)
    assert not partial_path(output).exists()


def test_a_build_killed_before_the_rename_resumes_with_every_part(tmp_path, checkpoint, expected):
    output, seen = tmp_path / "engine", []
    die(checkpoint, output, rename="before")
    with pytest.raises(EngineError, match="no such folder"):
        open_engine(output)
    build(checkpoint, output, seen.append)
    assert seen[0].resumed_parts == seen[0].num_parts == 38
    compare(output, expected)


def test_a_build_killed_after_the_rename_is_whole_and_the_next_one_sweeps_up(tmp_path, checkpoint, expected):
    output = tmp_path / "engine"
    die(checkpoint, output, rename="after")
    assert partial_path(output).exists()
    compare(output, expected)
    with pytest.raises(OutputError, match="exists already"):
        build(checkpoint, output)
    assert not partial_path(output).exists()


def test_a_part_damaged_between_two_runs_is_made_again(tmp_path, checkpoint, expected):
    output, seen = tmp_path / "engine", []
    partial = interrupt(checkpoint, output, parts=9)
    record = json.loads((partial / "journal").read_text().splitlines()[3])
    with (partial / "content" / "model.onnx.data").open("r+b") as data:
        data.seek(record["regions"][0]["offset"])
        data.write(b"\xff" * 8)
    finished = len((partial / "journal").read_text().splitlines()) - 1
    build(checkpoint, output, seen.append)
    assert seen[0].resumed_parts == finished - 1
    compare(output, expected)


def test_the_comparison_sees_one_byte_and_one_file(tmp_path, checkpoint, expected):
    other = Path(shutil.copytree(expected, tmp_path / "other"))
    compare(other, expected)
    data = bytearray((other / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (other / "model.onnx.data").write_bytes(data)
    (other / "lock").write_text("")
    with pytest.raises(DifferentEngine, match=r"lock, model.onnx.data differ"):
        compare(other, expected)


def test_an_interrupted_build_says_how_to_resume_and_how_to_discard(tmp_path, checkpoint, caplog):
    partial = interrupt(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    assert f"the same command resumes, rm -r {partial} discards them" in caplog.text
    shutil.rmtree(partial)
    assert build(checkpoint, tmp_path / "engine").manifest.precision.name == "int4"


def test_other_settings_start_anew_and_say_which(tmp_path, checkpoint, caplog):
    seen = []
    interrupt(checkpoint, tmp_path / "engine", precision="int8")
    engine = build(checkpoint, tmp_path / "engine", seen.append)
    assert seen[0].resumed_parts == 0
    assert "starting the engine from the beginning: the interrupted run had other settings" in caplog.text
    assert "precision: found int4, it was int8" in caplog.text
    compare(engine.folder, build(checkpoint, tmp_path / "expected").folder)


def test_a_checkpoint_that_changed_under_a_build_is_refused_by_file_and_nothing_is_lost(tmp_path, checkpoint, expected):
    shard, output, seen = checkpoint / "model.safetensors", tmp_path / "engine", []
    partial = interrupt(checkpoint, output)
    before, facts = shard.read_bytes(), shard.stat()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    journal = (partial / "journal").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        build(checkpoint, output)
    text = str(caught.value)
    assert f"resuming the engine {output}: its source changed since the run was interrupted" in text
    assert f"model.safetensors: found bytes {len(before)}, modified_ns {shard.stat().st_mtime_ns}" in text
    assert f"it was bytes {len(before)}, modified_ns {facts.st_mtime_ns}" in text
    assert f"rm -r {partial}" in text
    assert (partial / "journal").read_bytes() == journal
    shard.write_bytes(before)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    build(checkpoint, output, seen.append)
    assert seen[0].resumed_parts >= 5
    compare(output, expected)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_changed_under_a_build_is_refused_too(tmp_path, checkpoint, name):
    interrupt(checkpoint, tmp_path / "engine")
    (checkpoint / name).write_text((checkpoint / name).read_text() + "\n")
    with pytest.raises(CheckpointError, match=f"its source changed .*\n  - {name}: found bytes"):
        build(checkpoint, tmp_path / "engine")


def test_a_checkpoint_that_changes_while_it_is_read_makes_no_engine(tmp_path, checkpoint):
    def touch(_progress):
        os.utime(checkpoint / "model.safetensors", ns=(0, 0))

    with pytest.raises(
        CheckpointError, match="model.safetensors changed while it was read, .* two versions of the checkpoint"
    ):
        build(checkpoint, tmp_path / "engine", touch)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-phixtral"]


def rewrite(path, place, data):
    """Write into a file as it lies, and put its time back."""
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("place", [-8, 5000])
def test_a_source_that_is_rewritten_under_a_build_with_its_time_put_back_makes_no_engine(tmp_path, checkpoint, place):
    """Near its start, and at its end, which the build reads later."""
    shard = checkpoint / "model.safetensors"

    def write(_progress):
        rewrite(shard, shard.stat().st_size + place if place < 0 else 100_000 + place, b"\1\1")

    with pytest.raises(
        CheckpointError, match="model.safetensors changed while it was read, .* the output is discarded"
    ):
        build(checkpoint, tmp_path / "engine", write)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-phixtral"]


def test_a_source_that_is_replaced_under_a_build_by_its_like_makes_no_engine(tmp_path, checkpoint):
    shard = checkpoint / "model.safetensors"

    def replace(_progress):
        if not (tmp_path / "old").exists():
            shutil.copy2(shard, checkpoint / "copy")
            rewrite(checkpoint / "copy", shard.stat().st_size - 4, b"\1\1")
            shard.rename(tmp_path / "old")
            (checkpoint / "copy").rename(shard)

    with pytest.raises(CheckpointError, match="model.safetensors changed while it was read"):
        build(checkpoint, tmp_path / "engine", replace)


def test_a_source_that_gets_another_name_or_mode_is_the_same(tmp_path, checkpoint, expected):
    """What a backup that links does, say: only then are the digests asked."""
    shard = checkpoint / "model.safetensors"

    def link(progress):
        if progress.parts == 3:
            (tmp_path / "backup").unlink(missing_ok=True)
            (tmp_path / "backup").hardlink_to(shard)
            shard.chmod(0o600)

    build(checkpoint, tmp_path / "engine", link)
    compare(tmp_path / "engine", expected)


def test_a_source_that_gets_another_mode_and_other_bytes_makes_no_engine(tmp_path, checkpoint):
    shard = checkpoint / "model.safetensors"

    def write(progress):
        if progress.parts == progress.num_parts:
            rewrite(shard, shard.stat().st_size - 4, b"\1\1")
            shard.chmod(0o600)

    with pytest.raises(CheckpointError, match="model.safetensors changed while it was read"):
        build(checkpoint, tmp_path / "engine", write)


def test_parts_of_a_source_that_changed_between_two_runs_with_its_time_put_back_are_discarded(tmp_path, checkpoint):
    output, shard, seen = tmp_path / "engine", checkpoint / "model.safetensors", []
    partial = interrupt(checkpoint, output)
    [run, *_] = json.loads((partial / "journal").read_text().splitlines()[1])["sources"]
    tensor = open_checkpoint(checkpoint).tensors[run]
    before = shard.read_bytes()[tensor.offset : tensor.offset + 2]
    rewrite(shard, tensor.offset, b"\1\1")
    with pytest.raises(CheckpointError, match="model.safetensors of .* changed since the run was interrupted, though"):
        build(checkpoint, output)
    assert not partial.exists()
    assert not output.exists()
    rewrite(shard, tensor.offset, before)
    build(checkpoint, output, seen.append)
    assert seen[0].resumed_parts == 0


def test_a_full_disk_tells_what_is_missing_keeps_the_parts_and_is_resumed(tmp_path, checkpoint, expected, monkeypatch):
    output, seen, written, pwrite = tmp_path / "engine", [], [], os.pwrite

    def filling(descriptor, view, offset):
        if sum(written) > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(view))
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr("os.pwrite", filling)
    with pytest.raises(OutputError, match=r"No space left on device .*; it takes 0.00 GB more, .* GB free: make room"):
        build(checkpoint, output)
    monkeypatch.undo()
    assert not output.exists()
    build(checkpoint, output, seen.append)
    assert seen[0].resumed_parts > 5
    compare(output, expected)


def test_two_builds_into_one_output_refuse_each_other(tmp_path, checkpoint):
    def second(_progress):
        with pytest.raises(OutputError, match=f"writing the engine to .*: process {os.getpid()} is writing it; wait"):
            build(checkpoint, tmp_path / "engine")

    build(checkpoint, tmp_path / "engine", second)
    assert open_engine(tmp_path / "engine").manifest.family == "phixtral"


def test_a_packed_checkpoints_digests_are_the_same_whatever_order_a_provider_stores_its_experts_in(tmp_path):
    sizes = {"hidden_size": 128, "num_heads": 8, "ffn_size": 192}
    packed = write_mixtral_checkpoint(tmp_path / "packed", seed=1, spelling="packed", **sizes)
    cpu, cuda = (build(packed, tmp_path / name, provider=name).manifest.source.digests for name in ("cpu", "cuda"))
    assert cpu == cuda


def test_each_source_tensor_is_read_once_from_start_to_end(tmp_path, checkpoint, monkeypatch):
    from export.checkpoint.folder import Checkpoint

    read, read_into = [], Checkpoint.read_into

    def reading(self, stored, start, view):
        if type(self) is not Checkpoint:  # the gates are looked at besides, for the routing diagnosis
            read.append((stored.name, start, start + len(view)))
        read_into(self, stored, start, view)

    monkeypatch.setattr(Checkpoint, "read_into", reading)
    engine = build(checkpoint, tmp_path / "engine")
    spans = {}
    for name, start, end in read:
        assert spans.get(name, 0) == start
        spans[name] = end
    from safetensors.numpy import load_file

    assert spans == {name: values.nbytes for name, values in load_file(checkpoint / "model.safetensors").items()}
    assert len(engine.manifest.source.digests) == 2
