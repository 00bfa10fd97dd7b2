"""engine.json says what was built: no bit of it changes unnoticed, and what it says is checked before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import time

import pytest

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.provider import KERNELS
from export.quantize.presets import preset
from tests.manifests import edit_manifest, read_values, write_values
from trt_build.comparison.parity import THRESHOLDS
from trt_build.engine_files import FileRecord, check_file_records
from trt_build.errors import EngineError
from trt_build.ort.engine import StoredRole, open_engine, record_verification, write_manifest


@pytest.fixture
def engine(tmp_path, tiny_engine):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def refused(folder):
    with pytest.raises(EngineError) as caught:
        open_engine(folder, check_digests=False)
    return str(caught.value)


def test_a_flipped_bit_anywhere_is_refused(engine):
    path, draw = engine / "engine.json", random.Random(3)
    data = path.read_bytes()
    passed = []
    for place, byte in enumerate(data):
        path.write_bytes(data[:place] + bytes([byte ^ 1 << draw.randrange(8)]) + data[place + 1 :])
        try:
            open_engine(engine, check_digests=False)
            passed.append(place)
        except EngineError:
            continue
    assert passed == []


def test_every_value_that_is_edited_is_refused(engine):
    values = json.loads((engine / "engine.json").read_text())
    edits = {"expert_order": values["expert_order"][::-1], "max_sequence": 600, "verification": {"failures": []}}
    for key, value in edits.items():
        (engine / "engine.json").write_text(json.dumps({**values, key: value}, indent=2) + "\n")
        assert f"{engine / 'engine.json'} was edited or is damaged: found the digest '" in refused(engine)
    (engine / "engine.json").write_text(json.dumps(values))  # the same values, written otherwise
    assert "was edited or is damaged" in refused(engine)


@pytest.mark.parametrize("digest", [None, "", 7, ["0" * 64], "0" * 64])
def test_a_digest_of_another_kind_is_none(engine, digest):
    values = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**values, "digest": digest}, indent=2) + "\n")
    assert "was edited or is damaged" in refused(engine)


def test_a_missing_digest_is_told(engine):
    values = read_values(engine)
    (engine / "engine.json").write_text(json.dumps(values, indent=2) + "\n")
    assert "engine.json has no digest: it was edited or is damaged; put back the file" in refused(engine)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "there is no engine.json in it, which every engine has; check the path, and if it is an engine"),
        (b"\x80\x81", "engine.json is damaged (byte 0 is not UTF-8)"),
        (b"\xef\xbb\xbf{}", "engine.json is damaged (Unexpected UTF-8 BOM"),
        (b"", "engine.json is damaged (Expecting value"),
        (b"null", "engine.json is damaged (it holds null, expected an object)"),
        (b"[1]", "engine.json is damaged (it holds a list, expected an object)"),
        (b"true", "engine.json is damaged (it holds true or false, expected an object)"),
    ],
    ids=str,
)
def test_every_damage_has_the_same_remedy_and_is_a_problem_to_doctor(engine, capsys, content, found):
    if content is None:
        (engine / "engine.json").unlink()
    else:
        (engine / "engine.json").write_bytes(content)
    message = refused(engine)
    assert message.startswith(f"opening the engine {engine}: ")
    assert found in message
    assert message.endswith("put back the file that the build or verify wrote, or build the engine again")
    assert main(["doctor", str(engine), "--json"]) == 1
    assert message in json.loads(capsys.readouterr().out)["problems"]


def test_a_path_that_is_no_engine_is_told_by_what_is_there(tmp_path):
    (tmp_path / "file").write_text("{}")
    for name, found in (("absent", "no such folder"), ("file", "it is a file")):
        with pytest.raises(EngineError, match=f"{name}: {found}, expected the folder of an engine; check the path"):
            open_engine(tmp_path / name)
    with pytest.raises(
        EngineError, match=r"there is no engine.json in it, .* check the path, and .* build the engine again"
    ):
        open_engine(tmp_path)


def test_a_manifest_of_format_2_is_read_without_a_digest_and_written_back_so(tmp_path, tiny_engines):
    engine = shutil.copytree(tiny_engines("int4", kernels="onnxruntime"), tmp_path / "engine")
    values = read_values(engine)
    values |= {"format_version": 2, "stages": ["model.onnx"], "kernel_layout": None}
    del values["tokenizer"], values["kernels"]
    write_values(engine, values)
    assert "digest" not in json.loads((engine / "engine.json").read_text())
    record_verification(open_engine(engine), {"failures": ["perplexity"]})
    assert json.loads((engine / "engine.json").read_text()) == {**values, "verification": {"failures": ["perplexity"]}}
    assert open_engine(engine).manifest.verification == {"failures": ["perplexity"]}
    (engine / "engine.json").write_text(json.dumps({**values, "digest": None}))
    assert "was edited or is damaged" in refused(engine)


def test_the_digest_covers_what_verify_writes(engine):
    record_verification(open_engine(engine), {"mean_kl": 0.25, "failures": []})
    assert open_engine(engine).manifest.verification == {"mean_kl": 0.25, "failures": []}
    text = (engine / "engine.json").read_text()
    (engine / "engine.json").write_text(text.replace("0.25", "0.05"))
    assert "was edited or is damaged" in refused(engine)


def test_a_result_is_not_written_over_another_engines_manifest(engine):
    opened = open_engine(engine)
    edit_manifest(engine, model="another")
    with pytest.raises(EngineError, match="it changed since it was read; verify again when no other process writes"):
        record_verification(opened, {"failures": []})
    assert open_engine(engine).manifest.model == "another"


def test_writing_gives_the_same_bytes_again(engine):
    before = (engine / "engine.json").read_bytes()
    write_manifest(engine, open_engine(engine).manifest)
    assert (engine / "engine.json").read_bytes() == before


def test_a_file_of_no_bytes_may_be_listed():
    digest = hashlib.sha256(b"").hexdigest()
    check_file_records({"empty.txt": FileRecord(bytes=0, sha256=digest)}, ["empty.txt"])
    with pytest.raises(ValueError, match=r"files.empty.txt: it has -1 bytes"):
        check_file_records({"empty.txt": FileRecord(bytes=-1, sha256=digest)}, ["empty.txt"])


def architecture(**changes):
    return lambda values: {"architecture": {**values["architecture"], **changes}}


def precision(**changes):
    return lambda values: {"precision": {**values["precision"], **changes}}


def recipe(**changes):
    return lambda values: precision(recipe={**values["precision"]["recipe"], **changes})(values)


def tokenizer(**changes):
    return lambda values: {"tokenizer": {**values["tokenizer"], **changes}}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (architecture(norm_epsilon=float("nan")), "architecture.norm_epsilon is nan, expected a finite number"),
        (architecture(norm_epsilon=-1e-5), "norm_epsilon is -1e-05"),
        (architecture(rope_base=10**400), "architecture.rope_base is a whole number of 1329 bits, expected a finite"),
        (architecture(num_experts=10**9), "num_experts is 1000000000"),
        (architecture(num_experts=10**7), "num_experts is 10000000"),
        (architecture(num_layers=10**6), "num_layers is 1000000"),
        (architecture(head_size=0), "head_size is 0"),
        (architecture(num_kv_heads=-1), "num_kv_heads is -1"),
        (architecture(num_kv_heads=4), "architecture.num_heads is 6, expected a multiple of num_kv_heads"),
        (precision(accuracy_level=5), "precision.accuracy_level is 5, expected 0 to 4"),  # MatMulNBits has five
        (recipe(rules=[{"bits": 7}]), "rules[0].bits is 7, expected one of 2, 3, 4, 5, 6, 8, float"),
        (recipe(default={"bit": 4}), "default has the unknown key bit, expected bits, block"),
        (recipe(default={"block": [64]}), "default.bits is missing"),
        (architecture(experts_per_token=6), "architecture.experts_per_token is 6, expected 1 to 5"),
        (architecture(experts_per_token=0), "architecture.experts_per_token is 0, expected 1 to 5"),
        (architecture(rotary_dim=0), "architecture.rotary_dim is 0, expected 2 to"),
        (architecture(rotary_dim=3), "architecture.rotary_dim is 3, expected an even number"),
        (architecture(family="../x"), "family is 'phixtral', expected '../x', as in architecture"),
        (tokenizer(bos_token_id=-1), "tokenizer.bos_token_id holds -1, expected token ids"),
        (tokenizer(pad_token_id=10**4000), "tokenizer.pad_token_id holds a whole number of 13288 bits"),
        (tokenizer(begins_with=[2, 10**30]), "tokenizer.begins_with holds 1000000000"),
        (tokenizer(ends_with=[-5]), "tokenizer.ends_with holds -5"),
        (tokenizer(added_tokens=[{"id": -1, "content": "x", "special": True}]), "tokenizer.added_tokens holds -1"),
        (tokenizer(model_max_length=0), "tokenizer.model_max_length is 0, expected 1 to"),
        (lambda values: {"expert_order": [0, 1, 2, 3, 3]}, "expert_order is (0, 1, 2, 3, ...), expected each of 5"),
        (lambda values: {"expert_order": [0, 1, 2, 3, True]}, "expert_order[4] is True, expected int"),
        (lambda values: {"eos_token_ids": [10**6]}, "eos_token_ids holds 1000000, expected ids below"),
        (lambda values: {"max_batch": 0}, "max_batch is 0, expected 1 to 65536"),
        (lambda values: {"max_batch": 1.0}, "max_batch is 1.0, expected int"),
        (lambda values: {"tokenizer": None}, "tokenizer is missing"),
        (lambda values: {"stages": ["model.onnx"]}, "keys missing or unknown: stages"),
        (lambda values: {"kernels": "mlas"}, "kernels is 'mlas', expected one of onnxruntime, moeship"),
        (lambda values: {"format_version": 3}, "keys missing: "),
        (
            lambda values: {"files": {**values["files"], "a/../../x": {"bytes": 1, "sha256": "0" * 64}}},
            "files outside the folder: ['a/../../x']",
        ),
        (
            lambda values: {"files": {**values["files"], "tokenizer.json": {"bytes": 1, "sha256": "zz"}}},
            "files.tokenizer.json.sha256 is 'zz', expected a SHA-256",
        ),
        (
            lambda values: {"files": {name: record for name, record in values["files"].items() if name[0] != "w"}},
            "files not listed: ['weights.jsonl']",
        ),
    ],
)  # fmt: skip
def test_values_that_no_engine_has_are_refused_at_once(engine, change, text):
    values = read_values(engine)
    write_values(engine, {**values, **change(values)})
    started = time.process_time()
    message = refused(engine)
    assert time.process_time() - started < 1
    assert text in message
    assert "engine.json is malformed (" in message


def test_a_key_that_stands_twice_is_refused(engine):
    text = (engine / "engine.json").read_text()
    (engine / "engine.json").write_text(text.replace('{\n  "format_version"', '{\n  "model": "x",\n  "format_version"'))
    assert "the key 'model' occurs twice in one object" in refused(engine)


def test_an_engine_with_bits_by_role_in_place_of_a_recipe_is_read(engine, tiny_checkpoint):
    values = read_values(engine)
    bits = {"attention": 4, "ffn": 4, "expert": 4, "embedding": 8, "head": 8}
    own = {name: values["precision"][name] for name in ("name", "accuracy_level", "average_bits_per_weight")}
    write_values(engine, {**values, "precision": {**own, "bits": bits, "block_sizes": [64]}})
    manifest = open_engine(engine, check_digests=False).manifest
    assert manifest.precision.quantises
    assert {role: stored.bits for role, stored in manifest.precision.roles.items()} == {
        role: (number,) for role, number in bits.items()
    }
    for spec in read_model(open_checkpoint(tiny_checkpoint)).weights.table.values():
        found = manifest.recipe().storage(spec)
        expected = bits.get(str(spec.role))
        assert (found and (found.bits, found.block_size)) == (expected and (expected, 64))
    assert manifest.judged_as == "int4"


@pytest.mark.parametrize(
    ("kernels", "tokens", "names_methods", "expected"),
    [
        ("onnxruntime", None, True, "int4"),
        ("onnxruntime", 4096, True, "int4, solved"),
        ("moeship", None, True, "int4, moeship's kernels"),
        ("moeship", 4095, True, "int4, moeship's kernels"),
        ("moeship", 4096, True, "int4, moeship's kernels, solved"),
        ("moeship", None, False, "int4"),  # of an earlier recipe, which had 4 bits in every layer
    ],
)
def test_the_limits_of_int4_hang_on_kernels_and_on_solved_codes(tiny_engine, kernels, tokens, names_methods, expected):
    manifest = open_engine(tiny_engine, check_digests=False).manifest
    recipe = {"name": "int4", **preset("int4", KERNELS[kernels]["cpu"])}
    roles = manifest.precision.roles
    roles = roles if names_methods else {role: dataclasses.replace(one, methods=()) for role, one in roles.items()}
    manifest = dataclasses.replace(
        manifest, kernels=kernels, calibration=None if tokens is None else {"tokens": tokens},
        precision=dataclasses.replace(manifest.precision, recipe=recipe, roles=roles),
    )  # fmt: skip
    assert manifest.judged_as == "int4"
    assert manifest.thresholds is THRESHOLDS[expected]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "int4"),
        ({"recipe": {"method": "gptq"}}, "int4"),
        ({"recipe": {"bits": 3}}, "4 bits"),
        ({"name": "mine"}, "4 bits"),
        ({"roles": {"head": {"bits": [2]}}}, "int4"),
        ({"name": "mine", "roles": {"head": {"bits": [2]}}}, "2 bits"),
    ],
)
def test_an_engine_is_judged_as_its_preset_or_by_its_fewest_bits(tiny_engine, change, expected):
    manifest = open_engine(tiny_engine, check_digests=False).manifest
    precision = manifest.precision
    recipe = {**precision.recipe, "default": {**precision.recipe["default"], **change.get("recipe", {})}}
    recipe["name"] = change.get("name", "int4")
    roles = {name: StoredRole(bits=tuple(one["bits"])) for name, one in change.get("roles", {}).items()}
    other = dataclasses.replace(precision, name=recipe["name"], recipe=recipe, roles={**precision.roles, **roles})
    assert dataclasses.replace(manifest, precision=other).judged_as == expected
