"""Gate rows against transformers' own hidden states and against mergekit's formulas worked here in torch."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import END_OF_TEXT, NUM_BYTE_TOKENS, write_phi_checkpoint
from safetensors.numpy import load_file
from transformers import PhiForCausalLM

from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError, MergeError
from export.families import read_model
from export.merge.config import ExpertSource, GateMode, MergeConfig, ModelSource, read_merge_config
from export.merge.gates import gate_matrices, tokenize_prompts
from export.tokenizer.settings import read_settings

SOME = ModelSource("x")
POSITIVE = (("def f(x):", "import os"), ("A quiet evening.",), ("#include <a.h>", "int x;", "void"))
NEGATIVE = ((), ("def g():", "x"), ())
START = 256
EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-phixtral"
GOLDEN = Path(__file__).parent / "golden_gates.json"


@pytest.fixture(scope="module", params=["transformers", "phi-msft"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / request.param
    return read_model(open_checkpoint(write_phi_checkpoint(folder, seed=5, spelling=request.param)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same weights in transformers."""
    folder = write_phi_checkpoint(tmp_path_factory.mktemp("reference") / "model", seed=5)
    return PhiForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def merge_config(mode, positive=POSITIVE, negative=NEGATIVE):
    experts = tuple(
        ExpertSource(model=SOME, positive_prompts=p, negative_prompts=n, noise_scale=0.0, residual_scale=1.0)
        for p, n in zip(positive, negative, strict=True)
    )
    return MergeConfig(base=SOME, experts=experts, gate_mode=mode, dtype=None, experts_per_token=2, text="")


