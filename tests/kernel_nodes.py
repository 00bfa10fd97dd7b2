"""Graphs of one node of our CPU kernels, and what the nodes have to give, computed with numpy."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.quantize.layout import LAYOUT, MatrixLayout
from trt_build.ort.kernels import (
    COMPILERS,
    DOMAIN,
    LEVEL_VARIABLE,
    LIBRARY_FILE,
    library,
)

LEVELS = {  # and the flags of /proc/cpuinfo that each needs
    "plain": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512bw": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512vnni": {"avx512_vnni"},
    "amx": {"amx_tile", "amx_int8"},
}
EMULATED = "emulated "  # before the name of a level: that of `emulating_library`
ROOT = Path(__file__).parents[1]


def levels():
    """Those that this CPU has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return [name for name, needed in LEVELS.items() if needed <= flags]


def levels_and_emulations():
    """Also the emulated AMX level, on a CPU with what the rest of that level is compiled for."""
    found = levels()
    if "avx512vnni" in found and any(map(shutil.which, COMPILERS)):
        found.append(f"{EMULATED}amx")
    return found


@functools.cache
def emulating_library() -> Path:
    """The library as amx_tiles.h makes it for tests: AMX's instructions are computed, and it does without what
    MOESHIP_CPU_WITHOUT names. Compiled once for the sources as they are, by whichever process comes first, with the
    compiler that CXX names if any. Skips where there is no compiler."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip(f"there is no C++ compiler: neither {' nor '.join(COMPILERS)} is on PATH")
    kernels = ROOT / "trt_build/ort/kernels"
    sources = sorted([*kernels.glob("*.cpp"), *kernels.glob("*.h"), ROOT / "setup.py"])
    flags = {name: os.environ.get(name, "") + " -DMOESHIP_EMULATED_CPU" for name in ("CFLAGS", "CXXFLAGS")}
    program = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS))
    made_by = repr(flags) + os.environ.get("CXX", "")
    digest = hashlib.sha256(made_by.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    folder = ROOT / "build/emulating" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "trt_build/ort/kernels" / LIBRARY_FILE
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            command = ["setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder / 'objects'}"]
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | flags
            # The last -O is the one that counts. No level gives other bits for it, and compiling takes a third as long.
            compiler = folder / "compiler"
            compiler.write_text(f'#!/bin/sh\nexec {program} "$@" -O1\n', encoding="utf-8")
            compiler.chmod(0o755)
            environment |= {"CC": str(compiler), "CXX": str(compiler)}
            ran = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
            )
            assert made.is_file(), ran.stderr
    return made


@dataclass
class Matrices:
    """A stack of quantised matrices [E, N, K]: codes [E, N, K], scales and zeros [E, N, P], bias [E, N] or None."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bias: np.ndarray | None
    bits: int
    block_size: int

    @property
    def layout(self):
        return MatrixLayout(
            rows=self.codes.shape[1], features=self.codes.shape[2], bits=self.bits, block_size=self.block_size
        )

    def signed(self):
        """Codes less their zero points, int64 [E, N, P * block], the padding zero."""
        zeros = np.full(self.scales.shape, 1 << (self.bits - 1), np.uint8) if self.zeros is None else self.zeros
        features = self.codes.shape[2]
        wide = np.zeros((*self.scales.shape[:2], self.scales.shape[2] * self.block_size), np.int64)
        wide[:, :, :features] = self.codes.astype(np.int64) - np.repeat(zeros, self.block_size, -1)[:, :, :features]
        return wide

    def values(self):
        """float64 [E, N, K]."""
        wide = self.signed() * np.repeat(self.scales.astype(np.float64), self.block_size, -1)
        return wide[:, :, : self.codes.shape[2]]

    def tensors(self, prefix, stacked):
        """The node's four inputs: names, empty where there is none, and initializers."""
        pick = (lambda array: array) if stacked else (lambda array: array[0])
        made = {
            f"{prefix}codes": pick(self.layout.pack_codes(self.codes, self.zeros)),
            f"{prefix}scales": pick(self.layout.pack_scales(self.scales)),
            f"{prefix}zeros": None if self.zeros is None else pick(self.layout.pack_scales(self.zeros)),
            f"{prefix}bias": None if self.bias is None else pick(self.bias),
        }
        names = [name if value is not None else "" for name, value in made.items()]
        return names, {name: value for name, value in made.items() if value is not None}


