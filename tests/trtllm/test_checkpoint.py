"""The checkpoint writer: what its folder holds, that it streams, and what an interrupted run leaves to the next."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_phixtral_checkpoint
from safetensors.torch import load_file
from trtllm.ranks import understood
from trtllm.tables import expected_tensors
from trtllm.weight_layout import BITS_OF, CONTRACT, read_ranks

import synthetic_checkpoint
from conversion import watch
from export.checkpoint.shard_writer import header_of
from export.conversion import writer
from export.merge.outputs import phixtral_config
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint, write_checkpoint
from export.trtllm.config import rotary_share
from export.trtllm.parallel import Parallelism

TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
TWO = Parallelism(tp_size=2)
FORMS = [
    CheckpointOptions(precision="bf16", parallel=TWO),
    CheckpointOptions(precision="int4", parallel=TWO, mask_from=257),
    CheckpointOptions(precision="int8", dtype="bfloat16"),
    CheckpointOptions(precision="int4_gptq", parallel=Parallelism(tp_size=2, moe_ep_size=2)),
    CheckpointOptions(precision="int4_awq"),
]


@pytest.fixture
def source(tmp_path, small_phixtral):
    """A copy that a test may change."""
    return Path(shutil.copytree(small_phixtral, tmp_path / "source"))


def write(source, output, progress=None, **options):
    return write_checkpoint(understood(source), CheckpointOptions(**options), output, progress)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What the folder holds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Headers of the published models' files, whose bytes are holes, by name."""
    folders = {}
    for name in ("phixtral-4x2_8", "mixtral-8x7b"):
        facts = synthetic_checkpoint.MODELS[name]
        label = synthetic_checkpoint.DTYPES[facts.source_dtype]
        if facts.family == "mixtral":
            config = synthetic_checkpoint.llama_config(facts)
        else:
            config = phixtral_config(facts, label, {"eos_token_id": 0})
        folders[name] = folder = tmp_path_factory.mktemp("published") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = synthetic_checkpoint.planned_tensors(facts, label)
        header = header_of(tensors)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.num_bytes for tensor in tensors))
    return folders


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4", "int4_gptq", "int4_awq"])
@pytest.mark.parametrize("name", ["phixtral-4x2_8", "mixtral-8x7b"])
@pytest.mark.parametrize(("tp", "ep", "pp"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 1, 2), (8, 4, 1)])
def test_the_published_models_are_laid_out_as_the_contract_has_it(published, name, precision, tp, ep, pp):
    phixtral = name == "phixtral-4x2_8"
    if phixtral and (pp > 1 or (precision == "int4_awq" and ep > 1)):
        pp = ep = 1  # the others are refused
    parallel = Parallelism(tp_size=tp, pp_size=pp, moe_ep_size=ep)
    plan = plan_checkpoint(understood(published[name]), CheckpointOptions(precision=precision, parallel=parallel))
    config = json.loads(json.dumps(plan.config))
    values = CONTRACT["checkpoint_tensors"]["values"][name]
    letters = {"H": "hidden_size", "I": "intermediate_size", "V": "vocab_size", "L": "num_hidden_layers",
               "nH": "num_attention_heads", "nKV": "num_key_value_heads", "D": "head_size"}  # fmt: skip
    assert {letter: config[key] for letter, key in letters.items()} == {letter: values[letter] for letter in letters}
    for rank in {0, tp - 1, parallel.world_size - 1}:
        found = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in plan.layout.tensors(rank)}
        assert found == expected_tensors("phixtral" if phixtral else "mixtral", config, rank)


@pytest.mark.parametrize("name", ["phixtral-4x2_8", "mixtral-8x7b"])
def test_config_json_says_what_the_library_reads_and_nothing_that_it_refuses(published, name):
    model = understood(published[name])
    config = json.loads(json.dumps(plan_checkpoint(model, CheckpointOptions(precision="int4")).config))
    facts = CONTRACT["config_json"]
    expected = facts["phixtral" if name == "phixtral-4x2_8" else "mixtral"]
    values = CONTRACT["checkpoint_tensors"]["values"][name]
    assert set(expected["practically_required"]) <= set(config)
    for key in ("architecture", "hidden_act", "position_embedding_type", "rotary_pct", "moe"):
        if key in expected:
            assert config[key] == expected[key], key
    assert config["norm_epsilon"] == values["eps"]
    assert config["max_position_embeddings"] == values["max_position_embeddings"]
    assert config["rotary_base"] == values.get("rotary_base", 10000.0)
    assert config["rotary_embedding_dim"] == values.get("rotary_dim", values["D"])
    classes = [CONTRACT["constructors"][name] for name in ("PretrainedConfig", "LLaMAConfig")]
    known = {row[0] for entry in classes for row in entry["params"]}
    assert set(config) - known <= {"rotary_pct", "moe"}  # read as attributes: models/phi/model.py, layers/moe.py
    assert set(config["mapping"]) == set(facts["mapping_keys"])
    assert set(config["moe"]) <= set(facts["moe_keys"])
    assert set(config["quantization"]) <= set(facts["quantization_keys"])
    assert config["logits_dtype"] in facts["required_for_cpp_runtime"]["logits_dtype_allowed"]


@pytest.mark.parametrize(
    ("precision", "row"),
    [("fp16", "fp16"), ("int8", "int8_weight_only"), ("int4", "int4_weight_only"), ("int4_awq", "int4_awq"),
     ("int4_gptq", "int4_gptq")],
)  # fmt: skip
def test_the_quantisation_is_the_contracts(published, precision, row):
    for name, folder in published.items():
        config = plan_checkpoint(understood(folder), CheckpointOptions(precision=precision)).config
        found, facts = config["quantization"], CONTRACT["config_json"]
        assert facts["quantization_by_precision"][row].items() <= found.items(), name
        if precision != "fp16":
            assert found["exclude_modules"] == facts["default_exclude_modules"]  # a list that is given replaces them


