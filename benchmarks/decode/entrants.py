"""Prepares contenders by name: the model that each loads, the bytes that a token reads, and whether it fits memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decode import llama_formats, machine
from decode.contenders import CHOICES, Task
from decode.engine_bytes import count_bytes
from decode.gguf_model import read_contents, write_model
from decode.shape import Weights, count_weights, llama_model
from export.architecture import Architecture
from export.errors import ConfigError
from export.exporter import SERVING_GRAPH
from trt_build.ort.engine import Engine, open_engine

NAMES = (
    "ours", "llama-q4_0", "llama-q4_k_m", "ik-q4_0", "ik-q4_k_m", "ik-iq4_xs", "transformers-bf16", "transformers-fp32",
    "llama-mxfp4",
)  # fmt: skip
USUAL = NAMES[:-1]  # MXFP4 is the format of gpt-oss
SPARE_BYTES = 1_500_000_000  # memory for activations, libraries and the system, in addition to the model
_ITEM_BYTES = {"bf16": 2, "fp32": 4}
_HALF = 2  # bytes of a key or value in llama.cpp's cache: float16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A contender that is ready to run. `read_per_token` are the bytes of weights that decoding one token reads,
    `cache_per_position` the bytes of the cache for each earlier position.

    `decode_scale` and `prefill_scale` are factors for its rates: 1, or less if fewer layers than the model's were
    measured.
    """

    name: str
    source: Path | None
    model: Architecture
    files: tuple[Path, ...]  # read before every turn, so that each starts from a warm page cache
    choices: tuple[Mapping[str, Any], ...]
    weights: Weights
    weight_bytes: int
    read_per_token: int
    cache_per_position: int
    notes: Mapping[str, Any]
    decode_scale: float = 1.0
    prefill_scale: float = 1.0

    def task(self, positions: int, threads: int, settings: Mapping[str, Any]) -> Task:
        """What its process has to load."""
        return Task(
            contender=self.name, source=self.source, model=self.model, positions=positions, threads=threads,
            settings=dict(settings),
        )  # fmt: skip


def prepare(name: str, engine: Path | None, facts: Architecture, folder: Path, scaled_layers: int) -> Entrant:
    """Make a contender ready, writing its model into `folder` where it is missing. Raises MoeshipError."""
    runtime, _, precision = name.partition("-")
    if name not in NAMES:
        raise ConfigError(f"choosing contenders: {name!r} is unknown. There are: {', '.join(NAMES)}")
    if runtime == "ours":
        if engine is None:
            raise ConfigError("choosing contenders: 'ours' needs an engine; name one with --engine, or leave it out")
        return _ours(open_engine(engine, check_digests=False))
    peer = llama_model(facts)
    if runtime == "transformers":
        if peer.family != "mixtral":
            raise ConfigError(f"choosing contenders: {name} runs a Mixtral, found a {peer.family}; leave it out")
        return _transformers(name, peer, scaled_layers)
    return _llama(name, precision, peer, folder)


def _ours(engine: Engine) -> Entrant:
    facts = engine.manifest.architecture
    counted = count_bytes(engine.folder / SERVING_GRAPH, facts.num_experts, facts.experts_per_token)
    return Entrant(
        name="ours",
        source=engine.folder,
        model=facts,
        files=tuple(engine.folder / name for name in engine.manifest.files),
        choices=tuple(CHOICES["ours"]),
        weights=count_weights(facts),
        weight_bytes=counted.weight_bytes,
        read_per_token=counted.read_per_token,
        cache_per_position=counted.cache_per_position,
        notes={"bits_per_weight": engine.manifest.precision.average_bits_per_weight},
    )


def _llama(name: str, precision: str, model: Architecture, folder: Path) -> Entrant:
    """Prepare a GGUF file for llama.cpp or ik_llama.cpp. llama.cpp's quantiser makes it; both read the same file."""
    path = gguf_path(folder, model, precision)
    if not path.is_file():
        types = llama_formats.chosen_types(model, precision)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(path, model, types, llama_formats.quantize, llama_formats.FILE_TYPES[precision])
    contents = read_contents(path, model)
    return Entrant(
        name=name,
        source=path,
        model=model,
        files=(path,),
        choices=tuple(CHOICES[name.partition("-")[0]]),
        weights=count_weights(model),
        weight_bytes=contents.weight_bytes,
        read_per_token=contents.bytes_read_per_token,
        cache_per_position=_cache_bytes(model, _HALF),
        notes={
            "bytes_of_type": dict(contents.bytes_of_type),
            "tensors_of_type": dict(contents.tensors_of_type),
            "bits_per_weight": 8 * contents.weight_bytes / contents.weights,
        },
    )


def _transformers(name: str, model: Architecture, scaled_layers: int) -> Entrant:
    """Prepare the Mixtral for transformers, with fewer layers if it does not fit in memory. Rates are then scaled by
    the bytes that a token reads (decode) and by the weights that it is multiplied with (prefill)."""
    item = _ITEM_BYTES[name.partition("-")[2]]
    whole = count_weights(model)
    available = machine.memory("MemAvailable") - SPARE_BYTES
    measured = model
    notes: dict[str, Any] = {}
    if whole.total * item > available:
        measured = replace(model, num_layers=min(scaled_layers, model.num_layers))
        notes["scaled"] = (
            f"{model.num_layers} layers take {whole.total * item / 1e9:.1f} GB, {max(available, 0) / 1e9:.1f} GB are "
            f"free: measured with {measured.num_layers} layers, rates scaled by the active weights"
        )
        logger.info("%s: %s", name, notes["scaled"])
    part = count_weights(measured)
    if part.total * item > available:
        raise ConfigError(
            f"benchmarking {name}: even {measured.num_layers} layers take {part.total * item / 1e9:.1f} GB, "
            f"{max(available, 0) / 1e9:.1f} GB are free; ask for fewer --scaled-layers or leave it out"
        )
    return Entrant(
        name=name,
        source=None,
        model=measured,
        files=(),
        choices=tuple(CHOICES["transformers"]),
        weights=whole,
        weight_bytes=whole.total * item,
        read_per_token=whole.active * item,
        cache_per_position=_cache_bytes(model, item),
        notes=notes,
        decode_scale=part.active / whole.active,
        prefill_scale=(part.active - _head(model)) / (whole.active - _head(model)),
    )


def gguf_path(folder: Path, model: Architecture, precision: str) -> Path:
    """The path of a GGUF file; its name contains every size of the model."""
    sizes = (
        f"L{model.num_layers}-H{model.hidden_size}-N{model.num_heads}-G{model.num_kv_heads}-D{model.head_size}"
        f"-E{model.num_experts}-K{model.experts_per_token}-F{model.ffn_size}-V{model.vocab_size}"
    )
    return folder / f"{model.family}-{sizes}-{precision}.gguf"


def _cache_bytes(model: Architecture, item: int) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_size * item


def _head(model: Architecture) -> int:
    """Weights of the head, which a prompt of any length is multiplied with at one position only."""
    return model.vocab_size * model.hidden_size
