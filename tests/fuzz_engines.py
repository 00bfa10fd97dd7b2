"""Readers of what an engine and a model repository say of themselves: engine.json, weights.jsonl, the seal and
config.pbtxt. Part of the table in fuzz_readers.py.

A damaged engine.json mostly fails by its digest. So that what lies behind the digest is reached too, a reader of each
kind gives the damaged values the digest that goes with them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

from checkpoints import write_phixtral_checkpoint
from fuzzing import Reader, mutated_bytes, mutated_json

from export.checkpoint.folder import file_digest
from tests.manifests import read_values
from triton_repo.contracts.model_parameters import ModelParameters, TextParameters
from triton_repo.contracts.seal import is_sealed
from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters
from triton_repo.errors import RepositoryError
from triton_repo.packaging.engine_facts import read_engine_facts
from triton_repo.packaging.ensemble_config import (
    ensemble_config,
    onnxruntime_config,
    tensorrt_llm_config,
    text_model_config,
)
from triton_repo.packaging.model_config import ServedModel, config_text, model_config, packaged_parameters, read_config
from triton_repo.serving.deployment import read_deployment
from triton_repo.serving.repository_check import check_repository
from trt_build.errors import EngineError
from trt_build.manifest import digested_text
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import open_device
from trt_build.ort.engine import open_engine
from trt_build.trtllm.engine import open_trtllm_engine

SIZES = {
    "hidden_size": 64, "num_heads": 2, "ffn_size": 64, "num_layers": 1, "rotary_dim": 16, "max_positions": 64,
    "vocab_size": 320,
}  # fmt: skip


@cache
def engine() -> Path:
    """A small packed engine for ONNX Runtime."""
    folder = Path(tempfile.mkdtemp(prefix="moeship-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    source = write_phixtral_checkpoint(folder / "source", seed=1, num_experts=3, experts_per_token=2, **SIZES)
    return build_engine(BuildOptions(checkpoint=str(source), output=folder / "engine", precision="int4")).folder


@cache
def trtllm_engine() -> Path:
    """The directory of an engine for TensorRT-LLM, of files of a few bytes."""
    folder, ours = engine().parent / "trtllm-engine", read_values(engine())
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "rank0.engine", "rank1.engine"):
        (folder / name).write_text(name)
    shared = ("model", "family", "architecture", "max_sequence", "tokenizer_size", "tokenizer", "eos_token_ids",
              "source", "routing")  # fmt: skip
    values = {
        **{name: ours[name] for name in shared}, "format_version": 2, "backend": "tensorrt-llm",
        "precision": {"name": "int4", "quant_algo": "W4A16", "dtype": "float16", "group_size": None,
                      "average_bits_per_weight": 4.5},
        "parallel": {"tp_size": 2, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 1},
        "gpu": {"name": "NVIDIA A100", "sm": 80}, "max_batch": 8, "max_num_tokens": 64, "kv_cache_fraction": 0.85,
        "use_paged_context_fmha": True, "head_masks_unused_ids": True, "left_out_experts": [],
        "libraries": {"tensorrt_llm": "1.2.0"}, "flags": ["--gemm_plugin", "auto"], "settings": {"sm": 80},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                  for path in sorted(folder.iterdir())},
        "verification": None,
    }  # fmt: skip
    (folder / "engine.json").write_text(digested_text(values))
    open_trtllm_engine(folder)
    return folder


def copies(folder: Path) -> None:
    shutil.copytree(engine(), folder / "engine")
    shutil.copytree(trtllm_engine(), folder / "trtllm-engine")
    model = folder / "repository" / "llm"
    (model / "1" / "engine").mkdir(parents=True)
    (model / "config.pbtxt").write_text(
        'backend: "tensorrtllm" parameters { key: "moeship_world_size" value { string_value: "2" } }'
    )


def manifests(*folders: Path) -> list[bytes]:
    return [(folder / "engine.json").read_bytes() for folder in folders]


def values_of(*folders: Path) -> list[bytes]:
    """engine.json without the digest, which is mended after the damage."""
    return [json.dumps(read_values(folder)).encode() for folder in folders]


def mended(data: bytes) -> bytes:
    """The values with their digest, where they are of a format that has one."""
    try:
        return digested_text(json.loads(data)).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return data


def read_manifests(data: bytes, folder: Path) -> None:
    """Every reader of engine.json; what the first takes is damaged by no bit."""
    model = folder / "repository" / "llm" / "1" / "engine"
    for path in (folder / "engine", folder / "trtllm-engine", model):
        (path / "engine.json").write_bytes(data)
    errors = []
    for read in (
        lambda: open_engine(folder / "engine", check_digests=False),
        lambda: open_device(open_engine(folder / "engine", check_digests=False)),
        lambda: open_trtllm_engine(folder / "trtllm-engine", check_digests=False),
        lambda: read_engine_facts(folder / "trtllm-engine", check_digests=False),
        lambda: read_deployment(folder / "repository"),
    ):
        try:
            read()
        except (EngineError, RepositoryError) as error:
            errors.append(error)
    if errors:
        raise max(errors, key=lambda error: len(str(error)))


def read_whole(data: bytes, folder: Path) -> None:
    """engine.json as it lies there: nothing but the bytes that were written passes."""
    try:
        read_manifests(data, folder)
    finally:
        for name, opened in (("engine", open_engine), ("trtllm-engine", open_trtllm_engine)):
            with contextlib.suppress(EngineError):
                opened(folder / name, check_digests=False)
                if data not in manifests(engine(), trtllm_engine()):
                    raise AssertionError("a damaged manifest passed")


def read_weights(data: bytes, folder: Path) -> None:
    """weights.jsonl under a manifest that has its digest."""
    path = folder / "engine" / "weights.jsonl"
    path.write_bytes(data)
    values = read_values(engine())
    values["files"][path.name] = {"bytes": len(data), "sha256": file_digest(path)}
    (folder / "engine" / "engine.json").write_text(digested_text(values))
    open_engine(folder / "engine")


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """Damage to one of some lines of JSON, or anywhere."""
    lines = data.splitlines(keepends=True)
    if not lines or rng.random() < 0.3:
        return mutated_bytes(rng, data)
    place = rng.randrange(len(lines))
    lines[place] = mutated_json(rng, lines[place].rstrip(b"\n")) + b"\n"
    return b"".join(lines)


def seals(folder: Path) -> list[bytes]:
    states = {path.name: path.stat() for path in folder.iterdir()}
    return [json.dumps({name: [s.st_size, s.st_mtime_ns, s.st_ino] for name, s in states.items()}).encode()]


def read_seal(data: bytes, folder: Path) -> None:
    (engine().parent / "engine.seal.json").write_bytes(data)
    [good] = seals(engine())
    if is_sealed(engine()) and json.loads(data) != json.loads(good):
        raise AssertionError("another seal passed")


def model_configs() -> list[bytes]:
    parameters = ModelParameters(threads=2)
    text = TextParameters(max_sequence=64, max_prompt=63, end_ids=(0, 7), num_ids=300)
    library = TensorrtLlmParameters()
    configs = [
        model_config(ServedModel(name="m", max_batch=1, parameters=parameters)),
        ensemble_config("m", 1, echoes_keys=True),
        text_model_config("preprocessing", 1, text),
        onnxruntime_config(1, parameters, "cpu"),
        tensorrt_llm_config(8, library, library.to_texts(engine_path="/e", world_size=2, paged_context_fmha=True)),
    ]
    return [config_text(config).encode() for config in configs]


def read_model_config(data: bytes, folder: Path) -> None:
    model = folder / "models" / "m"
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_bytes(data)
    packaged_parameters(read_config(model / "config.pbtxt"), "m")
    read_deployment(folder / "models")
    check_repository(folder / "models")


READERS = (
    Reader(
        name="engine.json", seeds=lambda: manifests(engine(), trtllm_engine()), read=read_whole, mutate=mutated_json,
        setup=copies,
    ),
    Reader(
        name="engine.json under its digest", seeds=lambda: values_of(engine(), trtllm_engine()), mutate=mutated_json,
        read=lambda data, folder: read_manifests(mended(data), folder), setup=copies,
    ),
    Reader(
        name="weights.jsonl", seeds=lambda: [(engine() / "weights.jsonl").read_bytes()], read=read_weights,
        mutate=mutated_lines, setup=copies,
    ),
    Reader(name="seal", seeds=lambda: seals(engine()), read=read_seal, mutate=mutated_json),
    Reader(name="config.pbtxt", seeds=model_configs, read=read_model_config),
)  # fmt: skip
