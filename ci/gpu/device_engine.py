"""Runs an engine folder on a GPU machine without moeship: reads its facts, loads its graphs on a device, and decodes.

Needs only onnxruntime-gpu and numpy, so it is enough to copy the folder ci/gpu and an engine to such a machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnxruntime

SERVING_GRAPH, SCORING_GRAPH, GOLDEN_FILE = "model.onnx", "model_scoring.onnx", "golden.npz"
PROVIDERS = {"cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}), "cpu": ("CPUExecutionProvider", {})}
SHAPE_OPERATORS = {"Cast", "Gather", "Shape"}  # operators that ONNX Runtime places on the CPU for every provider
CACHE_ITEM_BYTES = 2  # float16


class UsageError(Exception):
    """Wrong input or a missing device; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The values of engine.json that the scripts of this folder use."""

    folder: Path
    model: str
    precision: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    num_experts: int
    experts_per_token: int
    max_sequence: int
    expert_order: tuple[int, ...]

    @property
    def cache_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * CACHE_ITEM_BYTES


def read_facts(folder: Path, golden: bool = True) -> Facts:
    """Read engine.json of a folder. Raises UsageError if the folder is no CUDA engine, or if `golden` is set and it has
    no golden logits."""
    try:
        manifest = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
        facts = manifest["architecture"]
        if manifest["provider"] != "cuda":
            raise UsageError(f"reading {folder}: built for {manifest['provider']}; build it with --provider cuda")
        for name in (SERVING_GRAPH, SCORING_GRAPH, *([GOLDEN_FILE] if golden else [])):
            if not (folder / name).is_file():
                raise UsageError(f"reading {folder}: no {name} there; golden.npz is made by ci/gpu/write_golden.py")
        return Facts(
            folder=folder, model=manifest["model"], precision=manifest["precision"]["name"],
            num_layers=facts["num_layers"], num_kv_heads=facts["num_kv_heads"], head_size=facts["head_size"],
            vocab_size=facts["vocab_size"], num_experts=facts["num_experts"],
            experts_per_token=facts["experts_per_token"], max_sequence=manifest["max_sequence"],
            expert_order=tuple(manifest["expert_order"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"reading {folder}: no engine there ({type(error).__name__}: {error})") from error


def open_graph(path: Path | bytes, provider: str) -> onnxruntime.InferenceSession:
    """Load a graph with all its nodes on the provider. Raises UsageError if nodes would run elsewhere."""
    import onnxruntime

    name, settings = PROVIDERS[provider]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            path if isinstance(path, bytes) else str(path), options, providers=[(name, settings)], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise UsageError(f"loading {path!r}: ONNX Runtime {onnxruntime.__version__} refuses it ({error})") from error
    strangers = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
    } - SHAPE_OPERATORS
    if strangers:
        raise UsageError(f"loading {path!r}: {name} did not take {', '.join(sorted(strangers))}")
    return session


def check_device(provider: str) -> None:
    """Check that the provider has a device. Raises UsageError with ONNX Runtime's reason if it has none."""
    import onnxruntime

    if PROVIDERS[provider][0] not in onnxruntime.get_available_providers():
        have = ", ".join(onnxruntime.get_available_providers())
        raise UsageError(
            f"looking for the GPU: ONNX Runtime {onnxruntime.__version__} has {have}; "
            "run: pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.*'"
        )
    if provider == "cuda":
        onnxruntime.preload_dlls()
    try:
        on_device(np.zeros(1, np.float16), provider)
    except Exception as error:
        raise UsageError(f"looking for the GPU: ONNX Runtime cannot use it ({str(error).strip()})") from error


def on_device(values: npt.NDArray[Any], provider: str) -> onnxruntime.OrtValue:
    """Copy values to a buffer on the provider's first device."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(values, provider, 0)


class Decoder:
    """Runs the serving graph with cache buffers for `batch` sequences of equal length, up to `capacity` tokens each."""

    def __init__(
        self, session: onnxruntime.InferenceSession, facts: Facts, provider: str, batch: int, capacity: int
    ) -> None:
        self._session, self._provider, self._batch = session, provider, batch
        self._binding = session.io_binding()
        self._buffers = []
        shape = (batch, facts.num_kv_heads, capacity, facts.head_size)
        for layer in range(facts.num_layers):
            for kind in ("key", "value"):
                buffer = on_device(np.zeros(shape, np.float16), provider)
                self._buffers.append(buffer)
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", buffer)
                self._binding.bind_ortvalue_output(f"present.{layer}.{kind}", buffer)
        self._mask = on_device(np.ones((batch, capacity), np.int64), provider)
        self.logits = on_device(np.zeros((batch, 1, facts.vocab_size), np.float32), provider)
        self._binding.bind_ortvalue_output("logits", self.logits)
        self.length = 0

    def run(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Append tokens [batch, S]. Returns when the device has finished; `logits` then has those of the last
        position."""
        ids = np.ascontiguousarray(token_ids, dtype=np.int64)
        total = self.length + ids.shape[1]
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_input(
            "attention_mask", self._provider, 0, np.int64, (self._batch, total), self._mask.data_ptr()
        )
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        self.length = total
