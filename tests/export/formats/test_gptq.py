"""GPTQ checkpoints that are read, and those that are refused: one error each."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from packed_checkpoints import gptq_parts, pack_gptq, packed_stream
from safetensors.numpy import load_file, save_file

from export.checkpoint.digests import recorded
from export.checkpoint.folder import open_checkpoint
from export.errors import MoeshipError
from export.families import read_model
from export.inspection import describe

STEM = "transformer.h.0.mixer.out_proj"


@pytest.fixture
def packed(tmp_path):
    folder = write_phixtral_checkpoint(
        tmp_path / "packed", seed=3, num_experts=3, experts_per_token=2, hidden_size=64, num_heads=4, ffn_size=96
    )
    return pack_gptq(folder)


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_settings(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    settings = {**config["quantization_config"], **changes}
    settings = {key: value for key, value in settings.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def refusal(folder):
    """The text of the error that reading every weight of a checkpoint gives."""
    with pytest.raises(MoeshipError) as caught:
        read_all(folder)
    return str(caught.value)


def read_all(folder):
    model = read_model(open_checkpoint(folder))
    model.weights.grids()
    for name in model.weights.table:
        model.weights.load(name)


def test_families_see_ordinary_weights(packed):
    model = read_model(open_checkpoint(packed))
    experts = model.weights.load("transformer.h.1.moe.mlp.fc1.weight")
    assert experts.shape == (3, 96, 64)
    assert experts.std() > 0.01
    assert "gptq int4 in groups of 32" in describe(open_checkpoint(packed)).dtype_bytes


@pytest.mark.parametrize("spelling", ["transformers", "phi-msft"])
def test_values_are_near_those_that_were_packed(tmp_path, spelling):
    folder = write_phi_checkpoint(tmp_path / "phi", seed=1, spelling=spelling, hidden_size=64, num_heads=4, ffn_size=96)
    before = read_model(open_checkpoint(folder)).weights
    expected = {name: before.load(name) for name in before.table}
    after = read_model(open_checkpoint(pack_gptq(folder))).weights
    for name, values in expected.items():
        error = np.linalg.norm(after.load(name) - values) / np.linalg.norm(values)
        assert error == 0 or 0.01 < error < 0.15


def test_a_mixtrals_experts_are_read(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1, spelling="published", hidden_size=96, ffn_size=64)
    expected = read_model(open_checkpoint(folder)).weights.load("model.layers.0.mlp.experts.gate_up.weight")
    found = read_model(open_checkpoint(pack_gptq(folder))).weights.load("model.layers.0.mlp.experts.gate_up.weight")
    assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected)


def test_settings_may_lie_in_a_file_of_their_own(packed):
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    expected = read_model(open_checkpoint(packed)).weights.load(f"{STEM}.weight")
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
    assert (read_model(open_checkpoint(packed)).weights.load(f"{STEM}.weight") == expected).all()


def test_a_bias_of_zeros_that_the_family_has_not_is_left_out(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "mixtral", seed=1, spelling="published", hidden_size=96, ffn_size=64)
    pack_gptq(folder)
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(96, np.float16)}))
    read_model(open_checkpoint(folder))
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(96, np.float16)}))
    assert f"{name} [96] is not a tensor of this family" in refusal(folder)


def test_modules_may_have_bits_and_groups_of_their_own(packed):
    def repack(tensors):
        parts = gptq_parts(np.random.default_rng(0).standard_normal((64, 64)), bits=8, group_size=64)
        tensors.update({f"{STEM}.{ending}": part for ending, part in parts.items()})

    edit_tensors(packed, repack)
    assert "its packed shapes do not fit 4 bits in groups of 32" in refusal(packed)
    edit_settings(packed, dynamic={"+:.*out_proj.*": {"bits": 8, "group_size": 64}})
    checkpoint = open_checkpoint(packed)
    assert checkpoint.packed[f"{STEM}.weight"].label == "gptq int8 in groups of 64"
    assert abs(read_model(checkpoint).weights.load(f"{STEM}.weight").std() - 1) < 0.1


def test_each_byte_is_read_and_hashed_once(packed):
    model = read_model(open_checkpoint(packed))
    name = "transformer.h.0.moe.mlp.fc1.weight"
    checkpoint = recorded(model.weights.checkpoint, lambda _: None, model.weights.run_starts(name))
    weights = type(model.weights)(checkpoint=checkpoint, table=model.weights.table)
    for _ in weights.grid_chunks(name, model.weights.grid(name)):
        pass
    read = {source for part in weights.table[name].parts for source in checkpoint.packed[part.name].sources}
    assert set(checkpoint.runs()) == read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 5}, "bits is 5, expected one of 2, 3, 4, 8"),
        ({"bits": "absent"}, "bits is None, expected one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size is 0, expected a positive number, or -1 for one group a row"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', expected gptq or gptq_v2"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16', which moeship does not support"),
        ({"adapter": {"name": "lora"}}, "adapter is {'name': 'lora'}, which moeship does not support"),
        ({"bits": 8}, "its packed shapes do not fit 8 bits in groups of 32: found qweight [8, 192]"),
        ({"group_size": 64}, "its packed shapes do not fit 4 bits in groups of 64"),
        ({"group_size": -1}, "its packed shapes do not fit 4 bits in groups of a whole row"),
    ],
)
def test_settings_that_do_not_fit_are_refused(packed, changes, said):
    edit_settings(packed, **changes)
    assert said in refusal(packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_the_other_version_are_refused_where_the_model_is_symmetric(tmp_path, bits):
    """Every weight would be a step off. In version 1 a zero point is stored less one."""
    middle = 1 << (bits - 1)
    folder = write_phi_checkpoint(tmp_path / "m", seed=1, hidden_size=64, num_heads=4, ffn_size=96, num_layers=1)
    pack_gptq(folder, bits=bits, sym=True)
    read_all(folder)
    edit_settings(folder, checkpoint_format="gptq")
    said = "sym is true, and read as checkpoint_format {} every zero point of {}.weight is {}, expected {}"
    stem = "model.layers.0.mlp.fc1"
    assert said.format("gptq", stem, middle + 1, middle) in refusal(folder)
    edit_settings(folder, checkpoint_format="gptq", sym=False)
    read_all(folder)

    def less_one(tensors):
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            groups, words = tensors[name].shape
            tensors[name] = packed_stream(np.full((groups, words * 32 // bits), middle - 1, np.uint8), bits)

    edit_tensors(folder, less_one)
    edit_settings(folder, checkpoint_format="gptq", sym=True)
    read_all(folder)
    edit_settings(folder, checkpoint_format="gptq_v2")
    assert said.format("gptq_v2", stem, middle - 1, middle) in refusal(folder)


def change(ending, edit):
    def of(tensors):
        tensors[f"{STEM}.{ending}"] = edit(tensors[f"{STEM}.{ending}"].copy())

    return of


def with_value(value, place=(0, 3)):
    def of(array):
        array[place] = value
        return array

    return of


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (change("scales", with_value(0)), "1 of its scales are zero, negative or not finite, such as 0;"),
        (change("scales", with_value(-0.5)), "1 of its scales are zero, negative or not finite, such as -0.5"),
        (change("scales", with_value(np.inf)), "1 of its scales are zero, negative or not finite, such as inf"),
        (change("g_idx", with_value(2, 5)), "its g_idx names the groups 0 to 2, expected 0 to 1"),
        (change("g_idx", with_value(-1, 5)), "its g_idx names the groups -1 to 1, expected 0 to 1"),
        (change("g_idx", with_value(1, 5)), "its g_idx is no permutation of the groups: group 0 has 31 input features"),
        (change("g_idx", lambda array: array[:-1]), "its packed shapes do not fit 4 bits in groups of 32"),
        (change("qzeros", lambda array: array[:, :-1]), "its packed shapes do not fit 4 bits in groups of 32"),
        (change("qweight", lambda array: array.astype(np.int64)), f"{STEM}.qweight is I64, expected I32 codes"),
        (lambda tensors: tensors.pop(f"{STEM}.scales"), f"{STEM}.scales is missing beside {STEM}.qweight"),
        (
            lambda tensors: tensors.update({f"{STEM}.weight": np.zeros((64, 64), np.float16)}),
            f"{STEM}.weight is there both packed and as floats; remove one of the two",
        ),
    ],
)
def test_damaged_tensors_are_refused(packed, edit, said):
    edit_tensors(packed, edit)
    assert said in refusal(packed)


def test_a_config_that_speaks_of_packing_where_nothing_is_packed_is_refused(tmp_path):
    folder = write_phi_checkpoint(tmp_path / "phi", seed=1)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    assert "packed by gptq, and no tensor has the names of that format" in refusal(folder)
