"""What does not fit is refused with one clear sentence, when the graph is loaded or run: never wrong numbers."""

import platform

import numpy as np
import pytest
from kernel_nodes import (
    block_linear,
    emulating_library,
    experts,
    levels,
    levels_and_emulations,
    random_matrices,
)

from trt_build.errors import EngineError
from trt_build.ort import kernels
from trt_build.ort.planning.prepare import chosen_kernels

pytestmark = pytest.mark.needs_kernels


def linear():
    return block_linear(random_matrices(np.random.default_rng(0), 1, 40, 96, 4, 32, zeros=True))


def mixture():
    draw = np.random.default_rng(0)
    return experts(random_matrices(draw, 3, 48, 64, 4, 32), random_matrices(draw, 3, 64, 48, 4, 32), 2)


def with_attribute(node, name, value):
    if value is None:
        del node.attributes[name]
    else:
        node.attributes[name] = value


BAD_ATTRIBUTES = [
    ("layout", 2, "found layout 2, expected 1"),
    ("layout", None, "the attribute layout is missing"),
    ("bits", 7, "found bits 7, expected 2, 3, 4, 5, 6 or 8"),
    ("bits", 9, "found bits 9, expected 2 to 8"),
    ("bits", 8, "codes' tensor has the shape"),
    ("block_size", 48, "found block_size 48, expected 32, 64 or 128"),
    ("block_size", 64, "codes' tensor has the shape"),
    ("activations", "int4", 'found activations "int4", expected int8 or float32'),
]


@pytest.mark.parametrize("make", [linear, mixture])
@pytest.mark.parametrize(("name", "value", "message"), BAD_ATTRIBUTES)
def test_attributes_of_both(make, name, value, message):
    node = make()
    with_attribute(node, name, value)
    with pytest.raises(Exception, match=message) as error:
        node.session()
    assert "layer/mlp" in str(error.value)
    assert "export the engine again" in str(error.value)


@pytest.mark.parametrize(
    ("make", "name", "value", "message"),
    [
        (linear, "in_features", 128, "codes' tensor has the shape"),
        (linear, "in_features", 0, "found in_features 0"),
        (linear, "out_features", 49, "codes' tensor has the shape"),
        (linear, "out_features", 41, r"bias has the shape \[40\], expected \[41\]"),
        (linear, "out_features", -1, "found out_features -1"),
        (linear, "in_features", (1 << 30) + 1, "found in_features 1073741825, expected 1 to 1073741824"),
        (linear, "in_features", 1 << 30, r"expected \[3, 33554432, 256\]"),
        (linear, "out_features", (1 << 63) - 1, "found out_features 9223372036854775807, expected 1 to 1073741824"),
        (linear, "out_features", 1 << 30, r"expected \[67108864, 3, 256\]"),
        (mixture, "second_bits", 7, "found second_bits 7, expected 2, 3, 4, 5, 6 or 8"),
        (mixture, "second_bits", 6, "codes' tensor has the shape"),
        (mixture, "second_block_size", 96, "found second_block_size 96, expected 32, 64 or 128"),
        (mixture, "second_block_size", 64, "codes' tensor has the shape"),
        (mixture, "k", 4, "found k 4, expected 1 to 3"),
        (mixture, "k", 0, "found k 0, expected 1 to 3"),
        (mixture, "experts", 2, "codes' tensor has the shape"),
        (mixture, "experts", 4097, "found experts 4097, expected 1 to 4096"),
        (mixture, "experts", -1, "found experts -1"),
        (mixture, "hidden_size", 1 << 40, "found hidden_size"),
        (mixture, "hidden_size", 1 << 24, r"expected \[3, 3, 524288, 256\]"),
        (mixture, "expert_size", (1 << 24) + 1, "found expert_size 16777217, expected 1 to 16777216"),
        (mixture, "expert_size", 96, "codes' tensor has the shape"),
        (mixture, "activation", "relu", 'found activation "relu", expected gelu or silu or swiglu'),
        (mixture, "activation", "swiglu", "codes' tensor has the shape"),
        (mixture, "activation_limit", -1.0, "activation_limit"),
        (mixture, "activation_limit", float("nan"), "activation_limit"),
    ],
)
def test_attributes_of_one(make, name, value, message):
    node = make()
    with_attribute(node, name, value)
    with pytest.raises(Exception, match=message):
        node.session()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codes", lambda array: array[..., :-1], r"\[3, 3, 255\], expected \[3, 3, 256\]"),
        ("codes", lambda array: array[:0], r"\[0, 3, 256\], expected \[3, 3, 256\]"),
        ("codes", lambda array: array.reshape(-1), r"\[2304\], expected \[3, 3, 256\]"),
        ("codes", lambda array: array[:-1], r"\[2, 3, 256\], expected \[3, 3, 256\]"),
        ("codes", lambda array: array.astype(np.float32), "is of float32, expected uint8"),
        ("scales", lambda array: array[:, :, :8], r"\[3, 3, 8\], expected \[3, 3, 16\]"),
        ("scales", lambda array: array.astype(np.float64), "expected float16 or float32"),
        ("scales", lambda array: array.view(np.uint8)[..., ::2].copy(), "is of uint8"),
        ("zeros", lambda array: array[None], r"\[1, 3, 3, 16\], expected \[3, 3, 16\]"),
        ("zeros", lambda array: array.astype(np.float32), "is of float32, expected uint8"),
        ("bias", lambda array: array[:-1], r"\[39\], expected \[40\]"),
        ("bias", lambda array: array[None], r"\[1, 40\], expected \[40\]"),
    ],
)
def test_tensors_of_another_shape_or_dtype(name, change, message):
    node = linear()
    node.initializers[name] = change(node.initializers[name])
    with pytest.raises(Exception, match=message):
        node.session()


