"""Compare moeship's merges with those of mergekit-moe, on small random Mistrals, Llamas and Qwens.

    python ci/mergekit_comparison.py --mergekit /path/to/venv/bin/mergekit-moe
    python ci/mergekit_comparison.py --mergekit /path/to/venv/bin/mergekit-moe --write tests/export/merge/mergekit.json

The first compares, the second writes what mergekit gave, for tests/export/merge/test_mergekit.py, which needs no
mergekit. mergekit-moe runs in an environment of its own (`pip install mergekit`); its hidden-state gates are computed
in bfloat16, so the script also runs it with float32 in that place (CASES, "exact"). mergekit-moe 0.1.5 takes no
adapters, so an expert with an adapter is compared with what PEFT's merge_and_unload makes of it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from adapters import MODULES, write_adapter  # noqa: E402
from dense_checkpoints import write_dense_checkpoint  # noqa: E402
from qwen_tokenizer import write_qwen_tokenizer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from export.checkpoint.folder import open_checkpoint  # noqa: E402
from export.merge.adapters import open_adapter, with_adapter  # noqa: E402
from export.merge.config import read_merge_config  # noqa: E402
from export.merge.merge import merge  # noqa: E402

# mergekit/moe/router.py loads the base in bfloat16; this runs it with float32 in that place.
EXACT = """
import sys, torch, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
def in_float32(*arguments, **options):
    return load(*arguments, **{**options, "torch_dtype": torch.float32})
transformers.AutoModelForCausalLM.from_pretrained = in_float32
from mergekit.scripts.moe import main
main()
"""
# What mergekit's ModelReference.merged does with an adapter.
PEFT = """
import sys, peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
ADAPTER: dict[str, Any] = {"seed": 8, "ranks": {"down_proj": 7}, "alpha_pattern": {"mlp.gate_proj": 3}}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "bfloat16"}, "rslora": {"use_rslora": True}, "transposed": {"fan_in_fan_out": True},
}  # fmt: skip
EXPERTS: list[dict[str, Any]] = [
    {"positive_prompts": ["the quick fox", "def main"]},
    {"positive_prompts": ["return the value"], "negative_prompts": ["brown dog"], "residual_scale": 0.3},
    {"positive_prompts": ["naïve café", "words"], "residual_scale": -1.5},
]
# Every prompt has as many tokens, so that mergekit's padding is not in the average.
EVEN: list[dict[str, Any]] = [
    {"positive_prompts": ["the"]}, {"positive_prompts": ["dog"]}, {"positive_prompts": ["fox"]},
]  # fmt: skip
# mergekit-moe opens the base's and the experts' files alone, so the shared expert's model is one of them.
SHARED: dict[str, Any] = {
    "source": 1, "positive_prompts": ["the quick fox", "return"], "negative_prompts": ["café"], "residual_scale": 0.1,
}  # fmt: skip
EIGHTY = {"hidden_size": 80}  # a multiple of the heads


@dataclass(frozen=True, kw_only=True)
class Case:
    """A merge: the family, gate mode, stored dtype, dtype asked for, further sizes, and those of the last expert;
    further keys of config.json, the shared expert, and the word for the mixture."""

    family: str
    mode: str
    stored: str
    asked: str | None = None
    experts: list[dict[str, Any]] = field(default_factory=lambda: EXPERTS)
    sizes: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    word: str | None = None


