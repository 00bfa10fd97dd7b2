"""The directory of an engine for ONNX Runtime and its manifest, engine.json.

An engine is a folder with a valid engine.json. The manifest is written last and the folder appears by rename, so a
folder without a manifest is no engine, and every later stage refuses it. The manifest records the bytes and SHA-256 of
every file. The weights file has one digest for each initializer instead, in weights.jsonl, so that all cores can check
it. `open_engine` always checks the manifest's own digest and the files' sizes, and the files' digests by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.architecture import MAX_DIMENSION, Architecture
from export.checkpoint.digests import num_cores
from export.checkpoint.file_table import TOKENIZER_FILE
from export.conversion.parts import PartRecord, Region, damaged_regions, read_records
from export.errors import listing, named, shown
from export.exporter import (
    DATA_FILE,
    GENERATING_GRAPH,
    INT8_CACHE_GRAPH,
    RECORDS_FILE,
    SCORING_GRAPH,
    SERVING_GRAPH,
)
from export.files.output import replace_file
from export.files.reading import check_name
from export.files.typed_json import read_typed
from export.onnx_graph.kv_scales import SCALES_FILE
from export.provider import INT8, KERNELS, OWN_KERNELS, PER_CHANNEL, PER_POSITION
from export.quantize.presets import PRESETS, preset
from export.quantize.recipe import Recipe
from export.quantize.recipe_reading import read_recipe
from export.tokenizer.settings import TokenizerFacts
from trt_build.comparison.cost.dropping import DroppingPrice
from trt_build.comparison.parity import (
    OWN_INT4,
    SOLVED_INT4,
    SOLVED_OWN_INT4,
    SOLVED_TOKENS,
    THRESHOLDS,
    Thresholds,
)
from trt_build.engine_files import FileRecord, check_file_records, differing_files
from trt_build.errors import EngineError
from trt_build.manifest import (
    MANIFEST_FILE,
    ORT_BACKEND,
    Source,
    changed_meanwhile,
    check_architecture,
    check_digest,
    check_end_tokens,
    check_family,
    check_range,
    check_tokenizer,
    digested_text,
    manifest_values,
    read_manifest,
)
from trt_build.ort.old_formats.manifest import VERSIONS as OLD_VERSIONS
from trt_build.ort.old_formats.manifest import OldFormat, split_old_values, with_recipe

_REQUIRED_FILES = (GENERATING_GRAPH, SCORING_GRAPH, DATA_FILE, RECORDS_FILE, TOKENIZER_FILE)
UNDIGESTED_FILES = (DATA_FILE,)  # whose digests are in weights.jsonl
FORMAT_VERSION = 5
MAX_BATCH = 1 << 16


KEPT = "kept"  # among the methods: codes of a packed checkpoint


@dataclass(frozen=True, kw_only=True)
class StoredRole:
    """How the weights of a role are stored: all bits of codes, block sizes (in input features) and methods that occur
    among the quantised matrices (KEPT for codes of a packed checkpoint), and the bits of codes, scales, zero points and
    floats for each weight. Engines without a recipe in engine.json do not say their methods and `bits_per_weight`."""

    bits: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    bits_per_weight: float | None = None

    @property
    def words(self) -> str:
        """Bits, blocks and methods as text."""
        if not self.bits:
            return "floats"
        bits, sizes = (", ".join(map(str, values)) for values in (self.bits, self.block_sizes))
        return f"{bits} bits in blocks of {sizes}" + (f", {', '.join(self.methods)}" if self.methods else "")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The quantisation that the engine was built with: its recipe as data (export/quantize/recipe.py), what became of
    each role, and the bits of all that is stored for each weight. `search` is the version of the search that chose
    scales (export/quantize/grid.py); engines that do not say it have the first."""

    name: str
    recipe: Mapping[str, Any]
    roles: Mapping[str, StoredRole]
    accuracy_level: int
    average_bits_per_weight: float
    search: int = 1

    @property
    def quantises(self) -> bool:
        """Whether any matrix is quantised."""
        return any(role.bits for role in self.roles.values())

    @property
    def names_methods(self) -> bool:
        """Whether it says by which methods codes were chosen."""
        return any(role.methods for role in self.roles.values())