def test_the_library_finds_every_number_of_turned_dimensions_in_rotary_pct():
    for head_size in range(2, 257, 2):
        for rotary_dim in range(2, head_size + 1, 2):
            assert int(head_size * rotary_share(rotary_dim, head_size)) == rotary_dim, (rotary_dim, head_size)


@pytest.mark.parametrize("options", FORMS, ids=lambda options: options.precision)
def test_the_safetensors_library_reads_every_rank(tmp_path, small_phixtral, options):
    plan = write_checkpoint(understood(small_phixtral), options, tmp_path / "ranks")
    for rank, tensors in enumerate(read_ranks(tmp_path / "ranks")):
        path = tmp_path / f"ranks/rank{rank}.safetensors"
        found = load_file(path)
        assert path.stat().st_size == plan.rank_bytes[rank]
        assert found.keys() == tensors.keys()
        for name, (label, values) in tensors.items():
            assert found[name].dtype == TORCH_TYPES[label]
            bits = found[name].view(torch.uint8).numpy().view(BITS_OF[label])
            assert np.array_equal(bits.reshape(values.shape), values), name


def test_beside_the_ranks_lie_the_tokenizer_and_what_they_were_made_of(tmp_path, small_phixtral):
    write(small_phixtral, tmp_path / "ranks", precision="int4", parallel=TWO)
    ranks = {"rank0.safetensors", "rank1.safetensors"}
    assert set(contents(tmp_path / "ranks")) == {
        *ranks, "config.json", "checkpoint.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "ranks" / name).read_bytes() == (small_phixtral / name).read_bytes()
    manifest = json.loads((tmp_path / "ranks/checkpoint.json").read_text())
    assert manifest["settings"]["precision"] == "int4"
    assert manifest["settings"]["config"] == json.loads((tmp_path / "ranks/config.json").read_text())
    assert manifest["files"] == {name: (tmp_path / "ranks" / name).stat().st_size for name in ranks}
    # SHA-256 of the header, then of each tensor's own digest in the order of the file.
    data = (small_phixtral / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = [entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"]
    whole = hashlib.sha256(data[:start])
    for first, last in sorted(entry["data_offsets"] for entry in entries):
        whole.update(hashlib.sha256(data[start + first : start + last]).digest())
    assert manifest["sources"] == {
        "config.json": hashlib.sha256((small_phixtral / "config.json").read_bytes()).hexdigest(),
        "model.safetensors": whole.hexdigest(),
    }


@pytest.mark.parametrize("options", FORMS, ids=lambda options: options.precision)
def test_workers_make_the_bytes_that_one_process_makes(tmp_path, monkeypatch, small_phixtral, options):
    plan = write_checkpoint(understood(small_phixtral), options, tmp_path / "alone")
    assert writer.num_workers(plan.converter(tmp_path), plan.layout.jobs) == 0
    monkeypatch.setattr(writer, "WORKER_BYTES", 0)
    assert writer.num_workers(plan.converter(tmp_path), plan.layout.jobs) > 0
    write_checkpoint(understood(small_phixtral), options, tmp_path / "together")
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


# Memory ---------------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 640, "num_heads": 10, "ffn_size": 2560, "num_layers": 4, "vocab_size": 12800, "rotary_dim": 24}
LARGEST_TENSOR_BYTES = 2 * max(12800, 4 * 2560) * 640  # float16; a layer's experts count as one tensor
SCRIPT = """
import json, sys
import numpy, ml_dtypes, tokenizers
from pathlib import Path
from export.checkpoint.folder import open_checkpoint
from export.conversion import writer
from export.families import read_model
from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint
from export.trtllm.parallel import Parallelism

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

writer.WORKER_BYTES = 1 << 40  # all of it in this process
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the present
options = CheckpointOptions(precision=sys.argv[3], parallel=Parallelism(tp_size=2))
plan = write_checkpoint(read_model(open_checkpoint(sys.argv[1])), options, Path(sys.argv[2]))
print(json.dumps({"peak": status("VmHWM:") - before, "bytes": sum(plan.rank_bytes.values())}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "phixtral"
    return write_phixtral_checkpoint(folder, seed=1, num_experts=4, experts_per_token=2, dtype="float16", **WIDE)


@pytest.mark.parametrize("precision", ["fp32", "int4", "int4_gptq"])
def test_writing_peaks_below_one_of_the_largest_tensors(tmp_path, wide, precision):
    assert (wide / "model.safetensors").stat().st_size > 8 * LARGEST_TENSOR_BYTES, "too small to tell it from loading"
    words = [sys.executable, "-c", SCRIPT, wide, tmp_path / "ranks", precision]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["bytes"] > 2 * LARGEST_TENSOR_BYTES
    assert measured["peak"] <= LARGEST_TENSOR_BYTES, measured


@pytest.mark.parametrize("precision", ["fp16", "int4_gptq"])
def test_the_planned_peak_memory_of_all_processes_is_within_15_percent(tmp_path, wide, precision):
    words = ["--backend", "tensorrt-llm", "--precision", precision]
    command = [sys.executable, "-m", "cli.main", "plan", wide, *words, "--json"]
    plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    words += ["--until", "checkpoint", "--output", str(tmp_path / "engine")]
    found = watch([sys.executable, "-m", "cli.main", "build", "--checkpoint", str(wide), *words])["peak_bytes"]
    assert abs(plan["conversion_bytes"] - found) <= 0.15 * found
