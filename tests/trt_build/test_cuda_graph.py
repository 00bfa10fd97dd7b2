"""The graph of a CUDA engine against what ONNX Runtime's CUDA kernels take, and how an engine is refused without one.

No GPU is needed: types are inferred over the written graph from the operators' own schemas.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import write_phi_checkpoint
from conftest import QUANTIZABLE
from cuda_kernels import check_types
from onnx.external_data_helper import load_external_data_for_model
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.errors import ExportError, MissingPackageError, QuantizationError
from export.provider import PROVIDERS
from export.quantize.grid import dequantize_blocks, unpack
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import open_device
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

PRECISIONS = ("fp16", "int8", "int4")
GRAPHS = ("model.onnx", "model_serving.onnx", "model_scoring.onnx")


def build(checkpoint, output, precision="int4", provider="cuda", **options):
    return build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, provider=provider, **options)
    )


def load(folder, name="model.onnx", weights=False):
    model = onnx.load(str(folder / name), load_external_data=False)
    if weights:
        # onnx refuses files that other tests have packaged by hard links.
        with tempfile.TemporaryDirectory() as unlinked:
            shutil.copyfile(folder / "model.onnx.data", Path(unlinked) / "model.onnx.data")
            load_external_data_for_model(model, unlinked)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_node_has_a_cuda_kernel_of_its_types(tiny_engines, precision, name):
    problems, operators = check_types(load(tiny_engines(precision, "cuda"), name))
    assert problems == []
    assert {"GroupQueryAttention", "MoE" if precision == "fp16" else "QMoE"} <= operators


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_node_of_a_dense_model_has_a_cuda_kernel_of_its_types(tmp_path, precision):
    dense = write_phi_checkpoint(tmp_path / "dense", seed=8, spelling="phi-msft", **QUANTIZABLE)
    problems, operators = check_types(load(build(dense, tmp_path / "engine", precision).folder))
    assert problems == []
    assert "Gelu" in operators


def test_a_graph_for_the_cpu_has_nodes_without_a_cuda_kernel(tiny_engines):
    problems, _ = check_types(load(tiny_engines("int4", kernels="onnxruntime")))
    assert any("attention: T is float" in problem for problem in problems)
    assert any("moe: T is float" in problem for problem in problems)


def attributes(model, operator):
    return [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == operator
    ]


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_quantised_experts_are_as_the_grouped_product_takes_them(tiny_engines, precision, bits):
    model = load(tiny_engines(precision, "cuda"), weights=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node, written in zip(
        [node for node in model.graph.node if node.op_type == "QMoE"], attributes(model, "QMoE"), strict=True
    ):
        # docs/contrib_ops/cuda/moe_qmoe.md: blocks of 64 or 128 (6.6), raw weights are laid out at load (5.1), both
        # widths multiples of 8 and at least 16 (4.2).
        assert written["block_size"] in (64, 128)
        assert (written["weights_prepacked"], written["expert_weight_bits"], written["quant_type"]) == (0, bits, b"int")
        assert (written["k"], written["activation_type"], written["normalize_routing_weights"]) == (2, b"gelu", 1)
        _, _, codes1, scales1, bias1, codes2, scales2, bias2 = (tensors.get(name) for name in node.input)
        for codes, scales, bias, (out, features) in (
            (codes1, scales1, bias1, (448, 192)), (codes2, scales2, bias2, (192, 448)),
        ):  # fmt: skip
            assert codes.shape == (5, out, features * bits // 8)
            assert (scales.shape, scales.dtype) == ((5, out, features // written["block_size"]), np.float16)
            assert (bias.shape, bias.dtype) == ((5, out), np.float16)


def test_the_embeddings_zero_points_are_written(tiny_engines):
    model = load(tiny_engines("int4", "cuda"), weights=True)
    [node] = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zero_points, scales = tensors[node.input[3]], tensors[node.input[2]]
    assert zero_points.shape == scales.shape
    assert (zero_points == 128).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_experts_stand_in_their_own_order_and_norms_routers_and_logits_stay_float32(
    tiny_checkpoint, tiny_engines, precision
):
    folder, outside = tiny_engines(precision, "cuda"), load_file(tiny_checkpoint / "model.safetensors")
    model = load(folder, weights=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert open_engine(folder).manifest.expert_order == (0, 1, 2, 3, 4)
    for name, values in tensors.items():
        if name.endswith((".ln.weight", ".ln.bias", "gate.weight")):
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, outside[name])
    name = "transformer.h.1.moe.mlp.fc2.weight"
    bits = {"fp16": 16, "int8": 8, "int4": 4}[precision]
    found = tensors[name].astype(np.float32) if bits == 16 else dequantize_blocks(
        unpack(tensors[f"{name}.codes"], bits), tensors[f"{name}.scales"].astype(np.float32), bits
    )  # fmt: skip
    for expert in range(5):
        expected = outside[f"transformer.h.1.moe.mlp.{expert}.fc2.weight"]
        assert np.std(found[expert] - expected) <= 0.1 * np.std(expected)
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_queries_carry_a_power_of_two_that_the_scale_takes_back(tiny_checkpoint, tiny_engines):
    model = load(tiny_engines("fp16", "cuda"), weights=True)
    outside = load_file(tiny_checkpoint / "model.safetensors")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    factor = np.float32(2.0**-2)  # the power of two nearest to 1/sqrt(32), by exponent
    for kind in ("weight", "bias"):
        for layer in range(3):
            name = f"transformer.h.{layer}.mixer.Wqkv.{kind}"
            whole = outside[name].astype(np.float16)
            assert (np.abs(whole[:192][whole[:192] != 0]) * factor >= 2.0**-24).all()
            expected = np.concatenate([(outside[name][:192] * factor).astype(np.float16), whole[192:]])
            np.testing.assert_array_equal(stored[name], expected)
            normal = np.abs(outside[name][:192]) * factor >= 2.0**-14
            # Beside subnormal numbers the multiplication rounds nothing.
            np.testing.assert_array_equal(stored[name][:192][normal], (whole[:192] * factor)[normal])
    for written in attributes(model, "GroupQueryAttention"):
        assert written["scale"] * float(factor) == pytest.approx(1 / math.sqrt(32), rel=1e-7)


def test_a_value_beyond_float16_is_refused_naming_the_tensor(tmp_path, tiny_checkpoint):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.h.2.moe.mlp.3.fc1.bias"][7] = -70000.0
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"h.2.moe.mlp.fc1.bias: .* 70000 is beyond float16"):
        build(checkpoint, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert build(checkpoint, tmp_path / "engine", provider="cpu").folder.is_dir()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"precision": "fp16", "provider": "cpu"}, QuantizationError, "no fp16 kernels .* build fp32, int8, int4"),
        ({"precision": "fp32"}, QuantizationError, "build fp16, int8, int4, or fp32 with --provider cpu"),
        ({"provider": "rocm"}, ExportError, "'rocm' is unknown. There are: cpu, cuda"),
    ],
)  # fmt: skip
def test_what_has_no_kernels_is_refused_by_name(tmp_path, tiny_checkpoint, options, error, text):
    with pytest.raises(error, match=text):
        build(tiny_checkpoint, tmp_path / "engine", **options)
    assert list(tmp_path.iterdir()) == []


def test_genai_is_told_the_provider_and_its_options(tiny_engines):
    config = json.loads((tiny_engines("int4", "cuda") / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {"use_tf32": "0"}}]


def test_verify_without_a_cuda_package_says_what_is_missing_before_it_loads_the_reference(
    tiny_checkpoint, tiny_engines, capsys, monkeypatch
):
    monkeypatch.setattr("trt_build.ort.verify._same_model", lambda *_: pytest.fail("the reference was loaded"))
    status = main(["-q", "verify", str(tiny_engines("int4", "cuda")), "--reference", str(tiny_checkpoint)])
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    assert output.err.startswith("EngineError: loading the engine")
    assert "built for CUDAExecutionProvider" in output.err
    assert "pip install 'moeship[cuda]'" in output.err


@pytest.fixture
def cuda_package(monkeypatch):
    """An ONNX Runtime that says it has CUDA, as the GPU package does without a device; this one's has none."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])