def byte_ids(text):
    """The start token and one id a byte, from the alphabet's sorted order as the tokenizer file has it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    letters = {byte: chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)}
    order = {letter: index for index, letter in enumerate(sorted(letters.values()))}
    return [START, *(order[letters[byte]] for byte in text.encode())]


def mergekit_hidden(reference, prompts, average):
    """hidden_states[:-1] at the last position of a left-padded batch, mean over prompts; [L, H]."""
    ids = [byte_ids(prompt) for prompt in prompts]
    longest = max(map(len, ids))
    if average:  # over each prompt's own tokens
        with torch.no_grad():
            outputs = [reference(torch.tensor([row]), output_hidden_states=True).hidden_states[:-1] for row in ids]
        return torch.stack([torch.stack(states)[:, 0].mean(dim=1) for states in outputs]).mean(dim=0)
    tokens = torch.tensor([[START] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        states = reference(tokens, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
    return torch.stack(states)[:, :, -1].mean(dim=1)


def normalised(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode", [GateMode.HIDDEN, GateMode.HIDDEN_LAST, GateMode.HIDDEN_AVG])
def test_hidden_gates_equal_mergekits_formula_on_transformers_states(base, reference, mode):
    gates = gate_matrices(merge_config(mode), base, seed=0)
    assert sorted(gates) == [0, 1, 2]
    average = mode is GateMode.HIDDEN_AVG
    rows = []
    for positive, negative in zip(POSITIVE, NEGATIVE, strict=True):
        row = mergekit_hidden(reference, positive, average)
        rows.append(normalised(row - mergekit_hidden(reference, negative, average) if negative else row))
    for layer, gate in gates.items():
        assert gate.dtype == np.float32
        expected = torch.stack([row[layer] for row in rows]).numpy()
        np.testing.assert_allclose(gate, expected, atol=1e-5)


@pytest.mark.parametrize("mode", [GateMode.HIDDEN_AVG, GateMode.HIDDEN_LAST])
def test_the_examples_gates_are_those_that_transformers_layers_gave(mode):
    """golden_gates.json: the first six values of each row, [L, E, 6], by PhiDecoderLayer of transformers 5.24."""
    config = dataclasses.replace(read_merge_config(EXAMPLE / "merge.yml"), gate_mode=mode)
    gates = gate_matrices(config, read_model(open_checkpoint(config.base.location)), seed=0)
    expected = np.array(json.loads(GOLDEN.read_text())[mode.value])
    found = np.stack([gates[layer][:, :6] for layer in sorted(gates)])
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_hidden_modes_differ(base):
    last, average = (gate_matrices(merge_config(m), base, seed=0) for m in (GateMode.HIDDEN, GateMode.HIDDEN_AVG))
    assert np.abs(last[1] - average[1]).max() > 0.01


def test_cheap_embed_equals_normalised_sums_of_one_hot_rows(base):
    name = "transformer.embd.wte.weight"
    tensors = load_file(base.weights.checkpoint.folder / "model.safetensors")
    table = torch.from_numpy(tensors.get(name, tensors.get("model.embed_tokens.weight"))).double()

    def direction(prompts):
        ids = torch.tensor([token for prompt in prompts for token in byte_ids(prompt)])
        return normalised(torch.nn.functional.one_hot(ids, len(table)).double().sum(dim=0) @ table)

    gates = gate_matrices(merge_config(GateMode.CHEAP_EMBED), base, seed=0)
    for layer in range(3):
        for expert, (positive, negative) in enumerate(zip(POSITIVE, NEGATIVE, strict=True)):
            row = direction(positive) - direction(negative) if negative else direction(positive)
            np.testing.assert_allclose(gates[layer][expert], normalised(row).numpy(), atol=1e-6)


def test_an_empty_prompt_is_the_start_token_alone(base):
    gates = gate_matrices(merge_config(GateMode.CHEAP_EMBED, (("",), ("",)), ((), ())), base, seed=0)
    tensors = load_file(base.weights.checkpoint.folder / "model.safetensors")
    row = next(values for name, values in tensors.items() if "embd" in name or "embed" in name)[START]
    np.testing.assert_allclose(gates[0][0], row / np.linalg.norm(row), atol=1e-6)
    np.testing.assert_array_equal(gates[0][0], gates[0][1])


@pytest.mark.parametrize("mode", [GateMode.CHEAP_EMBED, GateMode.HIDDEN, GateMode.HIDDEN_AVG])
def test_a_prompt_without_a_token_counts_as_zeros(base, tmp_path, mode):
    folder = write_phi_checkpoint(tmp_path / "a", seed=5)
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    model = read_model(open_checkpoint(folder))
    gates = gate_matrices(merge_config(mode, (("",), ("ab",)), ((), ())), model, seed=0)
    for gate in gates.values():
        assert not gate[0].any()
        assert np.linalg.norm(gate[1]) == pytest.approx(1.0, abs=1e-6)


def test_uniform_random_fills_the_range_of_a_linear_layer_and_nothing_else(base):
    gates = gate_matrices(merge_config(GateMode.UNIFORM_RANDOM), base, seed=3)
    values = np.stack(list(gates.values()))
    bound = 1 / math.sqrt(40)
    assert values.shape == (3, 3, 40)
    assert 0.9 * bound < np.abs(values).max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_random_has_unit_variance(base):
    values = np.stack(list(gate_matrices(merge_config(GateMode.RANDOM), base, seed=3).values()))
    assert values.std() == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("mode", [GateMode.RANDOM, GateMode.UNIFORM_RANDOM])
def test_random_gates_follow_the_seed_and_differ_between_layers(base, mode):
    first, again, other = (gate_matrices(merge_config(mode), base, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[2], again[2])
    assert (first[2] != other[2]).any()
    assert (first[0] != first[1]).any()


def test_a_prompt_longer_than_the_context_is_refused(base):
    with pytest.raises(
        MergeError, match=r"positive prompt of expert 0 \('aaaa.*\.\.\.'\) has 65 tokens, .* at most 64"
    ):
        gate_matrices(merge_config(GateMode.HIDDEN, (("a" * 64,), ("b",)), ((), ())), base, seed=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = write_phi_checkpoint(tmp_path / "a", seed=1, vocab_size=NUM_BYTE_TOKENS - 1)
    model = read_model(open_checkpoint(folder))
    with pytest.raises(MergeError, match=r"negative prompt of expert 1 \(''\) holds token 256, .* has 256 rows"):
        gate_matrices(merge_config(GateMode.CHEAP_EMBED, ((), ()), ((), ("",))), model, seed=0)


def test_a_base_without_a_tokenizer_is_refused(tmp_path):
    folder = write_phi_checkpoint(tmp_path / "a", seed=1)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; save one beside the weights"):
        gate_matrices(merge_config(GateMode.HIDDEN), read_model(open_checkpoint(folder)), seed=0)


@pytest.mark.parametrize("token", [END_OF_TEXT, {"content": END_OF_TEXT, "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_start_token_is_read_from_either_file_in_either_form(tmp_path, token, name):
    folder = write_phi_checkpoint(tmp_path / "a", seed=1, spelling="phi-msft")
    (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(json.dumps({"bos_token": token}))
    config, model = merge_config(GateMode.HIDDEN, (("a",),), ((),)), read_model(open_checkpoint(folder))
    settings = read_settings(folder, model.weights.checkpoint.config)
    assert tokenize_prompts(config, model, settings)[0] == [[[START, settings.tokenizer.encode("a")[0]]]]


@pytest.mark.parametrize("mode", ["CHEAP_EMBED", "HIDDEN"])
def test_gates_load_neither_torch_nor_transformers(tmp_path, mode):
    folder = write_phi_checkpoint(tmp_path / "a", seed=1)
    script = f"""
import sys
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.gates import gate_matrices
from export.merge.config import ExpertSource, GateMode, MergeConfig, ModelSource
some = ModelSource("")
expert = ExpertSource(model=some, positive_prompts=("x",), negative_prompts=(), noise_scale=0.0, residual_scale=1.0)
config = MergeConfig(
    base=some, experts=(expert, expert), gate_mode=GateMode.{mode}, dtype=None, experts_per_token=1, text=""
)
gate_matrices(config, read_model(open_checkpoint({str(folder)!r})), seed=0)
print(sorted({{"torch", "transformers", "onnxruntime"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
