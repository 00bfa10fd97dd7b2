"""AWQ, compressed-tensors, float8 and bitsandbytes: what is refused, one error each."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import write_phi_checkpoint
from packed_checkpoints import ct_settings, pack_awq, pack_compressed, pack_int8, pack_nf4
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from export.checkpoint.folder import open_checkpoint
from export.errors import MoeshipError
from export.families import read_model

STEM = "model.layers.0.mlp.fc1"


def write(folder):
    return write_phi_checkpoint(folder, seed=1, hidden_size=64, num_heads=4, ffn_size=128)


def read_all(folder):
    model = read_model(open_checkpoint(folder))
    model.weights.grids()
    for name in model.weights.table:
        model.weights.load(name)


def refusal(folder):
    with pytest.raises(MoeshipError) as caught:
        read_all(folder)
    return str(caught.value)


def edit(folder, settings=None, **tensors):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings or {})
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    for ending, change in tensors.items():
        name = f"{STEM}.{ending.replace('__', '.')}"
        if change is None:
            del stored[name]
        else:
            stored[name] = change(stored[name].copy())
    save_file(stored, folder / "model.safetensors")


def with_first(value):
    def change(array):
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize("pack", [pack_awq, pack_compressed, pack_int8, pack_nf4])
def test_a_packed_model_is_read(tmp_path, pack):
    read_all(pack(write(tmp_path / "m")))


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({"version": "gemv"}, {}, "version is 'gemv', whose words are laid out otherwise, expected 'gemm'"),
        ({"bits": 3}, {}, "bits is 3, expected 4"),
        ({"group_size": "64"}, {}, "group_size is '64', expected a positive number"),
        ({"zero_point": None}, {}, "zero_point is None, expected true or false"),
        ({"group_size": 32}, {}, "its packed shapes do not fit 4 bits in groups of 32: found qweight [64, 16]"),
        ({}, {"qzeros": None}, f"{STEM}.qzeros is missing beside {STEM}.qweight"),
        ({}, {"qzeros": lambda array: array[:, 1:]}, "its packed shapes do not fit 4 bits in groups of 64"),
        ({}, {"scales": with_first(0)}, "1 of its scales are zero, negative or not finite"),
        ({}, {"qweight": lambda array: array.astype(np.int64)}, f"{STEM}.qweight is I64, expected I32 codes"),
    ],
)
def test_awq_that_does_not_fit_is_refused(tmp_path, settings, tensors, said):
    folder = pack_awq(write(tmp_path / "m"))
    edit(folder, settings, **tensors)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({"format": "marlin-24"}, {}, "format is 'marlin-24', expected one of pack-quantized"),
        ({"config_groups": {}}, {}, "config_groups is {}, which says nothing of weights"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "expected dense weights"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, {}, "transform_config rotates activations"),
        (ct_settings(num_bits=3), {}, "its settings say 3 bits of the type 'int', expected integers of 4 or 8 bits"),
        (ct_settings(group_size=32), {}, "its packed shapes do not fit 4 bits, strategy 'group' of 32"),
        (ct_settings(strategy="channel"), {"weight_scale": lambda a: np.hstack([a, a])},
         "its packed shapes do not fit 4 bits, strategy 'channel'"),
        (ct_settings(symmetric=False), {}, f"{STEM}.weight_zero_point is missing beside {STEM}.weight_packed"),
        ({}, {"weight_scale": None}, f"{STEM}.weight_scale is missing beside {STEM}.weight_packed"),
        ({}, {"weight_shape": with_first(3)}, "its weight_shape says [3, 64], its codes are [128, 64]"),
        ({}, {"weight_scale": with_first(-1)}, "1 of its scales are zero, negative or not finite"),
        (ct_settings(actorder="group"), {}, f"(actorder 'group'), and {STEM}.weight_g_idx, which says it, is missing"),
        (ct_settings(actorder=True), {}, f"(actorder True), and {STEM}.weight_g_idx, which says it, is missing"),
    ],
)  # fmt: skip
def test_compressed_tensors_that_do_not_fit_are_refused(tmp_path, settings, tensors, said):
    folder = pack_compressed(write(tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    if "config_groups" in settings:  # only the linear at hand has settings of its own
        groups = settings["config_groups"] and {
            "own": {**settings["config_groups"]["group_0"], "targets": [f"re:.*{STEM}$"]},
            **config["quantization_config"]["config_groups"],
        }
        settings = {**settings, "config_groups": groups}
    edit(folder, settings, **tensors)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("zeros", "is_zero"),
    [
        (np.zeros((128, 1), np.int8), True),
        (np.ones((128, 1), np.int8), False),
        (np.full((16, 1), -0x77777778, np.int32), True),  # 0x88888888: zeros, which are stored plus 8
        (np.zeros((16, 1), np.int32), False),
        (np.full((16, 1), -0x77777777, np.int32), False),
    ],
)
def test_zero_points_of_a_symmetric_linear_are_zero_or_refused(tmp_path, zeros, is_zero):
    folder = pack_compressed(write(tmp_path / "m"))
    before = open_checkpoint(folder).read_float32(f"{STEM}.weight")
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, f"{STEM}.weight_zero_point": zeros}, folder / "model.safetensors")
    if is_zero:
        assert (open_checkpoint(folder).read_float32(f"{STEM}.weight") == before).all()
    else:
        assert f"it is symmetric, and {STEM}.weight_zero_point has zero points that are not zero" in refusal(folder)


def test_order_of_activation_by_weight_leaves_the_features_in_order(tmp_path):
    folder = pack_compressed(write(tmp_path / "m"))
    before = open_checkpoint(folder).read_float32(f"{STEM}.weight")
    edit(folder, ct_settings(actorder="weight"))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.read_float32(f"{STEM}.weight") == before).all()
    assert checkpoint.packed[f"{STEM}.weight"].grid(checkpoint) is not None


def test_compressed_tensors_may_be_in_order_of_activation(tmp_path):
    folder = pack_compressed(write(tmp_path / "m"), group_size=32)
    stored = load_file(folder / "model.safetensors")
    name = f"{STEM}.weight_g_idx"
    groups = np.random.default_rng(0).permutation(np.arange(64) // 32).astype(np.int32)
    in_order = open_checkpoint(folder).read_float32(f"{STEM}.weight")
    scales = stored[f"{STEM}.weight_scale"].astype(np.float32)
    codes = np.rint(in_order / np.repeat(scales, 32, axis=1))
    save_file({**stored, name: groups}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.read_float32(f"{STEM}.weight") == codes * scales[:, groups]).all()
    assert checkpoint.packed[f"{STEM}.weight"].grid(checkpoint) is None
    save_file({**stored, name: np.full(64, -1, np.int32)}, folder / "model.safetensors")
    assert (open_checkpoint(folder).read_float32(f"{STEM}.weight") == in_order).all()
    save_file({**stored, name: np.zeros(64, np.int32)}, folder / "model.safetensors")
    assert "its g_idx is no permutation of the groups: group 0 has 64 input features" in refusal(folder)


@pytest.mark.parametrize(
    ("pack", "tensors", "said"),
    [
        (pack_nf4, {"weight__absmax": with_first(np.inf)}, "some of its absmax are negative or not finite"),
        (pack_nf4, {"weight__absmax": None}, f"{STEM}.weight.absmax is missing beside"),
        (
            pack_nf4,
            {"weight__absmax": lambda a: a[1:]},
            "shapes do not fit nf4 of [128, 64] in blocks of 64",
        ),
        (pack_nf4, {"weight": lambda a: a[1:]}, "shapes do not fit nf4 of [128, 64] in blocks of 64"),
        (pack_nf4, {"weight__quant_state.bitsandbytes__nf4": None}, "are not"),
        (pack_nf4, {"weight__quant_state.bitsandbytes__nf4": with_first(65)}, "its quant_state is not JSON"),
        (pack_int8, {"SCB": with_first(-1)}, "some of its SCB are negative or not finite"),
        (pack_int8, {"SCB": lambda a: a[1:]}, "SCB is F32 [127], expected F32 [128]"),
        (pack_int8, {"weight": lambda a: a.astype(np.float16)}, f"{STEM}.weight is F16, expected I8 beside {STEM}.SCB"),
    ],
)
def test_bitsandbytes_that_do_not_fit_are_refused(tmp_path, pack, tensors, said):
    folder = pack(write(tmp_path / "m"))
    if "weight__quant_state.bitsandbytes__nf4" in tensors:
        stored = load_file(folder / "model.safetensors")
        change, name = tensors.popitem()[1], f"{STEM}.weight.quant_state.bitsandbytes__nf4"
        state = stored.pop(name)
        if change is not None:
            stored[name] = change(state.copy())
        save_file(stored, folder / "model.safetensors")
        said = said if change is not None else f"{STEM}.weight"
    edit(folder, **tensors)
    assert said in refusal(folder)


@pytest.mark.parametrize("layout", [0, 2])
def test_int8_in_the_order_of_a_gpus_tiles_is_refused(tmp_path, layout):
    folder = pack_int8(write(tmp_path / "m"))
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, f"{STEM}.weight_format": np.array(layout, np.uint8)}, folder / "model.safetensors")
    if layout:
        assert f"{STEM}.weight: its weight_format is [{layout}], expected [0]" in refusal(folder)
    else:
        read_all(folder)


@pytest.mark.parametrize(
    ("quant_block", "scale_shape", "name"),
    [([32, 16], (4, 4), "weight_scale_inv"), (None, (1,), "weight_scale"), (None, (128, 1), "weight_scale")],
)
def test_float8_is_multiplied_by_the_scale_of_its_block(tmp_path, quant_block, scale_shape, name):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((128, 64)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, scale_shape).astype(np.float32)
    stored = {
        "x.weight": torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn),
        f"x.{name}": torch.from_numpy(scales),
        "x.input_scale": torch.ones(()),
    }
    save_torch(stored, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": quant_block}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    checkpoint = open_checkpoint(tmp_path)
    high, wide = quant_block or (128 // scale_shape[0], 64)
    wanted = values.astype(np.float32) * np.kron(scales.reshape(128 // high, -1), np.ones((high, wide), np.float32))
    assert set(checkpoint.tensors) == {"x.weight"}
    assert (checkpoint.read_float32("x.weight") == wanted).all()
    assert (checkpoint.read_float32("x.weight", slice(5, 40)) == wanted[5:40]).all()


@pytest.mark.parametrize(
    ("block", "shape", "said"),
    [
        (
            [32, 16],
            (4, 3),
            "found F8_E4M3 [128, 64] with scales F32 [4, 3] and blocks of (32, 16)",
        ),
        ([32], (4, 4), "the block is [32], expected two numbers"),
        (None, (4, 4), "found F8_E4M3 [128, 64] with scales F32 [4, 4] and blocks of None"),
    ],
)
def test_float8_blocks_that_do_not_fit_are_refused(tmp_path, block, shape, said):
    stored = {"x.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(shape)}
    save_torch(stored, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": block}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(MoeshipError) as caught:
        open_checkpoint(tmp_path)
    assert said in str(caught.value)
