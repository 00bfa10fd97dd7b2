"""Where the weights of a running engine lie: mapped from their file, or in memory of the process."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from export.files.output import forget_pages
from tests.checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import read_in_huge_pages
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session
from trt_build.ort.step_call import Row

MEMORY_PROGRAM = """
import sys
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

import onnxruntime, numpy
before = private()
session = Session(open_engine(sys.argv[1], check_digests=False), threads=1)
cache = session.new_cache()
session.run(cache, list(range(5, 40)))
print(private() - before)
"""

SCORING_PROGRAM = """
import sys
from trt_build.ort.engine import open_engine
from trt_build.ort.session import ScoringSession

def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

session = ScoringSession(open_engine(sys.argv[1], check_digests=False), threads=1)
before = private()
session.run([number % 250 for number in range(int(sys.argv[2]))])
print(private() - before)
"""


def test_scoring_does_not_hold_the_keys_and_values_of_all_layers(tmp_path):
    heads, size, num_tokens, grown = 16, 32, 2000, []
    for layers in (1, 9):
        checkpoint = write_phi_checkpoint(
            tmp_path / f"c{layers}", seed=1, hidden_size=heads * size, num_heads=heads, num_kv_heads=heads,
            rotary_dim=size, ffn_size=64, num_layers=layers, max_positions=num_tokens,
        )  # fmt: skip
        options = BuildOptions(checkpoint=str(checkpoint), output=tmp_path / f"e{layers}", precision="fp32")
        engine = build_engine(options).folder
        done = subprocess.run(
            [sys.executable, "-c", SCORING_PROGRAM, engine, str(num_tokens)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown.append(int(done.stdout))
    assert grown[1] - grown[0] < 4 * 2 * num_tokens * heads * size * 4  # those of four of the eight more layers


@pytest.mark.needs_kernels
def test_our_kernels_read_mapped_weights_and_onnx_runtimes_hold_them_in_private_memory(tmp_path):
    sizes = {
        "hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "rotary_dim": 32, "ffn_size": 2048, "num_layers": 4,
        "max_positions": 64,
    }  # fmt: skip
    checkpoint = write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=8, experts_per_token=2, **sizes)
    private = {}
    for name in ("moeship", "onnxruntime"):
        output = tmp_path / name
        engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, kernels=name))
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_PROGRAM, output], capture_output=True, text=True, check=True
        )
        private[name] = int(done.stdout) / engine.resident_bytes
    assert private["moeship"] < 0.2 < 1.0 < private["onnxruntime"]


def test_reading_ahead_takes_any_file_and_changes_nothing(tmp_path):
    path = tmp_path / "data"
    for num_bytes in (1, 5000, (1 << 21) + 1):
        path.write_bytes(bytes(range(256)) * (num_bytes // 256 + 1))
        forget_pages(path)
        read_in_huge_pages(path)
        assert path.read_bytes() == bytes(range(256)) * (num_bytes // 256 + 1)


def test_a_step_of_weights_that_were_written_over_is_an_error_and_one_of_replaced_weights_is_not(tmp_path, tiny_engine):
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    data = folder / "model.onnx.data"
    session = Session(open_engine(folder, check_digests=False), threads=1)
    cache = session.new_cache(2)
    rows = [Row(slot=0, token_ids=[3, 4, 5]), Row(slot=1, token_ids=[6])]
    before = session.step(cache, rows).copy()

    other = tmp_path / "other"
    other.write_bytes(bytes(data.stat().st_size))
    kept = tmp_path / "kept"
    kept.hardlink_to(data)
    other.replace(data)
    cache.shorten(0, 0), cache.shorten(1, 0)
    assert (session.step(cache, rows) == before).all()

    with kept.open("r+b") as file:
        file.write(bytes(4096))
    cache.shorten(0, 0), cache.shorten(1, 0)
    with pytest.raises(EngineError, match="model.onnx.data was written to while it was in use"):
        session.step(cache, rows)
