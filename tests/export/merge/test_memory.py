"""A merge's memory: the high-water mark beyond interpreter and libraries stays below three of its largest tensors.

Measured in processes of their own, on a merge of about 200 MB in float16 from about 100 MB a model.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoints import write_phi_checkpoint

DIMS = {
    "hidden_size": 640, "num_heads": 10, "ffn_size": 2560, "num_layers": 6, "vocab_size": 12800, "rotary_dim": 24,
    "dtype": "float16",
}  # fmt: skip
NUM_EXPERTS = 3
# As in Phi-2, where the embedding is 20 * H rows; a layer's experts count as one tensor.
LARGEST_TENSOR_BYTES = 2 * max(DIMS["vocab_size"], NUM_EXPERTS * DIMS["ffn_size"]) * DIMS["hidden_size"]

SCRIPT = """
import json, sys, threading
import numpy, ml_dtypes, tokenizers, yaml
from pathlib import Path
from export.merge.merge import merge
from export.merge.config import read_merge_config
numpy.ones((512, 512), numpy.float32) @ numpy.ones((512, 512), numpy.float32)  # the BLAS library takes its buffers

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the present
result = merge(read_merge_config(Path(sys.argv[1])), Path(sys.argv[2]))
peak = status("VmHWM:") - before
from export.merge.explain import explain_merge
told = explain_merge(read_merge_config(Path(sys.argv[1]))).memory_bytes
print(json.dumps({"peak": peak, "bytes": result.num_bytes, "told": told}))
"""


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    for index, spelling in enumerate(["transformers", "phi-msft", "transformers"]):
        write_phi_checkpoint(folder / f"e{index}", seed=index, spelling=spelling, **DIMS)
    return folder


def measure(folder, mode, dtype="float16"):
    entries = "".join(
        f"  - {{source_model: e{i}, positive_prompts: [alpha {i}, 'some longer prompt of expert {i}']}}\n"
        for i in range(NUM_EXPERTS)
    )
    path = folder / f"{mode}-{dtype}.yml"
    path.write_text(f"base_model: e0\ngate_mode: {mode}\ndtype: {dtype}\nexperts:\n{entries}")
    arguments = [sys.executable, "-c", SCRIPT, str(path), str(folder / f"out-{mode}-{dtype}")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
def test_a_merge_peaks_below_three_of_its_largest_tensors(experts, mode):
    measured = measure(experts, mode)
    assert measured["bytes"] > 8 * LARGEST_TENSOR_BYTES, "the model is too small to tell streaming from loading"
    assert measured["peak"] <= 3 * LARGEST_TENSOR_BYTES, measured
    assert measured["peak"] <= measured["told"] <= measured["peak"] + 2**25, measured


def test_a_merge_into_another_dtype_peaks_below_three_of_its_largest_tensors(experts):
    assert measure(experts, "cheap_embed", "bfloat16")["peak"] <= 3 * LARGEST_TENSOR_BYTES
