"""Weights read back from an engine's files: equal to what was quantised, in the checkpoint's layout."""

from __future__ import annotations

import mmap
import shutil

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from conftest import QUANTIZABLE
from decoding import KINDS, each
from engine_faults import Files
from safetensors.numpy import load_file, save_file

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.quantize.grid import dequantize_blocks, quantize_blocks
from export.quantize.layout import GROUP_ROWS
from trt_build.comparison.read_back import ROW_MULTIPLE
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.stored_graph import read_graph
from trt_build.ort.questions.stored_weights import open_stored_weights


def expected(values, stored, name):
    """What an engine stores of a checkpoint's matrix or vector, float32."""
    matrix = stored.matrix(name)
    if matrix is None:
        return values
    grouped = matrix.grouped  # moeship's layout has float16 scales, and codes that fit them
    codes, scales = quantize_blocks(values, matrix.bits, matrix.block_size, half_scales=grouped)
    return dequantize_blocks(codes, scales, matrix.bits)


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_every_part_of_every_weight_is_what_was_quantised(built, family, precision, kernels):
    engine, model = built(family, precision, kernels)
    stored = open_stored_weights(engine, model)
    tensors = load_file(model.weights.checkpoint.folder / "model.safetensors")
    compared = 0
    for name, spec in model.weights.table.items():
        for group, parts in enumerate(spec.groups):
            num_rows = parts[0].shape[0]
            middle = num_rows // 2 + 1  # in the middle of a group of sixteen rows
            pieces = [stored.part_rows(name, group, *rows) for rows in ((0, middle), (middle, num_rows))]
            for part, *found in zip(parts, *pieces, strict=True):
                whole = tensors[part.name]
                whole = whole.reshape(-1, *part.shape[1:])[part.first_row : part.first_row + part.shape[0]]
                np.testing.assert_array_equal(np.concatenate(found), expected(whole, stored, name), err_msg=part.name)
                compared += 1
    assert compared > 40
    assert all(stored.misfit(name) is None for name in model.weights.table)


def test_float16_queries_lose_the_factor_that_they_carry(tiny_engines, tiny_checkpoint):
    model = read_model(open_checkpoint(tiny_checkpoint))
    stored = open_stored_weights(open_engine(tiny_engines("fp16", "cuda")), model)
    name = "transformer.h.1.mixer.Wqkv.weight"
    values = load_file(tiny_checkpoint / "model.safetensors")[name]
    assert stored.factors[name] == (192, 0.25)
    np.testing.assert_allclose(stored.load_rows(name, slice(0, 576)), values, rtol=2**-11, atol=1e-6)


def test_zero_points_that_are_stored_are_subtracted(tmp_path, tiny_engines, tiny_checkpoint):
    model = read_model(open_checkpoint(tiny_checkpoint))
    name = "transformer.embd.wte.weight"
    before = open_stored_weights(open_engine(tiny_engines("int4", "cuda")), model)
    row, changed = before.load_rows(name, slice(7, 8)), np.frombuffer(before.mapped, dtype=np.uint8).copy()
    scales = before.graph.extents[f"{name}.scales"].view(changed)
    before.graph.extents[f"{name}.zero_points"].view(changed)[7] += 3
    (tmp_path / "changed").write_bytes(changed.tobytes())
    with (tmp_path / "changed").open("rb") as file:
        object.__setattr__(before, "mapped", mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    np.testing.assert_allclose(
        before.load_rows(name, slice(7, 8)), row - 3 * np.repeat(scales[7], 64)[None], rtol=1e-5, atol=1e-6
    )


def test_an_expert_that_was_left_out_cannot_be_read(tmp_path):
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=7, num_experts=4, experts_per_token=2, **QUANTIZABLE)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.moe.gate.weight"][:3] = tensors["transformer.h.1.moe.gate.weight"][0]
    save_file(tensors, folder / "model.safetensors")
    engine = build_engine(BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision="int8"))
    model = read_model(open_checkpoint(folder))
    assert engine.manifest.left_out_experts == {"1": (2,)}
    stored, name = open_stored_weights(engine, model), "transformer.h.1.moe.mlp.fc1.weight"
    values = tensors["transformer.h.1.moe.mlp.3.fc1.weight"]
    np.testing.assert_array_equal(stored.part_rows(name, 3, 0, 448)[0], expected(values, stored, name))
    with pytest.raises(EngineError, match="expert 2 is asked for, and the engine does without it"):
        stored.part_rows(name, 2, 0, 1)


def test_a_graph_that_refers_past_the_data_file_is_refused(tmp_path, built):
    engine, model = built("phixtral", "fp32", "onnxruntime")
    folder = shutil.copytree(engine.folder, tmp_path / "engine")
    files = Files(folder, model.family.network(model.weights.checkpoint.config))
    tensor = next(t for t in files.models["model_scoring.onnx"].graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "offset").value = str(1 << 40)
    files.save()
    with pytest.raises(EngineError, match="is said to be bytes 1099511627776 to"):
        read_graph(folder, "model_scoring.onnx")
    (folder / "model_scoring.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(EngineError, match="it is no ONNX graph"):
        read_graph(folder, "model_scoring.onnx")


def test_chunks_of_rows_begin_at_whole_groups_of_the_layout():
    assert ROW_MULTIPLE % GROUP_ROWS == 0