@dataclass(frozen=True, kw_only=True)
class PackedRole:
    """The packed rows of one role. `codes_kept` rows have exactly the checkpoint's codes; `quantised_anew` have others,
    for `reasons`. `relative_error` is |e| / |w| over all of them, in decimal notation with an exponent: of the engine's
    dequantised values against the checkpoint's; None where codes were solved over a text, which keep outputs and not
    values. Rows that are stored as floats lose at most that rounding, and are in `as_floats`."""

    codes_kept: int = 0
    quantised_anew: int = 0
    as_floats: int = 0
    reasons: tuple[str, ...] = ()
    relative_error: str | None = "0.000e+00"


@dataclass(frozen=True, kw_only=True)
class DroppedLayer:
    """The experts that were dropped from a layer, and each expert's load: its share of the layer's places, [E]."""

    load: tuple[float, ...]
    experts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DroppedExperts:
    """Experts that the engine does without because their load over a text was below `below`. `text` has names, bytes,
    digest and the tokens that were routed; `prices` say what the model loses; `saved_bytes` are those of the dropped
    experts' weights."""

    below: float
    text: Mapping[str, Any]
    layers: Mapping[str, DroppedLayer]
    prices: tuple[DroppingPrice, ...] = ()
    saved_bytes: int


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Keys and values in another dtype than floats, which an engine can be served with: `scales` says what a scale is
    for, PER_CHANNEL or PER_POSITION. Those of channels hold the largest magnitudes over `tokens` tokens of the `text`,
    which has names, bytes and digest; those of positions are found as positions are written."""

    dtype: str
    scales: str
    text: Mapping[str, Any] | None = None
    tokens: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the engine has for it."""
        return (INT8_CACHE_GRAPH, SCALES_FILE) if self.scales == PER_CHANNEL else (INT8_CACHE_GRAPH,)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of engine.json. `expert_order` gives the expert at each index of the stacked weights; `packed` says,
    by role, what became of weights that the checkpoint stores packed; `routing` is the diagnosis of the gates;
    `left_out_experts` has, by layer number, the experts whose matrices are not in the engine; `verification` is the
    last result of `moeship verify`, if any; `calibration` says what codes were solved from, of engines that have such
    (trt_build/calibration.py); `kv_cache` says how keys and values can be stored beside floats, None if only as
    these."""

    format_version: int
    model: str
    family: str
    backend: str
    provider: str
    precision: Precision
    architecture: Architecture
    expert_order: tuple[int, ...]
    max_sequence: int  # tokens, prompt and output together
    max_batch: int
    tokenizer_size: int
    eos_token_ids: tuple[int, ...]
    source: Source
    packed: Mapping[str, PackedRole] = field(default_factory=dict)
    routing: Mapping[str, Any] | None
    left_out_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    libraries: Mapping[str, str]
    files: Mapping[str, FileRecord]
    kernels: str  # kernels that multiply the quantised matrices: "moeship" or "onnxruntime"
    tokenizer: TokenizerFacts | None  # None in an engine of format 2, whose engine.json lacks these facts
    verification: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    dropped_experts: DroppedExperts | None = None  # None: those alone are left out that can never be chosen
    kv_cache: KvCache | None = None

    @property
    def lacking_experts(self) -> dict[int, tuple[int, ...]]:
        """Layer -> the experts that it lacks, for layers of which some were dropped by their load: there the engine
        computes another model than the checkpoint's."""
        if self.dropped_experts is None:
            return {}
        layers = [layer for layer, found in self.dropped_experts.layers.items() if found.experts]
        return {int(layer): tuple(self.left_out_experts[layer]) for layer in layers}

    @property
    def lacking_by_mixture(self) -> tuple[tuple[int, ...], ...]:
        """`lacking_experts` of each layer that has experts, in order."""
        lacking = self.lacking_experts
        return tuple(lacking.get(layer, ()) for layer in self.architecture.mixture_layers)

    @property
    def cache_scales(self) -> str:
        """What a scale of keys and values in int8 is for; "" where there are none."""
        return "" if self.kv_cache is None else self.kv_cache.scales

    def recipe(self) -> Recipe:
        """The recipe that the engine was built with. Raises ValueError for data that is none."""
        provider = KERNELS[self.kernels][self.provider]
        return read_recipe(self.precision.recipe, provider, self.architecture.num_layers)

    @property
    def judged_as(self) -> str:
        """The preset whose limits the engine must keep, or the fewest bits of the codes if its recipe is no preset.
        Engines without a recipe in engine.json, which name no methods, had no other recipes than presets."""
        name, recipe = self.precision.name, self.precision.recipe
        roles = self.precision.roles.values()
        fewest = min((bits for role in roles for bits in role.bits), default=None)
        if fewest is None:
            return "fp32" if KERNELS[self.kernels][self.provider].float_type == "float32" else "fp16"
        default = {key: value for key, value in recipe["default"].items() if key != "method"}
        values = {**recipe, "default": default}
        named = name in PRESETS and not self.precision.names_methods
        provider = KERNELS[self.kernels][self.provider]
        same = name in PRESETS and values == {"name": name, **preset(name, provider)}
        return name if named or same else f"{fewest} bits"

    @property
    def thresholds(self) -> Thresholds:
        """The limits of the engine's distance from its checkpoint. Those of int4 hang on the kernels, whose recipes
        differ, and on whether codes were solved over enough of a text."""
        name, own = self.judged_as, self.kernels == OWN_KERNELS and self.precision.names_methods
        if name != "int4":
            return THRESHOLDS[name]
        tokens = self.calibration.get("tokens", 0) if self.calibration is not None else 0
        if isinstance(tokens, int) and tokens >= SOLVED_TOKENS:
            return THRESHOLDS[SOLVED_OWN_INT4 if own else SOLVED_INT4]
        return THRESHOLDS[OWN_INT4 if own else name]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An opened engine directory. `old` holds the values that only earlier formats of engine.json have; None in the
    present format."""

    folder: Path
    manifest: Manifest
    old: OldFormat | None = None

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.manifest.files.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights that serving keeps in memory, mapped or not."""
        kept = self.old.resident_bytes if self.old else None
        return kept or self.manifest.files[DATA_FILE].bytes

    @property
    def has_serving_graph(self) -> bool:
        """Whether there is a graph that takes several sequences in one step. Engines of earlier formats have only the
        graph for onnxruntime-genai, which takes one."""
        return self.old is None

    @property
    def has_own_kernels(self) -> bool:
        """Whether moeship's kernels multiply the quantised matrices. They read them in place from the mapped file."""
        return self.manifest.kernels == OWN_KERNELS

    def text(self, verification: Mapping[str, Any] | None) -> str:
        """The text of engine.json with `verification` as the result of the last comparison."""
        if self.old:
            return self.old.text(verification)
        return manifest_text(dataclasses.replace(self.manifest, verification=verification))


