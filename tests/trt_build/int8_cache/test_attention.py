"""The attention node of a graph with int8 caches, in ONNX Runtime, against the same computed by numpy.

Steps are ragged: sequences at different places take different numbers of tokens, or none. The heads, sizes and windows
are those of the families: all heads alike with a partial rotary embedding, grouped heads with a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import write_phi_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint.folder import open_checkpoint
from export.exporter import INT8_CACHE_GRAPH, plan_export
from export.families import read_model
from export.onnx_graph import names
from export.onnx_graph.kv_scales import key_scale, value_scale
from export.provider import PROVIDERS
from export.quantize.presets import recipe_for

POSITIONS = 480
STEPS = ([5, 1, 128], [1, 0, 1], [128, 128, 1], [1, 1, 1], [128, 0, 64], [3, 0, 0], [4, 1, 1], [1, 1, 1])
SLOTS = len(STEPS[0])


@dataclass
class Attention:
    """The node of one layer, as a model of its own with given scales, and the caches [slots, G, C, D] that it runs
    over in place."""

    node: onnx.NodeProto
    cos: np.ndarray
    sin: np.ndarray
    key_scales: np.ndarray  # [G, D]
    value_scales: np.ndarray
    threads: int
    lengths: list[int] = field(default_factory=lambda: [0] * SLOTS)

    def __post_init__(self) -> None:
        given = {entry.name: helper.get_attribute_value(entry) for entry in self.node.attribute}
        self.heads, self.groups = given["num_heads"], given["kv_num_heads"]
        self.scale, self.window = given["scale"], given["local_window_size"]
        self.size = self.key_scales.shape[1]
        self.keys, self.values = (np.zeros((SLOTS, self.groups, POSITIONS, self.size), np.int8) for _ in range(2))
        self.session = self._session()

    def _session(self) -> onnxruntime.InferenceSession:
        node = onnx.NodeProto()
        node.CopyFrom(self.node)
        places = {0: "query", 1: "key", 2: "value", 3: "keys", 4: "values", 12: "key_scales", 13: "value_scales"}
        for place, name in places.items():
            if node.input[place]:
                node.input[place] = name
        node.output[:] = ["attended", "new_keys", "new_values"]
        cache = ["slots", self.groups, "positions", self.size]
        value, real = helper.make_tensor_value_info, TensorProto.FLOAT
        widths = {"query": (self.heads + (0 if node.input[1] else 2 * self.groups)) * self.size}
        widths |= dict.fromkeys((name for name in ("key", "value") if node.input[1]), self.groups * self.size)
        inputs = [value(name, real, ["slots", "tokens", width]) for name, width in widths.items()]
        inputs += [value(name, TensorProto.INT8, cache) for name in ("keys", "values")]
        inputs += [
            value(names.LAST_POSITIONS, TensorProto.INT32, ["slots"]),
            value(names.TOTAL_LENGTH, TensorProto.INT32, []),
        ]
        inputs.append(value(names.NEW_LENGTHS, TensorProto.INT32, ["slots"]))
        outputs = [value("attended", real, ["slots", "tokens", self.heads * self.size])]
        outputs += [value(name, TensorProto.INT8, cache) for name in ("new_keys", "new_values")]
        constants = {
            "rotary/cos_cache": self.cos, "rotary/sin_cache": self.sin,
            "key_scales": self.key_scales.reshape(-1), "value_scales": self.value_scales.reshape(-1),
        }  # fmt: skip
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph([node], "attention", inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", names.OPSET), helper.make_opsetid(names.MICROSOFT_DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def step(self, parts: dict[str, np.ndarray], counts: list[int]) -> np.ndarray:
        """Run a step of `counts` tokens; the caches change in place."""
        new = np.array(counts, np.int32)
        last = np.maximum(np.array(self.lengths, np.int32) + new - 1, 0)
        given: dict[str, Any] = {
            names.LAST_POSITIONS: last, names.TOTAL_LENGTH: np.array(last.max() + 1, np.int32), names.NEW_LENGTHS: new,
            **(parts if self.node.input[1] else {"query": np.concatenate(list(parts.values()), axis=-1)}),
        }  # fmt: skip
        binding = self.session.io_binding()
        for name, array in given.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for past, present, array in (("keys", "new_keys", self.keys), ("values", "new_values", self.values)):
            binding.bind_input(past, "cpu", 0, np.int8, array.shape, array.ctypes.data)
            binding.bind_output(present, "cpu", 0, np.int8, array.shape, array.ctypes.data)
        out = np.full((SLOTS, max(counts), self.heads * self.size), np.nan, np.float32)
        binding.bind_output("attended", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        self.session.run_with_iobinding(binding)
        self.lengths = (np.array(self.lengths) + new).tolist()
        return out


class ByHand:
    """The same by numpy: codes are round-half-even of value / scale, from -128 to 127; sums in float64."""

    def __init__(self, of: Attention) -> None:
        self.of, self.lengths = of, [0] * SLOTS
        self.keys, self.values = (np.zeros((SLOTS, of.groups, POSITIONS, of.size)) for _ in range(2))

    def _turned(self, x: np.ndarray, position: int) -> np.ndarray:
        half = self.of.cos.shape[1]
        cos, sin, turned = self.of.cos[position], self.of.sin[position], x.copy()
        turned[:, :half] = x[:, :half] * cos - x[:, half : 2 * half] * sin
        turned[:, half : 2 * half] = x[:, half : 2 * half] * cos + x[:, :half] * sin
        return turned

    def step(self, parts: dict[str, np.ndarray], counts: list[int]) -> np.ndarray:
        of = self.of
        out = np.full((SLOTS, max(counts), of.heads * of.size), np.nan)
        for slot, count in enumerate(counts):
            for token in range(count):
                query, key, value = (part[slot, token].reshape(-1, of.size) for part in parts.values())
                end = self.lengths[slot]
                for store, new, scales in (
                    (self.keys, self._turned(key, end), of.key_scales),
                    (self.values, value, of.value_scales),
                ):
                    store[slot, :, end] = np.clip(np.rint(new / scales), -128, 127)
                self.lengths[slot] = end + 1
                first = max(0, end + 1 - of.window) if of.window > 0 else 0
                for head, vector in enumerate(self._turned(query, end)):
                    group = head // (of.heads // of.groups)
                    keys = self.keys[slot, group, first : end + 1] * of.key_scales[group]
                    scores = keys @ vector.astype(np.float64) * of.scale
                    weights = np.exp(scores - scores.max())
                    values = self.values[slot, group, first : end + 1] * of.value_scales[group]
                    own = slice(head * of.size, (head + 1) * of.size)
                    out[slot, token, own] = weights / weights.sum() @ values
        return out


def phi(folder: Path, head_size: int) -> Path:
    return write_phi_checkpoint(
        folder, seed=1, hidden_size=2 * head_size, num_heads=2, ffn_size=64, num_layers=1, rotary_dim=32,
        max_positions=POSITIONS, vocab_size=352,
    )  # fmt: skip


def mixtral(folder: Path, head_size: int) -> Path:
    return write_mixtral_checkpoint(
        folder, seed=1, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=head_size, num_layers=1,
        config={"max_position_embeddings": POSITIONS, "sliding_window": 100},
    )  # fmt: skip


def attention(checkpoint: Path, threads: int) -> Attention:
    """The node of the planned graph with random scales, some of which cut values off."""
    model = read_model(open_checkpoint(str(checkpoint)))
    graph = plan_export(model, recipe_for("fp32", PROVIDERS["cpu"]), int8_cache=True).graphs[INT8_CACHE_GRAPH].graph
    node = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    assert list(node.input[12:14]) == [key_scale(0), value_scale(0)]
    tables = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if "rotary/" in tensor.name}
    facts, rng = model.architecture, np.random.default_rng(3)
    scales = rng.uniform(1.0, 5.0, (2, facts.num_kv_heads, facts.head_size)).astype(np.float32) / 127
    return Attention(node, tables["rotary/cos_cache"], tables["rotary/sin_cache"], *scales, threads)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("write", [phi, mixtral])
@pytest.mark.parametrize("head_size", [80, 64, 128])
def test_ragged_steps_over_codes_are_those_of_numpy(tmp_path, write, head_size, threads):
    (tmp_path / "checkpoint").mkdir()
    node = attention(write(tmp_path / "checkpoint", head_size), threads)
    by_hand, rng = ByHand(node), np.random.default_rng(11)
    for counts in STEPS:
        widths = (node.heads, node.groups, node.groups)
        parts = {name: rng.standard_normal((SLOTS, max(counts), heads * node.size)).astype(np.float32)
                 for name, heads in zip(("query", "key", "value"), widths, strict=True)}  # fmt: skip
        found, expected = node.step(parts, counts), by_hand.step(parts, counts)
        for slot, count in enumerate(counts):
            assert np.abs(found[slot, :count] - expected[slot, :count]).max(initial=0) < 5e-3
    for found, expected in ((node.keys, by_hand.keys), (node.values, by_hand.values)):
        off = np.abs(found.astype(int) - expected)
        assert off.max() <= 1  # a value halfway between two codes, whose last bit is another one
        assert (off > 0).mean() < 1e-4
        assert (np.abs(found) >= 127).mean() > 1e-3  # some values were cut off
