"""The contenders: each wraps a runtime with the same calls, which load a model, start a sequence, and run tokens.

This module is imported in the process of one contender, and imports a runtime's library when that contender is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from decode.libraries import LOG, ik_llama_cpp, llama_cpp, log_tail
from export.architecture import Architecture
from export.errors import ConfigError

POOL_WEIGHTS = 1 << 24
UBATCH_TOKENS = 512  # llama.cpp's default; a prompt of the benchmark fits one


@dataclass(frozen=True, kw_only=True)
class Task:
    """The model that a contender loads. `settings` are settings of the runtime: one of the choices in CHOICES."""

    contender: str
    source: Path | None  # an engine or a GGUF file; None if the weights are random
    model: Architecture
    positions: int
    threads: int
    settings: Mapping[str, Any]


class Contender(Protocol):
    def forget(self) -> None:
        """Start a new sequence."""

    def run(self, tokens: Sequence[int]) -> int:
        """Append tokens and return the most likely next id."""

    def facts(self) -> dict[str, Any]:
        """What the runtime reports about itself: versions, kernels, buffers."""


# Settings to try for each runtime; the fastest is used. The first is the runtime's default.
CHOICES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "ours": [{}],
    "llama": [{"flash_attention": True}, {"flash_attention": False}],
    "ik": [
        {"flash_attention": flash_attention, "repack": repack}
        for repack in (False, True)
        for flash_attention in (True, False)
    ],
    "transformers": [{"experts": "grouped_mm"}, {"experts": "eager"}],
}


def load(task: Task) -> Contender:
    """Load the contender of a name such as ours, llama-q4_0, ik-q4_0 or transformers-bf16."""
    runtime = task.contender.partition("-")[0]
    return {"ours": Ours, "llama": Llama, "ik": IkLlama, "transformers": Transformers}[runtime](task)


class Ours:
    """A moeship engine, run by the session that also serves it."""

    def __init__(self, task: Task) -> None:
        from trt_build.ort.engine import open_engine
        from trt_build.ort.session import Session

        assert task.source is not None
        self._session = Session(open_engine(task.source, check_digests=False), task.threads)
        if self._session.max_sequence < task.positions:
            raise ConfigError(
                f"benchmarking {task.source}: its context is {self._session.max_sequence} tokens, the benchmark runs "
                f"to {task.positions}; build it with a larger --max-sequence"
            )
        self._cache = self._session.new_cache()

    def forget(self) -> None:
        self._cache.shorten(0, 0)

    def run(self, tokens: Sequence[int]) -> int:
        return int(self._session.run(self._cache, tokens).argmax())

    def facts(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "version": f"ONNX Runtime {onnxruntime.__version__}",
            "precision": asdict(self._session.engine.manifest.precision),
        }


class Llama:
    """A GGUF file, run through llama.cpp's C interface: mapped, repacked for the kernels that need it, no sampler."""

    runtime = "llama.cpp"

    def __init__(self, task: Task) -> None:
        self._library = library = self._load()
        self._length = 0
        self._vocab_size = task.model.vocab_size
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        self._set_model(parameters, task.settings)
        self._model = library.llama_model_load_from_file(bytes(task.source or ""), parameters)
        if not self._model:
            raise ConfigError(f"loading {task.source}: {self.runtime} refuses it: {log_tail()}")
        parameters = library.llama_context_default_params()
        parameters.n_ctx = task.positions
        parameters.n_batch = parameters.n_ubatch = UBATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = task.threads
        if "cache_type" in task.settings:
            parameters.type_k = parameters.type_v = task.settings["cache_type"]
        self._set_context(parameters, task.settings)
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ConfigError(f"loading {task.source}: {self.runtime} makes no context: {log_tail()}")

    def forget(self) -> None:
        self._length = 0
        self._clear()

    def run(self, tokens: Sequence[int]) -> int:
        return int(self.logits(tokens).argmax())

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 [V] of the last position, valid until the next call."""
        library = self._library
        for start in range(0, len(tokens), UBATCH_TOKENS):
            part = tokens[start : start + UBATCH_TOKENS]
            ids = (library.llama_token * len(part))(*part)
            status = library.llama_decode(self._context, self._batch(ids))
            if status:
                raise AssertionError(f"llama_decode ended with status {status}")
            self._length += len(part)
        pointer = library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))

    def facts(self) -> dict[str, Any]:
        lines = [line.strip() for line in "".join(LOG).splitlines()]
        return {
            "version": self._version(),
            "system_info": self._system_info().strip(" |"),
            "buffers": [line for line in lines if "buffer size" in line],
        }

    def _load(self) -> Any:  # noqa: ANN401 - an untyped package
        return llama_cpp()

    def _set_model(self, parameters: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401 - a ctypes struct
        """Keep the defaults: weights are mapped, and repacked if there are kernels for the packed layout."""

    def _set_context(self, parameters: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401 - a ctypes struct
        parameters.flash_attn_type = int(settings["flash_attention"])

    def _batch(self, ids: Any) -> Any:  # noqa: ANN401 - a ctypes array and a struct
        return self._library.llama_batch_get_one(ids, len(ids))

    def _clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def _version(self) -> str:
        return f"llama-cpp-python {self._library.__version__}"

    def _system_info(self) -> str:
        text: str = self._library.llama_print_system_info().decode()
        return text


class IkLlama(Llama):
    """A GGUF file, run through ik_llama.cpp's C interface, which is older than llama.cpp's. `repack` interleaves the
    rows of weights at load (its --run-time-repack); fused experts are its default."""

    runtime = "ik_llama.cpp"

    def _load(self) -> Any:  # noqa: ANN401 - an untyped module
        return ik_llama_cpp()

    def _set_model(self, parameters: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401 - a ctypes struct
        parameters.repack_tensors = settings["repack"]

    def _set_context(self, parameters: Any, settings: Mapping[str, Any]) -> None:  # noqa: ANN401 - a ctypes struct
        parameters.flash_attn = settings["flash_attention"]

    def _batch(self, ids: Any) -> Any:  # noqa: ANN401 - a ctypes array and a struct
        return self._library._lib.llama_batch_get_one(ids, len(ids), self._length, 0)

    def _clear(self) -> None:
        self._library.llama_kv_cache_clear(self._context)

    def _version(self) -> str:
        return f"ik-llama-cpp-python {importlib.metadata.version('ik-llama-cpp-python')}"

    def _system_info(self) -> str:
        text: str = self._library._lib.llama_print_system_info().decode()
        return text


class Transformers:
    """transformers' MixtralForCausalLM in the shape of the GGUF files, with random weights in memory."""

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import DynamicCache

        torch.set_num_threads(task.threads)
        torch.set_grad_enabled(False)
        self._torch, self._new_cache = torch, DynamicCache
        self.model = mixtral(task.model, task.contender.partition("-")[2], task.settings["experts"])
        _fill(self.model)
        self.forget()

    def forget(self) -> None:
        self._cache = self._new_cache()

    def run(self, tokens: Sequence[int]) -> int:
        ids = self._torch.tensor([list(tokens)])
        output = self.model(input_ids=ids, cache=self._cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    def facts(self) -> dict[str, Any]:
        import transformers

        config = self.model.config
        return {
            "version": f"transformers {transformers.__version__}, torch {self._torch.__version__}",
            "attention": config._attn_implementation,
            "experts": config._experts_implementation,
        }


def mixtral(facts: Architecture, dtype: str, experts: str) -> Any:  # noqa: ANN401 - transformers is not typed
    """transformers' Mixtral with uninitialised weights; `dtype` is bf16 or fp32, `experts` its implementation."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.initialization import no_init_weights

    config = MixtralConfig(
        hidden_size=facts.hidden_size,
        intermediate_size=facts.ffn_size,
        num_hidden_layers=facts.num_layers,
        num_attention_heads=facts.num_heads,
        num_key_value_heads=facts.num_kv_heads,
        head_dim=facts.head_size,
        vocab_size=facts.vocab_size,
        num_local_experts=facts.num_experts,
        num_experts_per_tok=facts.experts_per_token,
        rms_norm_eps=facts.norm_epsilon,
        max_position_embeddings=facts.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": facts.rope_base},
        sliding_window=None,
        tie_word_embeddings=False,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
        experts_implementation=experts,
    )
    with no_init_weights():
        return MixtralForCausalLM._from_config(config).eval()


def _fill(model: Any) -> None:  # noqa: ANN401 - transformers is not typed
    """Set norms to ones and matrices to normal values with variance 1 / input features, copied from one pool."""
    import torch

    largest = max(parameter.numel() for parameter in model.parameters())
    pool = torch.randn(min(POOL_WEIGHTS, largest), generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        scale = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
        scaled = (pool * scale).to(parameter.dtype)
        for piece in parameter.view(-1).split(len(pool)):
            piece.copy_(scaled[: len(piece)])
