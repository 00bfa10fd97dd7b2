"""Attention over keys and values in int8, by every instruction set, against numpy in float64.

Steps are ragged: sequences at different places take different numbers of tokens, or none. What is stored is compared
with the rule of attention.cpp, and what is attended to with attention over what is stored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import onnxruntime
import pytest
from kernel_nodes import EMULATED, emulating_library, levels_and_emulations
from onnx import TensorProto, helper, numpy_helper

from trt_build.ort.kernels import DOMAIN, LEVEL_VARIABLE, library

pytestmark = pytest.mark.needs_kernels
GRID_BYTES = 4
POSITIONS = 300
STEPS = ([5, 1, 70], [1, 0, 1], [130, 67, 1], [1, 1, 1], [64, 0, 3], [3, 0, 0], [4, 9, 1], [1, 1, 1])


@dataclass(frozen=True, kw_only=True)
class Shape:
    heads: int
    groups: int
    size: int
    turned: int
    window: int = 0
    packed: bool = False
    sinks: bool = False


SHAPES = [
    Shape(heads=3, groups=3, size=80, turned=32, packed=True),
    Shape(heads=4, groups=2, size=64, turned=64, window=100),
    Shape(heads=10, groups=2, size=16, turned=16, window=1),
    Shape(heads=6, groups=1, size=48, turned=0, sinks=True),
    Shape(heads=8, groups=2, size=64, turned=64, window=20, sinks=True),  # a gpt_oss's
    Shape(heads=1, groups=1, size=256, turned=128, packed=True, window=65),
]


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def stored(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [..., D], scales and middles [..., 1] of float32 x [..., D]."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle = bfloat16(low * np.float32(0.5) + high * np.float32(0.5))
    reach = np.maximum(high - middle, middle - low) / np.float32(127)
    scale = ((reach.view(np.uint32) + 0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)
    codes = np.divide(x - middle, scale, out=np.zeros_like(x), where=scale > 0)
    return np.clip(np.rint(codes), -127, 127), scale, middle


@dataclass
class Attention:
    """The node of a shape as a model of its own, with the caches that it runs over in place."""

    shape: Shape
    level: str = ""
    threads: int = 1
    slots: int = 3
    in_place: bool = True
    attributes: dict = field(default_factory=dict)
    lengths: list = field(default_factory=list)

    def __post_init__(self):
        shape, draw = self.shape, np.random.default_rng(5)
        angles = draw.uniform(-4, 4, (POSITIONS, shape.turned // 2))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.sinks = draw.normal(size=shape.heads).astype(np.float32) if shape.sinks else None
        self.lengths = self.lengths or [0] * self.slots
        # What no token was written to: NaN, were it read as a scale.
        self.caches = [
            np.full((self.slots, shape.groups, POSITIONS, shape.size + GRID_BYTES), -1, np.int8) for _ in range(2)
        ]
        path, level = library(), self.level
        if level.startswith(EMULATED):
            path, level = emulating_library(), level.removeprefix(EMULATED)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.register_custom_ops_library(str(path))
        with mock.patch.dict(os.environ, {LEVEL_VARIABLE: level}):
            self.session = onnxruntime.InferenceSession(
                self.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

    def model(self):
        shape, value, real = self.shape, helper.make_tensor_value_info, TensorProto.FLOAT
        fed = ["query", *([] if shape.packed else ["key", "value"])]
        inputs = ["query", *(["", ""] if shape.packed else ["key", "value"]), "keys", "values", "last", "new"]
        constants = {"cos": self.cos, "sin": self.sin} | ({} if self.sinks is None else {"sinks": self.sinks})
        attributes = {
            "layout": 1, "num_heads": shape.heads, "kv_num_heads": shape.groups, "head_size": shape.size,
            "rotary_dim": shape.turned, "positions": POSITIONS, "scale": shape.size**-0.5, "window": shape.window,
        } | self.attributes  # fmt: skip
        outputs = ["attended", "new_keys", "new_values"]
        node = helper.make_node("Attention", [*inputs, *constants], outputs, domain=DOMAIN, name="a", **attributes)
        graph = helper.make_graph(
            [node],
            "one_node",
            [value(name, real, None) for name in fed]
            + [value(name, TensorProto.INT8, None) for name in ("keys", "values")]
            + [value(name, TensorProto.INT32, None) for name in ("last", "new")],
            [value("attended", real, None)] + [value(name, TensorProto.INT8, None) for name in outputs[1:]],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def feeds(self, parts, counts):
        parts = {"query": np.concatenate(list(parts.values()), axis=-1)} if self.shape.packed else parts
        new = np.array(counts, np.int32)
        return {**parts, "last": np.array(self.lengths, np.int32) + new - 1, "new": new}

    def step(self, parts, counts):
        """Run a step of `counts` tokens; the caches change."""
        feeds = self.feeds(parts, counts)
        if not self.in_place:
            feeds |= dict(zip(("keys", "values"), (cache.copy() for cache in self.caches), strict=True))
            out, *self.caches = self.session.run(None, feeds)
        else:
            binding = self.session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, cache in zip(("keys", "values"), self.caches, strict=True):
                binding.bind_input(name, "cpu", 0, np.int8, cache.shape, cache.ctypes.data)
                binding.bind_output(f"new_{name}", "cpu", 0, np.int8, cache.shape, cache.ctypes.data)
            out = np.full((self.slots, max(counts), self.shape.heads * self.shape.size), np.nan, np.float32)
            binding.bind_output("attended", "cpu", 0, np.float32, out.shape, out.ctypes.data)
            self.session.run_with_iobinding(binding)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return out

    def held(self):
        """The stored keys and values [2, slots, G, P, D] in float64, their codes, and scales and middles [..., 2]."""
        codes = np.stack([cache[..., : self.shape.size] for cache in self.caches])
        grids = np.stack([cache[..., self.shape.size :] for cache in self.caches])
        grids = (np.ascontiguousarray(grids).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return codes * grids[..., :1].astype(np.float64) + grids[..., 1:], codes, grids


def random_parts(draw, shape, counts):
    heads = (shape.heads, shape.groups, shape.groups)
    return {
        name: (draw.normal(size=(len(counts), max(counts), n * shape.size)) + draw.normal()).astype(np.float32)
        for name, n in zip(("query", "key", "value"), heads, strict=True)
    }


class ByHand:
    """What a step stores, and what attention over the stored keys and values gives, in float64."""

    def __init__(self, of):
        self.of = of
        self.codes = np.zeros((2, of.slots, of.shape.groups, POSITIONS, of.shape.size))

    def turned(self, x, position):
        half, cos, sin, y = self.of.shape.turned // 2, self.of.cos[position], self.of.sin[position], x.copy()
        y[:, :half] = x[:, :half] * cos - x[:, half : 2 * half] * sin
        y[:, half : 2 * half] = x[:, half : 2 * half] * cos + x[:, :half] * sin
        return y

    def attended(self, parts, counts, lengths):
        """The outputs of a step after which the slots hold `lengths` positions."""
        shape, (held, codes, grids) = self.of.shape, self.of.held()
        out = np.full((len(counts), max(counts), shape.heads * shape.size), np.nan)
        for slot, token in [(slot, token) for slot, count in enumerate(counts) for token in range(count)]:
            query, key, value = (part[slot, token].reshape(-1, shape.size) for part in parts.values())
            position = lengths[slot] - counts[slot] + token
            for kind, x in enumerate((self.turned(key, position), value)):
                expected, scale, middle = stored(x)
                np.testing.assert_array_equal(grids[kind, slot, :, position], np.concatenate([scale, middle], -1))
                self.codes[kind, slot, :, position] = expected
            first = max(0, position + 1 - shape.window) if shape.window else 0
            for head, vector in enumerate(self.turned(query, position)):
                keys, values = held[:, slot, head // (shape.heads // shape.groups), first : position + 1]
                scores = keys @ vector.astype(np.float64) * shape.size**-0.5
                weights = np.exp(scores - scores.max())
                total = weights.sum()
                if self.of.sinks is not None:
                    total += np.exp(self.of.sinks[head] - scores.max())
                out[slot, token, head * shape.size : (head + 1) * shape.size] = weights / total @ values
        return out, np.abs(codes - self.codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_steps_are_those_of_numpy_and_the_same_bits_on_every_level(shape):
    by_level = {level: Attention(shape, level) for level in levels_and_emulations()}
    plain, draw, by_hand = by_level["plain"], np.random.default_rng(11), ByHand(by_level["plain"])
    for counts in STEPS:
        parts = random_parts(draw, shape, counts)
        outs = {level: one.step(parts, counts) for level, one in by_level.items()}
        expected, off = by_hand.attended(parts, counts, plain.lengths)
        for slot, count in enumerate(counts):
            np.testing.assert_allclose(outs["plain"][slot, :count], expected[slot, :count], atol=1e-5, rtol=1e-4)
            for level, out in outs.items():
                first = outs["plain"][slot, :count]
                np.testing.assert_array_equal(out[slot, :count].view(np.uint32), first.view(np.uint32), err_msg=level)
                assert np.isnan(out[slot, count:]).all(), "what is no token was written"
    written = np.concatenate([off[:, slot, :, :length].ravel() for slot, length in enumerate(plain.lengths)])
    assert written.max() <= 1  # a value halfway between two codes, whose last bit is another one
    assert written.mean() < 1e-4
    for slot, length in enumerate(plain.lengths):
        assert all((cache[slot, :, length:] == -1).all() for cache in plain.caches), "what is no token's was written"
    for level, one in by_level.items():
        for cache, first in zip(one.caches, plain.caches, strict=True):
            np.testing.assert_array_equal(cache, first, err_msg=level)


def test_a_token_gets_the_same_bits_in_any_step_by_any_threads_and_with_caches_that_are_copied():
    shape = SHAPES[1]
    parts = random_parts(np.random.default_rng(3), shape, [150, 150, 150])
    whole = Attention(shape).step(parts, [150, 0, 0])[0]
    for threads, in_place in ((1, True), (3, True), (1, False)):
        one, outs = Attention(shape, threads=threads, in_place=in_place), []
        for start, stop in ((0, 1), (1, 64), (64, 129), (129, 130), (130, 150)):
            some = {name: part[:, start:stop] for name, part in parts.items()}
            outs.append(one.step(some, [stop - start, stop - start, 1])[0, : stop - start])
        np.testing.assert_array_equal(np.concatenate(outs).view(np.uint32), whole.view(np.uint32))


def test_a_constant_head_and_extreme_ones_are_stored_within_their_step():
    shape = Shape(heads=1, groups=1, size=16, turned=0)
    for value in (0.0, -3.0, 1e-38, 1e-42, 3e38):
        one = Attention(shape, slots=1)
        parts = {name: np.full((1, 1, 16), value, np.float32) for name in ("query", "key", "value")}
        parts["query"][:] = 0
        parts["value"][0, 0, ::2] /= 2
        out = one.step(parts, [1])
        np.testing.assert_allclose(out, parts["value"], rtol=1e-2, atol=1e-40)


@pytest.mark.parametrize("level", levels_and_emulations())
def test_what_is_not_finite_shows_in_the_tokens_that_attend_to_it_and_in_no_others(level):
    shape = Shape(heads=2, groups=2, size=32, turned=0)
    parts = random_parts(np.random.default_rng(4), shape, [9, 9])
    expected = Attention(shape, level, slots=2).step(parts, [9, 9])
    for name, bad in (("key", np.nan), ("value", np.inf), ("value", -np.inf), ("key", np.inf)):
        changed = {part: array.copy() for part, array in parts.items()}
        changed[name][0, 5, 7] = bad  # of the first head
        out = Attention(shape, level, slots=2).step(changed, [9, 9])
        assert np.isnan(out[0, 5:, :32]).all()
        out[0, 5:, :32] = expected[0, 5:, :32]
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layout", 2, "found layout 2, expected 1"),
        ("head_size", 512, "found head_size 512, expected 16 to 256"),
        ("head_size", 72, "head_size is no multiple of 16"),
        ("kv_num_heads", 3, "num_heads is no multiple of kv_num_heads"),
        ("rotary_dim", 32, r"cosines' tensor has the shape \[300, 32\], expected \[300, 16\]"),
        ("positions", 299, "cosines' tensor has the shape"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(name, value, message):
    with pytest.raises(Exception, match=f"loading Attention a: .*{message}"):
        Attention(SHAPES[1], attributes={name: value})


@pytest.mark.parametrize(
    ("lengths", "counts", "message"),
    [
        ([0, 0, 0], [1, 3, 1], "sequence 1 of Attention takes 3 tokens, expected 0 to 2"),
        ([0, 0, 0], [1, -1, 1], "sequence 1 of Attention takes -1 tokens, expected 0 to 2"),
        ([0, 0, 299], [1, 1, 2], "sequence 2 of Attention takes 2 tokens up to position 300, expected .* 0 to 299"),
        ([-2, 0, 0], [1, 1, 1], "sequence 0 of Attention takes 1 tokens up to position -2"),
    ],
)
def test_places_that_the_cache_does_not_have_are_refused_and_nothing_is_written(lengths, counts, message):
    one = Attention(SHAPES[1], lengths=lengths)
    parts = random_parts(np.random.default_rng(0), SHAPES[1], [2, 2, 2])
    with pytest.raises(Exception, match=message):
        one.step(parts, counts)
    assert all((cache == -1).all() for cache in one.caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda feeds: {"query": feeds["query"][..., 1:]}, r"query of Attention has the shape \[3, 2, 255\]"),
        (lambda feeds: {"value": feeds["value"][:, 1:]}, r"key or value of Attention has the shape \[3, 1, 128\]"),
        (lambda feeds: {"keys": feeds["keys"][..., 4:]}, r"stored keys of Attention has the shape \[3, 2, 300, 64\]"),
        (lambda feeds: {"values": feeds["values"][:, :, 1:]}, "stored values of Attention has the shape"),
        (lambda feeds: {"new": feeds["new"][1:]}, "new lengths of Attention has the shape"),
    ],
)
def test_inputs_of_other_shapes_are_refused(change, message):
    one = Attention(SHAPES[1])
    feeds = one.feeds(random_parts(np.random.default_rng(0), SHAPES[1], [2, 2, 2]), [1, 2, 0])
    feeds |= dict(zip(("keys", "values"), one.caches, strict=True))
    assert one.session.run(None, feeds)[0].shape == (3, 2, 256)
    with pytest.raises(Exception, match=message):
        one.session.run(None, feeds | change(feeds))