def random_matrices(draw, experts, rows, features, bits, block_size, *, zeros=False, bias=True, half=True):
    blocks = -(-features // block_size)
    scales = draw.uniform(0.2, 1.0, (experts, rows, blocks)) / (features**0.5 * 2 ** (bits - 1))
    return Matrices(
        codes=draw.integers(0, 1 << bits, (experts, rows, features), dtype=np.uint8),
        scales=scales.astype(np.float16 if half else np.float32),
        zeros=draw.integers(0, 1 << bits, (experts, rows, blocks), dtype=np.uint8) if zeros else None,
        bias=draw.normal(size=(experts, rows)).astype(np.float32) if bias else None,
        bits=bits,
        block_size=block_size,
    )


@dataclass
class Node:
    """One node as a graph: its operator, attributes, inputs in order and initializers by name."""

    operator: str
    attributes: dict
    inputs: list
    initializers: dict
    feeds: dict = field(default_factory=dict)

    def session(self, level="", threads=2, path=None):
        inputs = list(self.inputs)
        while not inputs[-1]:
            inputs.pop()
        node = helper.make_node(self.operator, inputs, ["y"], name="layer/mlp", domain=DOMAIN, **self.attributes)
        value = helper.make_tensor_value_info
        fed = [value(name, TensorProto.FLOAT, None) for name in inputs if name in ("x", "router")]
        fed += [value(name, TensorProto.INT64, None) for name in inputs if name == "ids"]
        fed += [
            value(name, TensorProto.UINT8, None) for name in inputs if name.startswith("fed_")
        ]  # weights that are no initializers
        initializers = [numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = helper.make_graph([node], "one_node", fed, [value("y", TensorProto.FLOAT, None)], initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Every tensor is an allocation of its own, past whose end the sanitizers and valgrind see a read.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if level.startswith(EMULATED):
            path, level = emulating_library(), level.removeprefix(EMULATED)
        options.register_custom_ops_library(str(path or library()))
        with mock.patch.dict(os.environ, {LEVEL_VARIABLE: level}):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, feeds, level="", threads=2):
        return self.session(level, threads).run(None, feeds)[0]

    def run_everywhere(self, feeds):
        """The result, which every instruction set gives bit by bit; NaN is NaN, whatever its payload."""
        found = {level: self.run(feeds, level) for level in levels_and_emulations()}
        first = found["plain"]
        for level, other in found.items():
            numbers = ~np.isnan(first)
            np.testing.assert_array_equal(np.isnan(other), np.isnan(first), err_msg=level)
            np.testing.assert_array_equal(other[numbers].view(np.uint32), first[numbers].view(np.uint32), err_msg=level)
        return first


def block_linear(matrices, activations="int8"):
    names, initializers = matrices.tensors("", stacked=False)
    attributes = {
        "layout": LAYOUT, "bits": matrices.bits, "block_size": matrices.block_size, "activations": activations,
        "in_features": matrices.codes.shape[2], "out_features": matrices.codes.shape[1],
    }  # fmt: skip
    return Node(operator="BlockLinear", attributes=attributes, inputs=["x", *names], initializers=initializers)


def experts(first, second, k, activation="gelu", activations="int8", alpha=1.0, beta=0.0, limit=np.inf, router=True):
    names1, initializers1 = first.tensors("fc1_", stacked=True)
    names2, initializers2 = second.tensors("fc2_", stacked=True)
    attributes = {
        "layout": LAYOUT, "bits": first.bits, "block_size": first.block_size, "second_bits": second.bits,
        "second_block_size": second.block_size, "activations": activations, "hidden_size": first.codes.shape[2],
        "expert_size": second.codes.shape[2], "experts": first.codes.shape[0], "k": k, "activation": activation,
        "activation_alpha": alpha, "activation_beta": beta, "activation_limit": float(limit),
    }  # fmt: skip
    return Node(
        operator="Experts", attributes=attributes, inputs=["x", "router" if router else "", *names1, *names2],
        initializers=initializers1 | initializers2,
    )  # fmt: skip


def embedding(matrices):
    names, initializers = matrices.tensors("", stacked=False)
    attributes = {
        "layout": LAYOUT, "bits": matrices.bits, "block_size": matrices.block_size,
        "features": matrices.codes.shape[2], "rows": matrices.codes.shape[1],
    }  # fmt: skip
    return Node(operator="Embedding", attributes=attributes, inputs=["ids", *names[:3]], initializers=initializers)


def rounded(x, block_size):
    """Activations [T, K] as the int8 path takes them: codes int64 [T, P, block] and scales float32 [T, P]."""
    tokens, features = x.shape
    blocks = -(-features // block_size)
    wide = np.zeros((tokens, blocks * block_size), np.float32)
    wide[:, :features] = x
    wide = wide.reshape(tokens, blocks, block_size)
    scales = np.abs(wide).max(-1) / np.float32(127)
    codes = np.rint(np.divide(wide, scales[..., None], out=np.zeros_like(wide), where=scales[..., None] > 0))
    return codes.astype(np.int64), scales


def product_int8(x, matrices, expert=0):
    """[T, K] to [T, N] with activations rounded to int8, the sum over blocks in float64."""
    codes, scales = rounded(x, matrices.block_size)
    weights = matrices.signed()[expert].reshape(-1, codes.shape[1], matrices.block_size)
    sums = np.einsum("tpb,npb->tnp", codes, weights)
    pairs = matrices.scales[expert].astype(np.float32)[None] * scales[:, None]
    y = (sums * pairs.astype(np.float64)).sum(-1)
    return y if matrices.bias is None else y + matrices.bias[expert]


def product_float(x, matrices, expert=0):
    y = x.astype(np.float64) @ matrices.values()[expert].T
    return y if matrices.bias is None else y + matrices.bias[expert]


def activate(y, activation, alpha=1.0, beta=0.0, limit=np.inf):
    """float64, from torch's definitions and gpt-oss' clamped SwiGLU."""
    with np.errstate(over="ignore"):
        if activation == "gelu":
            return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        if activation == "silu":
            return y / (1 + np.exp(-y))
        gate, up = np.minimum(y[:, 0::2], limit), np.clip(y[:, 1::2], -limit, limit)
        return gate / (1 + np.exp(-alpha * gate)) * (up + beta)


def route(logits, k):
    """Experts [T, k] of the largest logits, the lowest index first among equals, and the softmax over them."""
    chosen = np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[:, :k]
    picked = np.take_along_axis(logits.astype(np.float64), chosen, -1)
    powers = np.exp(picked - picked[:, :1])
    return chosen, powers / powers.sum(-1, keepdims=True)


def mixture(x, logits, first, second, k, product, activation="gelu", **activation_numbers):
    """[T, H] in float64, what is between the two products rounded to float32."""
    chosen, weights = route(logits, k)
    y = np.zeros((len(x), second.codes.shape[1]))
    for t in range(len(x)):
        for expert, weight in zip(chosen[t], weights[t], strict=True):
            inner = activate(product(x[t : t + 1], first, expert), activation, **activation_numbers)
            y[t] += weight * product(inner.astype(np.float32), second, expert)[0]
    return y
