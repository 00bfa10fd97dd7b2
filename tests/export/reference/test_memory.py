"""The reference's memory: beyond interpreter and libraries it holds an expert and the activations, never the model;
of variants, an expert in both forms and the activations of all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoints import write_phixtral_checkpoint

SIZES = {
    "hidden_size": 320, "num_heads": 10, "ffn_size": 1280, "num_layers": 8, "vocab_size": 3000, "rotary_dim": 16,
    "max_positions": 1024, "dtype": "float16",
}  # fmt: skip
EXPERTS = 8
MODEL_BYTES = 4 * SIZES["num_layers"] * EXPERTS * 2 * SIZES["ffn_size"] * SIZES["hidden_size"]  # of its experts alone

SCRIPT = """
import json, sys
import numpy, ml_dtypes
from pathlib import Path
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.checkpoint.tensor_table import Role
from export.reference.model import Reference
from export.reference.variants import Part, Variants

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

numpy.ones((512, 512), numpy.float32) @ numpy.ones((512, 512), numpy.float32)  # the BLAS library takes its buffers
model = read_model(open_checkpoint(sys.argv[1]))
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the present
if sys.argv[2] == "model":
    shapes = [logits.shape for logits, _ in Reference(model).run([[7] * 700, [9] * 300])]
else:
    parts = [Part(role=role, layer=layer) for layer in range(8) for role in (Role.ATTENTION, Role.EXPERT)]
    variants = Variants(model, model.weights, [Part(role=None), *parts, Part(role=Role.HEAD)])
    shapes = [logits.shape for logits in variants.run([[7] * 60, [9] * 40])]
modules = sorted({"torch", "transformers", "onnxruntime"} & set(sys.modules))
print(json.dumps({"peak": status("VmHWM:") - before, "shapes": shapes, "modules": modules}))
"""


@pytest.mark.parametrize(
    ("what", "shapes"), [("model", [[700, 3000], [300, 3000]]), ("variants of it", [[19, 100, 3000]])]
)
def test_the_peak_is_a_quarter_of_the_model_without_torch(tmp_path, what, shapes):
    write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=EXPERTS, experts_per_token=2, **SIZES)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "c"), what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["shapes"] == shapes
    assert measured["modules"] == []
    assert measured["peak"] <= MODEL_BYTES / 4, measured