def manifest_text(manifest: Manifest) -> str:
    """The text of engine.json."""
    return digested_text(manifest_values(manifest))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write engine.json by rename."""
    replace_file(folder / MANIFEST_FILE, manifest_text(manifest))


def record_verification(engine: Engine, verification: Mapping[str, Any]) -> None:
    """Write the result of a comparison into engine.json, in place of an earlier result. Raises EngineError if
    engine.json changed after the engine was opened."""
    found = open_engine(engine.folder, check_digests=False)
    if found.text(found.manifest.verification) != engine.text(engine.manifest.verification):
        raise changed_meanwhile(engine.folder)
    replace_file(engine.folder / MANIFEST_FILE, engine.text(verification))


def open_engine(folder: Path | str, check_digests: bool = True) -> Engine:
    """Read the manifest and check the files against it. Raises EngineError listing every problem."""
    folder = Path(folder)
    check_name(folder, f"opening the engine {named(folder)}", EngineError)
    raw = read_manifest(folder, f"opening the engine {folder}")
    if raw.get("backend") != ORT_BACKEND:
        raise EngineError(
            f"opening the engine {folder}: its backend is {named(raw.get('backend'), 40)}, expected {ORT_BACKEND}; "
            "moeship package and serve take it, and moeship verify does on a machine with a GPU"
        )
    engine = _parse(raw, folder)
    manifest = engine.manifest
    found = differing_files(folder, manifest.files, check_digests)
    problems = [f"{name}: {problem}" for name, problem in found.items()]
    if check_digests and not found.keys() & {DATA_FILE, RECORDS_FILE}:
        problems += [f"{DATA_FILE}: {problem}" for problem in _weight_problems(folder, manifest)]
    if problems:
        raise EngineError(
            f"opening the engine {folder}: its files are not those of the build; build it again:{listing(problems)}"
        )
    return engine


def read_part_records(folder: Path) -> list[PartRecord]:
    """Read weights.jsonl: for each part of the weights, what it was made from. Raises EngineError if the file is
    malformed."""
    try:
        return read_records(folder / RECORDS_FILE)
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(
            f"opening the engine {folder}: {RECORDS_FILE} is malformed ({error}); build it again"
        ) from error


def weight_regions(folder: Path, num_bytes: int) -> list[Region]:
    """The regions of an engine's weights file with their digests, read from weights.jsonl and sorted by offset.

    Raises EngineError if weights.jsonl is malformed or its regions do not cover all `num_bytes` of the weights file.
    """
    found = [region for record in read_part_records(folder) for region in record.regions]
    regions, position = sorted(found, key=lambda region: region.offset), 0
    for region in regions:
        if region.offset != position or region.bytes < 0:
            raise _uncovered(folder, f"leaves bytes {position} to {region.offset} without a digest")
        position += region.bytes
    if position != num_bytes:
        raise _uncovered(folder, f"covers {position} bytes, the file has {num_bytes}")
    return regions


def _uncovered(folder: Path, problem: str) -> EngineError:
    return EngineError(
        f"opening the engine {folder}: its files are not those of the build; build it again:"
        f"{listing([f'{DATA_FILE}: {RECORDS_FILE} {problem}'])}"
    )


def _weight_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Descriptions of the regions of the weights file that differ from their digests. Raises EngineError as
    `weight_regions` does."""

    def problems(region: Region) -> list[str]:
        return damaged_regions(folder / DATA_FILE, [region])

    regions = weight_regions(folder, manifest.files[DATA_FILE].bytes)
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        return [problem for found in pool.map(problems, regions) for problem in found]


