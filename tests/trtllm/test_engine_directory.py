"""The directory of a TensorRT-LLM engine: what engine.json says, and what is refused when it is opened."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
from trtllm.building import manifest_of, options_of
from trtllm.library import ROOT

from tests.manifests import edit_manifest
from trt_build.errors import EngineError
from trt_build.manifest import engine_backend
from trt_build.ort.engine import open_engine
from trt_build.trtllm.build import build_trtllm
from trt_build.trtllm.engine import open_trtllm_engine


def strings_in(value):
    """Every text of a JSON value, keys too."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings_in(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings_in(item)]
    return [value] if isinstance(value, str) else []


def test_the_manifest_says_what_the_librarys_config_does_not(small_phixtral, built_engine):
    found = manifest_of(built_engine)
    ours = {"config.json", "rank0.engine", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in built_engine.iterdir()} == {*ours, "engine.json"}
    assert found["files"] == {
        name: {
            "bytes": (built_engine / name).stat().st_size,
            "sha256": hashlib.sha256((built_engine / name).read_bytes()).hexdigest(),
        }
        for name in ours
    }
    facts = {key: found[key] for key in ("model", "family", "backend", "gpu", "max_sequence", "max_batch",
                                         "max_num_tokens", "kv_cache_fraction", "tokenizer_size")}  # fmt: skip
    assert facts == {
        "model": "small-phixtral", "family": "phixtral", "backend": "tensorrt-llm",
        "gpu": {"name": "Stand-in SM80", "sm": 80}, "max_sequence": 64, "max_batch": 32, "max_num_tokens": 8192,
        "kv_cache_fraction": 0.9, "tokenizer_size": 257,
    }  # fmt: skip
    assert found["precision"]["quant_algo"] == "W4A16"
    assert found["libraries"]["tensorrt_llm"] == "1.2.0"
    assert found["source"]["digests"].keys() == {"config.json", "model.safetensors"}
    config = json.loads((built_engine / "config.json").read_text())
    assert config["build_config"]["max_input_len"] == found["max_sequence"] - 1
    assert found["verification"] is None


def test_nothing_of_the_machine_is_in_the_manifest_but_what_the_user_named(small_phixtral, built_engine):
    """Its folders, its clock; the checkpoint is named as it was given."""
    found = manifest_of(built_engine)
    assert found["source"].pop("checkpoint") == str(small_phixtral)
    folders = (str(built_engine.parent), str(small_phixtral.parent), str(ROOT), str(Path.home()), sys.prefix)
    assert not [text for text in strings_in(found) if text.startswith("/") or any(name in text for name in folders)]
    assert not [text for text in strings_in(found) if re.search(r"20\d\d-\d\d|\d\d:\d\d", text)]


def test_the_same_build_gives_the_same_bytes(tmp_path, small_phixtral, built_engine, trtllm_build):
    again = build_trtllm(options_of(small_phixtral, tmp_path / "another name", until="engine")).engine
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == {
        path.name: path.read_bytes() for path in built_engine.iterdir()
    }


edit = edit_manifest


def cut(folder, name, size):
    with (folder / name).open("r+b") as file:
        file.truncate(size)


def flip(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)


def without(folder, name):
    files = manifest_of(folder)["files"]
    del files[name]
    edit(folder, files=files)


