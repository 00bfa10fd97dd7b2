"""Writes engine.json with a digest of its own text, and reads it only if the digest is right.

The digest is the last value of the object: SHA-256 over every byte before it. The three bytes after it are fixed, so
any changed bit is found. The digest finds damage and careless edits. It is not a signature: an attacker can compute it
too.

Formats up to UNDIGESTED have no digest and are read without one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.architecture import Architecture, is_token_id
from export.errors import MoeshipError, kind_of, named, shown
from export.files.reading import is_folder, is_there, parse_json, read_bytes
from export.files.recognised import recognised
from export.tokenizer.settings import MAX_TOKENS, TokenizerFacts
from trt_build.errors import EngineError

MANIFEST_FILE = "engine.json"
ORT_BACKEND, TRTLLM_BACKEND = BACKENDS = "onnxruntime", "tensorrt-llm"
UNDIGESTED: Mapping[str, int] = {ORT_BACKEND: 2, TRTLLM_BACKEND: 1}  # backend -> the last format without a digest
_DIGEST = re.compile(r'(?<=,\n  "digest": ")[0-9a-f]{64}(?="\n}\n\Z)')
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
# Facts that most networks do not have.
_LEFT_OUT = ("qkv", "swiglu", "full_layers", "dense_ffn_size", "shared_ffn_size", "attention_bias", "head_bias")
_LIBRARIES = ("moeship", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint that the weights came from. `digests` has one digest for each file name, as
    `export.checkpoint.digests` describes; `revision` is the commit of a hub id."""

    checkpoint: str
    revision: str | None
    digests: Mapping[str, str]


def libraries() -> dict[str, str]:
    """Versions of Python and of the packages that decide an engine's bytes."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def manifest_values(manifest: Any) -> dict[str, Any]:  # noqa: ANN401 - the record of either backend's engine.json
    """The values of an engine.json. Facts of _LEFT_OUT that have their plain value are left out, which their absence
    means: engines of models without such facts keep their bytes."""
    values, facts = dataclasses.asdict(manifest), manifest.architecture
    for field in dataclasses.fields(facts):
        if field.name in _LEFT_OUT and getattr(facts, field.name) == field.default:
            del values["architecture"][field.name]
    if facts.router.jitter is None:
        del values["architecture"]["router"]["jitter"]
    return values


def digested_text(values: Mapping[str, Any]) -> str:
    """The text of an engine.json with these values and the digest at the end, if the format has a digest."""
    version = values["format_version"]
    if version <= UNDIGESTED[values["backend"]]:
        return json.dumps(values, indent=2) + "\n"
    text = json.dumps({**values, "digest": "0" * 64}, indent=2) + "\n"
    return _DIGEST.sub(_digest_of(text), text)


def failed_verification(verification: object) -> str | None:
    """The first failure of an engine's last verification, as engine.json has it, and how many more there are; None if
    it passed or there was none."""
    failures = verification.get("failures") if isinstance(verification, dict) else None
    if not isinstance(failures, list) or not failures:
        return None
    return f"{failures[0]}{f', and {len(failures) - 1} more' if len(failures) > 1 else ''}"


def read_manifest(folder: Path, doing: str, error: type[MoeshipError] = EngineError) -> dict[str, Any]:
    """The values of a folder's engine.json without the digest. Raises `error`, whose message begins with `doing`, if
    the file is missing, is no JSON object, or was changed after it was written."""
    path = folder / MANIFEST_FILE
    if not is_folder(folder):
        if (taken := recognised(folder)) is not None:
            raise error(f"{doing}: {taken}")
        found = "it is a file" if is_there(folder) else "no such folder"
        raise error(f"{doing}: {found}, expected the folder of an engine; check the path")
    if not is_there(path):
        if (taken := recognised(folder)) is not None:
            raise error(f"{doing}: there is no {MANIFEST_FILE} in it, which every engine has: {taken}")
        raise error(
            f"{doing}: there is no {MANIFEST_FILE} in it, which every engine has; check the path, and if it is an "
            f"engine, {_REMEDY}"
        )
    data = read_bytes(path, "the engine's manifest", error=error)
    try:
        text = data.decode()
        values = parse_json(text)
    except UnicodeDecodeError as reason:
        raise error(f"{doing}: {named(path)} is damaged (byte {reason.start} is not UTF-8); {_REMEDY}") from reason
    except ValueError as reason:
        raise error(f"{doing}: {named(path)} is damaged ({reason}); {_REMEDY}") from reason
    if not isinstance(values, dict):
        raise error(f"{doing}: {named(path)} is damaged (it holds {kind_of(values)}, expected an object); {_REMEDY}")
    if "digest" not in values:
        backend, version = values.get("backend"), values.get("format_version")
        if isinstance(backend, str) and type(version) is int and version > UNDIGESTED.get(backend, version):
            raise error(f"{doing}: {named(path)} has no digest: it was edited or is damaged; {_REMEDY}")
        return values
    given, expected = values.pop("digest"), _digest_of(text)
    if given != expected or not _DIGEST.search(text):
        raise error(
            f"{doing}: {named(path)} was edited or is damaged: found the digest {shown(given, 20)}, expected "
            f"{expected[:12]}…, the digest of its bytes; {_REMEDY}"
        )
    return values


_REMEDY = "put back the file that the build or verify wrote, or build the engine again"


def engine_backend(folder: Path) -> str | None:
    """The backend that a directory's engine.json names; None if there is no readable engine.json."""
    try:
        backend = read_manifest(folder, f"opening the engine {folder}").get("backend")
    except EngineError:
        return None
    return backend if isinstance(backend, str) else None