CASES = {
    "mistral hidden": Case(family="mistral", mode="hidden", stored="bfloat16"),
    "mistral hidden exact": Case(family="mistral", mode="hidden", stored="bfloat16", asked="float32", exact=True),
    "mistral average": Case(
        family="mistral", mode="hidden_avg", stored="float32", asked="float32", experts=EVEN, exact=True
    ),
    "mistral cheap_embed": Case(family="mistral", mode="cheap_embed", stored="bfloat16", asked="float16"),
    "mistral vocabulary": Case(
        family="mistral", mode="cheap_embed", stored="float16", last={"vocab_size": 390}, sizes={"tied": True}
    ),
    "llama hidden exact": Case(family="llama", mode="hidden", stored="float16", asked="float32", exact=True),
    "llama cheap_embed": Case(family="llama", mode="cheap_embed", stored="float32", asked="bfloat16"),
    "llama grouped": Case(
        family="llama", mode="cheap_embed", stored="float16", asked="bfloat16", sizes={"num_kv_heads": 5}
    ),
    "qwen2 hidden": Case(family="qwen2", mode="hidden", stored="bfloat16", sizes=EIGHTY, shared=SHARED),
    "qwen2 hidden exact": Case(
        family="qwen2",
        mode="hidden",
        stored="bfloat16",
        asked="float32",
        exact=True,
        sizes=EIGHTY,
        shared=SHARED,
        word="qwen",
    ),
    "qwen2 cheap_embed": Case(
        family="qwen2",
        mode="cheap_embed",
        stored="float16",
        sizes={**EIGHTY, "tied": True},
        shared={**SHARED, "source": 0},
    ),
    "qwen3 hidden": Case(family="qwen3", mode="hidden", stored="bfloat16", asked="float16"),
    "qwen3 hidden exact": Case(
        family="qwen3", mode="hidden", stored="float16", asked="float32", exact=True, sizes={"tied": True}, word="qwen"
    ),
    "qwen3 window": Case(
        family="qwen3",
        mode="cheap_embed",
        stored="float32",
        asked="bfloat16",
        config={"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
}


def write_case(folder: Path, case: Case) -> Path:
    """The models of a case and its YAML; returns the YAML."""
    sizes: dict[str, Any] = {"num_heads": 5, "num_kv_heads": 1, **case.sizes}
    for index in range(3):
        more = case.last if index == 2 else {}
        config = {"sliding_window": 6} if case.family == "mistral" else case.config
        write_dense_checkpoint(
            folder / f"e{index}", seed=index, family=case.family, dtype=case.stored, config=config, **sizes | more
        )
        if case.family.startswith("qwen"):
            write_qwen_tokenizer(folder / f"e{index}")
    experts = [{"source_model": str(folder / f"e{index}"), **expert} for index, expert in enumerate(case.experts)]
    values = {"base_model": str(folder / "e0"), "gate_mode": case.mode, "dtype": case.asked, "experts": experts}
    values["architecture"] = case.word
    if case.shared:
        shared = {key: value for key, value in case.shared.items() if key != "source"}
        values["shared_experts"] = [{"source_model": str(folder / f"e{case.shared['source']}"), **shared}]
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def described(folder: Path) -> dict[str, Any]:
    """What a merged folder holds: config.json, digests of the tensors in the published spelling, gates as float32, the
    row of a shared expert last."""
    config = json.loads((folder / "config.json").read_text())
    digests: dict[str, str] = {}
    rows: dict[int, list[np.ndarray[Any, Any]]] = {}
    for name, values in sorted(load_file(folder / "model.safetensors").items()):
        if name.endswith((".gate.weight", ".shared_expert_gate.weight")):
            rows.setdefault(int(name.split(".")[2]), []).append(values.float().numpy().astype("<f4"))
            continue
        for single, tensor in _unpacked(name, values, is_mixtral=config["model_type"] == "mixtral").items():
            data = tensor.contiguous().view(-1).view(dtype=_bytes()).numpy().tobytes()
            digests[single] = f"{tensor.dtype}".removeprefix("torch.") + " " + hashlib.sha256(data).hexdigest()[:24]
    gates = [np.concatenate(rows[layer]) for layer in sorted(rows)]
    return {
        "config": config,
        "tensors": dict(sorted(digests.items())),
        "gates": [{"shape": list(gate.shape), "float32": base64.b64encode(gate.tobytes()).decode()} for gate in gates],
    }


def _bytes() -> Any:  # noqa: ANN401 - a dtype of torch
    import torch

    return torch.uint8


def _unpacked(name: str, values: Any, *, is_mixtral: bool) -> dict[str, Any]:  # noqa: ANN401 - tensors of torch
    """The experts that transformers 5 packs into one tensor, each under its published name."""
    layer, experts, packed = name.partition(".mlp.experts.")
    if not experts or packed not in ("gate_up_proj", "down_proj"):
        return {name: values}
    stem, (gate, up, down) = f"{layer}.mlp.experts", ("gate_proj", "up_proj", "down_proj")
    if is_mixtral:
        stem, (gate, up, down) = f"{layer}.block_sparse_moe.experts", ("w1", "w3", "w2")
    found = {}
    for index, expert in enumerate(values):
        if packed == "down_proj":
            found[f"{stem}.{index}.{down}.weight"] = expert
        else:
            half = len(expert) // 2
            found |= {f"{stem}.{index}.{gate}.weight": expert[:half], f"{stem}.{index}.{up}.weight": expert[half:]}
    return found


def gates_of(described_merge: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    return [
        np.frombuffer(base64.b64decode(gate["float32"]), "<f4").reshape(gate["shape"])
        for gate in described_merge["gates"]
    ]


def problems_of(case: Case, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where a merge of ours differs from mergekit's by more than rounding.

    Tensors must be equal. Gates are rounded to the output's dtype by both; a sum in another order may move a value to
    its neighbour there. mergekit's hidden states are of bfloat16, unless the case is exact: then its gates differ from
    exact ones by its own rounding, of 2^-8 at each of several operations.
    """
    problems = [
        f"{name}: {ours['tensors'].get(name)} for {digest}"
        for name, digest in theirs["tensors"].items()
        if ours["tensors"].get(name) != digest
    ]
    problems += [f"{name} is not in mergekit's merge" for name in ours["tensors"].keys() - theirs["tensors"].keys()]
    step = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[case.asked or case.stored]
    inexact = case.mode.startswith("hidden") and not case.exact
    for layer, (found, expected) in enumerate(zip(gates_of(ours), gates_of(theirs), strict=True)):
        difference = np.abs(found - expected)
        limit = 0.02 if inexact else step * np.maximum(np.abs(expected), 2.0**-14 if step > 1e-5 else 1.0)
        if (difference > limit).any():
            problems.append(f"the gate of layer {layer} differs by {difference.max():.3g}")
    return problems


def write_adapted(folder: Path, name: str) -> tuple[Path, Path]:
    """A base and an adapter of ADAPTERS for it."""
    base = write_dense_checkpoint(folder / "base", seed=1, dtype="bfloat16", num_heads=5, num_kv_heads=1)
    return base, write_adapter(folder / "adapter", base, **ADAPTER, **ADAPTERS[name])


def compare_adapters(python: Path) -> tuple[dict[str, Any], int]:
    """What PEFT makes of each adapter, as base64 of bfloat16 tensors of layer 1, and how many differ from ours by more
    than a step of bfloat16."""
    given: dict[str, Any] = {}
    failed = 0
    for name in ADAPTERS:
        with tempfile.TemporaryDirectory() as scratch:
            base, adapter = write_adapted(Path(scratch), name)
            merged = Path(scratch) / "merged"
            words = [str(python), "-c", PEFT, *map(str, (base, adapter, merged))]
            subprocess.run(words, check=True, capture_output=True)
            theirs = {
                key: value.view(_bytes()).numpy().tobytes()
                for key, value in load_file(merged / "model.safetensors").items()
            }
            ours = with_adapter(open_checkpoint(base), open_adapter(str(adapter)))
            steps = {key: steps_between(ours.read(key).tobytes(), data) for key, data in theirs.items()}
        failed += max(steps.values()) > 1
        print(f"adapter {name}: {len(steps)} tensors, differ by {max(steps.values())} steps of bfloat16 at most")
        chosen = [f"model.layers.1.{module}.weight" for module in MODULES]
        given[name] = {key: base64.b64encode(theirs[key]).decode() for key in chosen}
    return given, failed


def steps_between(first: bytes, second: bytes) -> int:
    """The largest number of bfloat16 values between two values at the same place."""
    ordered = [np.frombuffer(data, "<i2").astype(np.int32) for data in (first, second)]
    ordered = [np.where(values < 0, -32768 - values, values) for values in ordered]
    return int(np.abs(ordered[0] - ordered[1]).max())


def run_mergekit(program: Path, case: Case, config: Path, output: Path) -> None:
    words = [str(program)] if not case.exact else [str(program.parent / "python"), "-c", EXACT]
    subprocess.run([*words, str(config), str(output)], check=True, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, metavar="PROGRAM", help="mergekit-moe")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write what mergekit gave")
    arguments = parser.parse_args()
    probe = "import importlib.metadata as m; print({p: m.version(p) for p in ('mergekit', 'peft', 'transformers')})"
    python = str(arguments.mergekit.parent / "python")
    versions = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True).stdout.strip()
    given, failed = {}, 0
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            config = write_case(folder, case)
            run_mergekit(arguments.mergekit, case, config, folder / "theirs")
            given[name] = described(folder / "theirs")
            ours = described(merge(read_merge_config(config), folder / "ours").folder)
        problems = problems_of(case, ours, given[name])
        failed += bool(problems)
        difference = max(float(np.abs(a - b).max()) for a, b in zip(gates_of(ours), gates_of(given[name]), strict=True))
        print(
            f"{name}: {len(ours['tensors'])} tensors, gates differ by {difference:.3g} at most", *problems, sep="\n  "
        )
    adapted, wrong = compare_adapters(arguments.mergekit.parent / "python")
    failed += wrong
    print(versions)
    if arguments.write:
        arguments.write.write_text(
            json.dumps({"versions": versions, "cases": given, "adapters": adapted}, indent=1) + "\n"
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