def test_weights_that_the_graph_does_not_hold():
    node = linear()
    node.inputs[1] = "fed_codes"
    del node.initializers["codes"]
    with pytest.raises(Exception, match="codes' tensor is no initializer"):
        node.session()


def test_several_experts_without_a_router():
    node = mixture()
    node.inputs[1] = ""
    with pytest.raises(Exception, match="router's logits are missing"):
        node.session()


@pytest.mark.parametrize(
    ("make", "feeds", "message"),
    [
        (linear, {"x": (2, 95)}, r"\[2, 95\], expected 96 values"),
        (linear, {"x": ()}, r"\[\], expected 96 values"),
        (mixture, {"x": (2, 63), "router": (2, 3)}, r"\[2, 63\], expected 64 values"),
        (mixture, {"x": (2, 64), "router": (2, 4)}, r"\[2, 4\], expected 3 values"),
        (mixture, {"x": (2, 64), "router": (3, 3)}, r"\[3, 3\], expected 2 rows"),
    ],
)
def test_activations_of_another_shape(make, feeds, message):
    session = make().session()
    with pytest.raises(Exception, match=message):
        session.run(None, {name: np.ones(shape, np.float32) for name, shape in feeds.items()})


def test_an_instruction_set_that_is_unknown():
    with pytest.raises(Exception, match="MOESHIP_KERNELS_LEVEL is sse9, this CPU has plain"):
        linear().session(level="sse9")


def test_every_instruction_set_of_this_cpu_is_there():
    for level in levels_and_emulations():
        linear().session(level=level)
    assert kernels.chosen_level() == levels()[-1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="plain serves on what is no x86 CPU")
@pytest.mark.parametrize("lacks", ["avx2", "fma", "f16c"])
def test_an_x86_cpu_without_avx2_is_refused_but_for_plain(monkeypatch, lacks):
    path = emulating_library()
    monkeypatch.setenv("MOESHIP_CPU_WITHOUT", lacks)
    with pytest.raises(Exception, match=f"this CPU lacks {lacks}; .* --kernels onnxruntime, .* plain, which is slow"):
        linear().session(path=path)
    with pytest.raises(Exception, match="LEVEL is avx2, this CPU has plain;"):
        linear().session("avx2", path=path)
    linear().session("plain", path=path)
    monkeypatch.setattr(kernels, "_LIBRARY", path)
    with pytest.raises(EngineError, match=f"this CPU lacks {lacks}; set .* to plain, .* --kernels onnxruntime"):
        kernels.chosen_level()
    assert not kernels.is_usable()
    assert chosen_kernels("cpu", "int4") == "onnxruntime"
    monkeypatch.setenv(kernels.LEVEL_VARIABLE, "plain")
    assert kernels.chosen_level() == "plain"
    assert chosen_kernels("cpu", "int4") == "moeship"
