"""Merges against what mergekit-moe 0.1.5 and PEFT 0.21.2 gave for the same models and YAML (mergekit.json).

`python ci/mergekit_comparison.py --mergekit PROGRAM` compares with them live, and writes mergekit.json.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.adapters import open_adapter, with_adapter
from export.merge.config import read_merge_config
from export.merge.merge import merge

GIVEN = json.loads((Path(__file__).parent / "mergekit.json").read_text())
MIXTURES = {"qwen2": Qwen2MoeConfig, "qwen3": Qwen3MoeConfig}  # of other dense families a Mixtral is made
# Keys of the base's config.json that mergekit's configuration carries along and the mixture's class does not read, or
# reads for a window alone.
LEFT_OVER = {
    "mistral": {"attention_bias", "mlp_bias", "pretraining_tp"},
    "llama": {"attention_bias", "mlp_bias", "pretraining_tp"},
    "qwen2": {"max_window_layers"},
    "qwen3": {"max_window_layers", "layer_types"},
}
WRITER = {"transformers_version", "_name_or_path"}


def load_program():
    spec = importlib.util.spec_from_file_location(
        "mergekit_comparison", Path(__file__).parents[3] / "ci" / "mergekit_comparison.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


comparison = load_program()


@pytest.mark.parametrize("name", comparison.CASES)
def test_tensors_are_mergekits_bit_for_bit_and_gates_to_the_stated_rounding(tmp_path, name):
    case = comparison.CASES[name]
    result = merge(read_merge_config(comparison.write_case(tmp_path, case)), tmp_path / "out")
    ours, theirs = comparison.described(result.folder), GIVEN["cases"][name]
    assert comparison.problems_of(case, ours, theirs) == []
    number = {"qwen2": 45, "qwen3": 37}.get(case.family, 33)
    assert len(theirs["tensors"]) == number - bool(case.sizes.get("tied"))
    mixture = MIXTURES.get(case.family, MixtralConfig)
    config, expected = (mixture(**found["config"]).to_dict() for found in (ours, theirs))
    for key in WRITER | LEFT_OVER[case.family]:
        config.pop(key, None)
        expected.pop(key, None)
    assert config == expected
    facts = read_model(open_checkpoint(result.folder)).architecture
    family = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}.get(case.family, "mixtral")
    window = 6 if name == "qwen3 window" else None
    assert (facts.family, facts.num_experts, facts.sliding_window) == (family, 3, window)


def test_a_difference_is_seen(tmp_path):
    case = comparison.CASES["llama cheap_embed"]
    ours = GIVEN["cases"]["llama cheap_embed"]
    swapped = GIVEN["cases"]["llama grouped"]
    assert comparison.problems_of(case, swapped, ours)
    gates = comparison.gates_of(ours)
    gates[1] = gates[1] * np.float32(1.02)
    moved = {"shape": [3, 80], "float32": base64.b64encode(gates[1].tobytes()).decode()}
    assert comparison.problems_of(case, {**ours, "gates": [ours["gates"][0], moved]}, ours)


@pytest.mark.parametrize("name", comparison.ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, name):
    base, adapter = comparison.write_adapted(tmp_path, name)
    merged = with_adapter(open_checkpoint(base), open_adapter(str(adapter)))
    plain = open_checkpoint(base)
    for tensor, expected in GIVEN["adapters"][name].items():
        data = merged.read(tensor).tobytes()
        assert comparison.steps_between(data, base64.b64decode(expected)) <= 1
        assert comparison.steps_between(data, plain.read(tensor).tobytes()) > 100