def test_a_cuda_package_without_a_device_is_told_with_its_reason(tiny_engines, cuda_package, monkeypatch):
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libcublasLt.so\n"))
    engine = open_engine(tiny_engines("int4", "cuda"))
    with pytest.raises(EngineError, match=r"cannot use cuda device 3 \(Failed to load libcublasLt.so\)"):
        open_device(engine, 3)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(EngineError, match=r"cannot use cuda device 0 \(Can't allocate memory .*\); see that nvidia"):
        Session(engine)


def test_a_session_whose_nodes_went_to_the_cpu_is_refused(tiny_engines, cuda_package, monkeypatch):
    # The device seems to be there, but what is created runs on the CPU.
    cpu = onnxruntime.InferenceSession
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(
        onnxruntime, "OrtValue", SimpleNamespace(ortvalue_from_numpy=lambda array, *_: value(array, "cpu", 0))
    )
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, **_: cpu(path, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(EngineError, match="no kernels of CUDAExecutionProvider for .*GroupQueryAttention"):
        Session(open_engine(tiny_engines("int4", "cuda")))


def test_the_kernels_break_ties_by_place_as_the_providers_say():
    assert PROVIDERS["cpu"].expert_order(3) == (2, 1, 0)
    assert PROVIDERS["cuda"].expert_order(3) == (0, 1, 2)


def test_asking_for_the_package_that_a_provider_needs_names_its_extra(tiny_engines, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"the package onnxruntime-gpu; .* pip install 'moeship\[cuda\]'"):
        open_device(open_engine(tiny_engines("int4", "cuda")))
