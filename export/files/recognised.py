"""Says what a path holds that a command does not take, and which command takes it.

recognised(Path("merge.yml"))      # "it is a merge configuration; ..."
"""

from __future__ import annotations

from pathlib import Path

from export.errors import named
from export.files.reading import is_folder, is_regular, is_there

MERGE_SUFFIXES = (".yml", ".yaml")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# A path that ends so means a file, whether it is there or not.
FILE_SUFFIXES = (*MERGE_SUFFIXES, *_WEIGHT_SUFFIXES, ".gguf", ".json", ".onnx", ".txt")


def recognised(path: Path) -> str | None:
    """What a file or folder is, and the command that takes it; None for what no command takes. Reads names alone."""
    if is_regular(path):
        return _file(path)
    if not is_folder(path):
        return None
    if is_there(path / "engine.json"):
        return "it is an engine, which `moeship verify` and `moeship package` take"
    if is_there(path / "config.pbtxt"):
        return f"it is a model of a Triton model repository; `moeship serve {named(path.parent)}` takes the repository"
    if any(is_there(inside / "config.pbtxt") for inside in _folders(path)):
        return f"it is a Triton model repository; `moeship serve {named(path)}` takes it"
    if is_there(path / "rank0.safetensors"):
        return "it is a TensorRT-LLM checkpoint, which trtllm-build takes; name the checkpoint that it was made from"
    if is_there(path / "adapter_config.json") and not is_there(path / "config.json"):
        return "it is an adapter; name it behind its base model, as model+adapter, in the YAML of `moeship merge`"
    if is_there(path / "config.json") and not is_there(path / "rank0.engine"):
        return f"it is a checkpoint; make an engine of it with `moeship build {named(path)} --output ENGINE`"
    return None


def _file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in MERGE_SUFFIXES:
        return (
            f"it is a YAML file; if it is a merge configuration, make a checkpoint of it with `moeship merge "
            f"{named(path)} OUT`"
        )
    if suffix == ".gguf":
        return f"it is a GGUF file; make an engine of it with `moeship build {named(path)} --output ENGINE`"
    if suffix in _WEIGHT_SUFFIXES:
        return "it is a file of weights; name the folder of the checkpoint that it belongs to"
    return None


def _folders(path: Path) -> list[Path]:
    try:
        return [inside for inside in path.iterdir() if is_folder(inside)]
    except OSError:
        return []