def _parse(raw: dict[str, Any], folder: Path) -> Engine:
    version = raw.get("format_version")
    if type(version) is not int or version not in (*OLD_VERSIONS, FORMAT_VERSION):
        raise EngineError(
            f"opening the engine {folder}: it has the format version {shown(version, 40)}, and this moeship reads "
            f"{', '.join(map(str, OLD_VERSIONS))} and {FORMAT_VERSION}; build it again with this version"
        )
    try:
        values, old = split_old_values(raw)
        values["precision"] = with_recipe(values.get("precision"))
        manifest = read_typed(Manifest, values)
        _check_facts(manifest, old)
    except ValueError as error:
        raise EngineError(
            f"opening the engine {folder}: {MANIFEST_FILE} is malformed ({error}); build it again"
        ) from error
    return Engine(folder=folder, manifest=manifest, old=old)


def _check_facts(manifest: Manifest, old: OldFormat | None) -> None:
    """Check the ranges and relations of values that types do not express. Raises ValueError."""
    facts = manifest.architecture
    check_architecture(facts)
    check_family(manifest.family, facts)
    if manifest.tokenizer is not None:
        check_tokenizer(manifest.tokenizer)
    elif old is None or old.names_tokenizer:
        raise ValueError("tokenizer is missing")
    further = manifest.kv_cache.files if manifest.kv_cache is not None else ()
    check_file_records(
        manifest.files,
        (*_REQUIRED_FILES, *(old.files if old else (SERVING_GRAPH,)), *further),
        undigested=UNDIGESTED_FILES,
    )
    if manifest.kv_cache is not None and manifest.kv_cache.dtype != INT8:
        raise ValueError(f"kv_cache.dtype is {shown(manifest.kv_cache.dtype)}, expected {INT8}")
    if manifest.kv_cache is not None and manifest.kv_cache.scales not in (PER_CHANNEL, PER_POSITION):
        expected = f"{PER_CHANNEL} or {PER_POSITION}"
        raise ValueError(f"kv_cache.scales is {shown(manifest.kv_cache.scales)}, expected {expected}")
    if old and old.resident_bytes is not None:
        check_range("resident_bytes", old.resident_bytes, 1, manifest.files[DATA_FILE].bytes)
    order = manifest.expert_order
    if len(order) != facts.num_experts or sorted(order) != list(range(facts.num_experts)):
        raise ValueError(f"expert_order is {shown(order)}, expected each of {facts.num_experts} experts once")
    for layer, left_out in manifest.left_out_experts.items():
        where = f"left_out_experts.{named(layer, 40)}"
        if layer not in map(str, facts.mixture_layers):
            raise ValueError(f"{where}: there is no such layer of experts")
        if len(set(left_out)) != len(left_out) or not set(left_out) < set(order):
            raise ValueError(f"{where} is {shown(left_out)}, expected some of {facts.num_experts} experts, each once")
        if facts.num_experts - len(left_out) < facts.experts_per_token:
            raise ValueError(f"{where} leaves fewer than the {facts.experts_per_token} experts that a token needs")
    dropped = {} if manifest.dropped_experts is None else manifest.dropped_experts.layers
    for layer, found in dropped.items():
        where = f"dropped_experts.layers.{named(layer, 40)}"
        if not set(found.experts) <= set(manifest.left_out_experts.get(layer, ())):
            raise ValueError(f"{where} drops {shown(found.experts)}, which left_out_experts does not have")
        if len(found.load) != facts.num_experts:
            raise ValueError(f"{where} has {len(found.load)} loads, expected {facts.num_experts}")
    if manifest.kernels not in KERNELS:
        raise ValueError(f"kernels is {shown(manifest.kernels)}, expected one of {', '.join(KERNELS)}")
    providers, precision = KERNELS[manifest.kernels], manifest.precision
    provider = providers.get(manifest.provider)
    if provider is None:
        raise ValueError(f"provider is {shown(manifest.provider)}, expected one of {', '.join(providers)}")
    if precision.name in PRESETS and precision.name not in provider.precisions:
        raise ValueError(f"precision is {shown(precision.name)}, expected one of {', '.join(provider.precisions)}")
    for name, role in precision.roles.items():
        where = f"precision.roles.{named(name, 40)}"
        for bits in role.bits:
            check_range(f"{where}.bits", bits, 1, 64)
        for size in role.block_sizes:
            check_range(f"{where}.block_sizes", size, 1, MAX_DIMENSION)
    manifest.recipe()
    check_range("precision.accuracy_level", precision.accuracy_level, 0, 4)
    check_range("precision.average_bits_per_weight", precision.average_bits_per_weight, 0, 64)
    check_range("max_sequence", manifest.max_sequence, 1, facts.max_positions)
    check_range("max_batch", manifest.max_batch, 1, MAX_BATCH)
    check_range("tokenizer_size", manifest.tokenizer_size, 1, facts.vocab_size)
    check_end_tokens(manifest.eos_token_ids, manifest.tokenizer_size)
    for name, digest in manifest.source.digests.items():
        check_digest(f"source.digests.{named(name, 80)}", digest)
