"""MXFP4: every byte against transformers' own dequantisation, what is kept exactly, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from export.checkpoint.folder import open_checkpoint
from export.errors import MoeshipError
from export.families import read_model
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.stored_weights import open_stored_weights

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
ROW = "model.layers.0.mlp.experts.gate_up.weight"


def replaced(folder, **changes):
    """The checkpoint with some tensors of GATE_UP changed; None takes one away."""
    stored = load_file(folder / "model.safetensors")
    for ending, change in changes.items():
        name = f"{GATE_UP}_{ending}"
        values = None if change is None else change(stored[name].copy())
        stored = {one: array for one, array in stored.items() if one != name} | (
            {} if change is None else {name: values}
        )
    save_file(stored, folder / "model.safetensors")
    return folder


def by_transformers(folder, name):
    stored = load_file(folder / "model.safetensors")
    blocks, scales = (torch.from_numpy(stored[f"{name}_{part}"]) for part in ("blocks", "scales"))
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).numpy()


def test_every_code_and_scale_is_what_transformers_makes_of_it(tmp_path):
    def all_bytes(blocks):
        blocks.reshape(-1)[:] = np.arange(blocks.size) % 256
        return blocks

    def all_scales(scales):
        scales.reshape(-1)[:] = 10 + np.arange(scales.size) % 230
        return scales

    folder = write_gpt_oss_checkpoint(tmp_path / "c", seed=1, spelling="mxfp4", num_experts=3)
    replaced(folder, blocks=all_bytes, scales=all_scales)
    weights = read_model(open_checkpoint(folder)).weights
    expected = by_transformers(folder, GATE_UP)
    assert np.array_equal(weights.load(ROW), expected)
    pieces = np.concatenate(list(weights.chunks(ROW, (2, 0, 1), 16)))
    assert np.array_equal(pieces, expected[[2, 0, 1]].reshape(-1, expected.shape[-1]))
    down = "model.layers.1.mlp.experts.down"
    assert np.array_equal(weights.load(f"{down}.weight"), by_transformers(folder, f"{down}_proj"))


@pytest.mark.parametrize(
    ("precision", "kernels", "bits", "exact"),
    [
        ("int8", "moeship", 5, True),
        ("int8", "onnxruntime", 8, True),
        ("int4", "moeship", 4, False),
        ("fp32", "onnxruntime", None, True),
    ],
)
def test_the_values_are_kept_exactly_where_the_bits_have_room_and_else_the_cost_is_said(
    tmp_path, precision, kernels, bits, exact
):
    folder = write_gpt_oss_checkpoint(tmp_path / "c", seed=1, spelling="mxfp4", hidden_size=128)
    options = BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision=precision, kernels=kernels)
    build_engine(options)
    engine, model = open_engine(tmp_path / "e"), read_model(open_checkpoint(folder))
    stored = open_stored_weights(engine, model)
    matrix = stored.matrix(ROW)
    assert (None if matrix is None else matrix.bits) == bits
    found = np.concatenate([stored.part_rows(ROW, expert, 0, 128)[0] for expert in range(5)])
    expected = by_transformers(folder, GATE_UP).reshape(found.shape)
    assert np.array_equal(found, expected) is exact
    role = engine.manifest.packed["expert"]
    if bits is not None:
        assert role.codes_kept + role.quantised_anew == 4
        assert (role.quantised_anew == 0) is exact
        assert (float(role.relative_error) == 0) is exact
        assert exact or 0.001 < float(role.relative_error) < 0.2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"blocks": None}, "gate_up_proj_blocks is missing beside"),
        ({"scales": None}, "gate_up_proj_scales is missing beside"),
        ({"blocks": lambda blocks: blocks[..., :8].copy()}, r"expected bytes \[E, N, K/32, 16\]"),
        ({"scales": lambda scales: scales[:2].copy()}, r"found blocks U8 .*, expected bytes"),
        ({"blocks": lambda blocks: blocks.astype(np.int8)}, "found blocks I8"),
        ({"scales": lambda scales: np.full_like(scales, 255)}, "a byte of .*_scales is 255, which is no number"),
        ({"scales": lambda scales: np.full_like(scales, 254)}, "values are NaN or infinite"),
        (
            {part: lambda values: values[:, :-2].copy() for part in ("blocks", "scales")},
            r"gate_up_proj_blocks .*found \[5, 126, 96\], config.json says \[5, 128, 96\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(tmp_path, changes, problem):
    folder = write_gpt_oss_checkpoint(tmp_path / "c", seed=1, spelling="mxfp4")
    replaced(folder, **changes)
    with pytest.raises(MoeshipError, match=problem):
        read_model(open_checkpoint(folder)).weights.load(ROW)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_scales_beyond_float16_are_refused_where_the_kernels_take_it(tmp_path, precision):
    folder = write_gpt_oss_checkpoint(tmp_path / "c", seed=1, spelling="mxfp4", hidden_size=128)
    replaced(folder, scales=lambda scales: np.full_like(scales, 160))
    options = BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision=precision, kernels="moeship")
    with pytest.raises(MoeshipError, match=f"{ROW}: a value or scale of magnitude .* is beyond float16's 65504"):
        build_engine(options)
    assert not (tmp_path / "e").exists()


def test_files_that_are_not_packed_as_config_json_says_are_refused(tmp_path):
    folder = write_gpt_oss_checkpoint(tmp_path / "c", seed=1)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoeshipError, match="packed by mxfp4, and no tensor has the names of that format"):
        open_checkpoint(folder)