DAMAGES = {
    "no manifest": (lambda e: (e / "engine.json").unlink(), "there is no engine.json in it, which every engine"),
    "no JSON": (lambda e: (e / "engine.json").write_text("{"), r"engine.json is damaged \(Expecting property"),
    "a file is missing": (lambda e: (e / "rank0.engine").unlink(), "\n  - rank0.engine: missing"),
    "a file ends early": (lambda e: cut(e, "rank0.engine", 9), r"\n  - rank0.engine: found 9 bytes, expected \d+"),
    "a byte differs": (lambda e: flip(e, "rank0.engine"), r"\n  - rank0.engine: found SHA-256 \w{12}…, expected"),
    "a tokenizer differs": (lambda e: flip(e, "tokenizer.json"), "\n  - tokenizer.json: found SHA-256"),
    "another version": (lambda e: edit(e, format_version=1), "of format 1, expected 'tensorrt-llm' of format 2"),
    "another backend": (lambda e: edit(e, backend="onnxruntime"), "backend 'onnxruntime' of format 2, expected"),
    "an unknown key": (lambda e: edit(e, speed=3), "keys missing or unknown: speed"),
    "a rank is not listed": (lambda e: without(e, "rank0.engine"), r"files not listed: \['rank0.engine'\]"),
    "a file outside": (
        lambda e: edit(e, files={**manifest_of(e)["files"], "../x": {"bytes": 1, "sha256": None}}),
        r"files outside the folder: \['../x'\]",
    ),
    "too long sequences": (lambda e: edit(e, max_sequence=65), "max_sequence 65 or max_batch 32 is out of range"),
    "too many ids": (lambda e: edit(e, tokenizer_size=264), "tokenizer_size is 264, expected 1 to 263"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_refused(copied_engine, damage):
    assert open_trtllm_engine(copied_engine).manifest.precision.name == "int4"
    spoil, told = DAMAGES[damage]
    spoil(copied_engine)
    with pytest.raises(EngineError, match=told) as caught:
        open_trtllm_engine(copied_engine)
    assert f"opening the engine {copied_engine}: " in str(caught.value)
    assert re.search("build (it|the engine) again", str(caught.value))


def test_engines_of_the_other_backend_are_told_apart(tmp_path, built_engine, tiny_engine):
    with pytest.raises(EngineError, match=r"backend 'onnxruntime' of format \d, expected 'tensorrt-llm'"):
        open_trtllm_engine(tiny_engine)
    with pytest.raises(
        EngineError,
        match="its backend is tensorrt-llm, expected onnxruntime; moeship package and serve take it, and "
        "moeship verify does on a machine with a GPU",
    ):
        open_engine(built_engine)
    assert (engine_backend(built_engine), engine_backend(tiny_engine)) == ("tensorrt-llm", "onnxruntime")
    assert engine_backend(tmp_path) is None
    with pytest.raises(EngineError, match="no such folder, expected the folder of an engine; check the path"):
        open_trtllm_engine(tmp_path / "nowhere")


def test_a_flipped_bit_of_the_manifest_is_refused(copied_engine):
    path, draw = copied_engine / "engine.json", random.Random(5)
    data = path.read_bytes()
    passed = []
    for place, byte in enumerate(data):
        path.write_bytes(data[:place] + bytes([byte ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        try:
            open_trtllm_engine(copied_engine, check_digests=False)
            passed.append(place)
        except EngineError:
            assert engine_backend(copied_engine) is None
    assert passed == []


def test_a_manifest_without_its_digest_is_refused(copied_engine):
    values = manifest_of(copied_engine)
    del values["digest"]
    (copied_engine / "engine.json").write_text(json.dumps(values))
    with pytest.raises(EngineError, match="engine.json has no digest: it was edited or is damaged"):
        open_trtllm_engine(copied_engine)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"parallel": {"tp_size": 10**9, "pp_size": 1, "moe_tp_size": 1, "moe_ep_size": 1}}, "parallel.tp_size is 10"),
        ({"kv_cache_fraction": float("nan")}, "kv_cache_fraction is nan, expected a finite number"),
        ({"kv_cache_fraction": 1.5}, "kv_cache_fraction is 1.5, expected 0 to 1"),
        ({"max_num_tokens": 0}, "max_num_tokens is 0, expected 1 to"),
        ({"gpu": {"name": None, "sm": -90}}, "gpu.sm is -90, expected 1 to 1000"),
        ({"family": "x"}, "family is 'x', expected"),
        ({"left_out_experts": [1, 1]}, "left_out_experts are (1, 1), expected the numbers of experts, each once"),
        ({"left_out_experts": [-1]}, "left_out_experts are (-1,), expected the numbers of experts, each once"),
        (
            {"parallel": {"tp_size": 2, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2}},
            "parallel.moe_tp_size times moe_ep_size is not tp_size, 2",
        ),
        ({"eos_token_ids": [10**9]}, "eos_token_ids holds 1000000000, expected ids below"),
    ],
)
def test_values_that_no_engine_has_are_refused(copied_engine, changes, text):
    edit(copied_engine, **changes)
    with pytest.raises(EngineError, match=re.escape(text)):
        open_trtllm_engine(copied_engine)
