"""docs/wire.md says what upstream's ensemble has and ours lacks, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS

ROOT = Path(__file__).parents[3]
UPSTREAM = json.loads((ROOT / "tests/trtllm/contract.json").read_text(encoding="utf-8"))["triton"]["models"]["ensemble"]


def listed(heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    text = (ROOT / "docs/wire.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))


def test_the_inputs_that_are_not_taken_are_listed():
    upstream = {tensor["name"] for tensor in UPSTREAM["inputs"]}
    ours = {tensor.name for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)}
    assert listed("Inputs of upstream's ensemble that are not taken") == upstream - ours


def test_the_outputs_that_are_not_given_are_listed():
    upstream = {tensor["name"] for tensor in UPSTREAM["outputs"]}
    ours = {tensor.name for tensor in (*OUTPUTS, *ADDED_OUTPUTS)}
    assert listed("Outputs of upstream's ensemble that are not given") == upstream - ours


def test_every_tensor_of_the_contract_is_listed():
    assert listed("Inputs") == {tensor.name for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)}
    assert listed("Outputs") == {tensor.name for tensor in (*OUTPUTS, *ADDED_OUTPUTS)}