def _digest_of(text: str) -> str:
    """SHA-256 of the bytes before the digest's value, or of the whole text if it does not end with a digest."""
    place = _DIGEST.search(text)
    return hashlib.sha256(text[: place.start() if place else len(text)].encode()).hexdigest()


def changed_meanwhile(folder: Path) -> EngineError:
    """The error to raise if another process wrote engine.json after it was read."""
    return EngineError(
        f"writing the comparison's result into {folder / MANIFEST_FILE}: it changed since it was read; verify again "
        "when no other process writes to it"
    )


def check_digest(name: str, text: str) -> None:
    """Raise ValueError if a text is not a SHA-256 in hexadecimal."""
    if not _HEX_DIGEST.fullmatch(text):
        raise ValueError(f"{name} is {shown(text, 80)}, expected a SHA-256")


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raise ValueError if a number is not in the range from `least` to `most`."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {shown(value, 40)}, expected {least} to {most}")


def check_architecture(facts: Architecture) -> None:
    """Raise ValueError if a model's facts contradict each other. `Architecture` checks each fact by itself."""
    check_range("architecture.experts_per_token", facts.experts_per_token, int(facts.is_moe), facts.num_experts)
    check_range("architecture.rotary_dim", facts.rotary_dim, 2, facts.head_size)
    if facts.rotary_dim % 2:
        raise ValueError(f"architecture.rotary_dim is {facts.rotary_dim}, expected an even number")
    if facts.num_heads % facts.num_kv_heads:
        raise ValueError(f"architecture.num_heads is {facts.num_heads}, expected a multiple of num_kv_heads")


def check_family(family: str, facts: Architecture) -> None:
    """Raise ValueError if `family` is not the family in the model's facts."""
    if family != facts.family:
        raise ValueError(f"family is {shown(family)}, expected {shown(facts.family)}, as in architecture")


def check_tokenizer(facts: TokenizerFacts) -> None:
    """Raise ValueError if a token id or the longest input length of the tokenizer is out of range."""
    stated: dict[str, Sequence[int | None]] = {
        "bos_token_id": [facts.bos_token_id],
        "pad_token_id": [facts.pad_token_id],
        "added_tokens": [token.id for token in facts.added_tokens],
        "begins_with": facts.begins_with,
        "ends_with": facts.ends_with,
    }
    for name, ids in stated.items():
        wrong = [item for item in ids if item is not None and not is_token_id(item)]
        if wrong:
            raise ValueError(f"tokenizer.{name} holds {shown(wrong[0], 40)}, expected token ids")
    if facts.model_max_length is not None:
        check_range("tokenizer.model_max_length", facts.model_max_length, 1, MAX_TOKENS)


def check_end_tokens(ids: tuple[int, ...], tokenizer_size: int) -> None:
    """Raise ValueError for an end token that an engine never generates, because its id stands for no text."""
    never = [item for item in ids if not 0 <= item < tokenizer_size]
    if never:
        raise ValueError(
            f"eos_token_ids holds {shown(never[0])}, expected ids below {tokenizer_size}, which stand for text"
        )
