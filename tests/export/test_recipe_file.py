"""Recipe files: what they may say, and one clear error for each thing that they may not."""

from __future__ import annotations

import json

import pytest

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.errors import KernelsError, QuantizationError
from export.families import read_model
from export.provider import KERNELS, OWN_KERNELS, PROVIDERS
from export.quantize.recipe_file import read_recipe_file
from trt_build.ort.engine import open_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build

OWN, CPU, CUDA = KERNELS[OWN_KERNELS]["cpu"], PROVIDERS["cpu"], PROVIDERS["cuda"]


def written(folder, text, name="mine.yml"):
    path = folder / name
    path.write_text(text)
    return path


def checked(path, provider, checkpoint):
    table = read_model(open_checkpoint(checkpoint)).weights.table
    found = read_recipe_file(path, provider).for_model(table.values())
    found.check(table.values())
    return found, table


def test_a_file_begins_from_a_preset_and_changes_it(tmp_path, tiny_checkpoint):
    second = "{weight: second, layers: [0-1, -1], block: 64}"
    text = f"preset: int4\nrules:\n  - {{weight: qkv, bits: 6, block: 64}}\n  - {second}\n"
    found, table = checked(written(tmp_path, text), OWN, tiny_checkpoint)
    stored = {
        name: (found.storage(spec).bits, found.storage(spec).block_size)
        for name, spec in table.items() if found.storage(spec)
    }  # fmt: skip
    assert found.name == "mine"
    assert stored["transformer.h.1.mixer.Wqkv.weight"] == (6, 64)
    assert stored["transformer.h.1.mixer.out_proj.weight"] == (5, 32)
    assert {stored[f"transformer.h.{layer}.moe.mlp.fc2.weight"] for layer in range(3)} == {(4, 64)}
    assert stored["lm_head.linear.weight"] == (6, 32)


def test_json_says_the_same_as_yaml(tmp_path):
    values = {"name": "two", "default": {"bits": 3, "block": [64, 32]}, "rules": [{"role": "head", "bits": 8}]}
    of_json = read_recipe_file(written(tmp_path, json.dumps(values), "a.json"), OWN)
    of_yaml = read_recipe_file(written(tmp_path, json.dumps(values), "b.yaml"), OWN)
    assert of_json == of_yaml
    assert of_json.name == "two"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("default: {bits: 4, blocks: 64}", "default has the unknown key blocks, expected bits, block, symmetric"),
        ("default: {bits: 4}\nrule: []", "the recipe has the unknown key rule, expected name, default, rules"),
        ("default: {bits: 4, block: 64}\nrules: [{layer: 1}]", r"rules\[0\] has the unknown key layer, expected role"),
        ("default: {block: 64}", "default.bits is missing"),
        ("rules: []", "default is missing"),
        ("default: {bits: 7, block: 64}", "default.bits is 7, expected one of 2, 3, 4, 5, 6, 8, float"),
        ("default: {bits: true, block: 64}", "default.bits is True, expected one of"),
        ("default: {bits: 4, block: [64, 48]}", "default.block is 48, expected one of 32, 64, 128"),
        ("default: {bits: 4, block: 64, scales: half}", "default.scales is 'half', expected one of float16, float32"),
        ("default: {bits: 4, block: 64, method: awq}", "default.method is 'awq', expected one of nearest"),
        ("default: {bits: 4, block: 64, symmetric: 1}", "default.symmetric is 1, expected true or false"),
        ("default: {bits: 4, block: 64}\nrules: [{role: router, bits: 8}]", "role is router, expected one of embed"),
        ("default: {bits: 4, block: 64}\nrules: [{layers: 3-1}]", "layers is '3-1', expected numbers of layers"),
        ("default: {bits: 4, block: 64}\nrules: {a: 1}", "rules is .*, expected a list"),
        ("preset: q3\nrules: [{role: head}, {layer: 1}]", r"rules\[1\] has the unknown key layer"),
        ("preset: q9", "preset: 'q9' is unknown. There are: fp32"),
        ("preset: int4\ndefault: {bits: 4, block: 64}", "it has both preset and default, expected one of them"),
        ("[1]", r"found \[1\], expected a table with the keys name, preset, default, rules"),
        ("a: [", "is not readable YAML"),
        ("default: {bits: 4}\ndefault: {bits: 8}", "default stands twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, error):
    path = written(tmp_path, text)
    with pytest.raises(QuantizationError, match=error) as caught:
        read_recipe_file(path, OWN)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "provider", "error"),
    [
        ("preset: int4\nrules: [{weight: qkw, bits: 8}]", OWN,
         r"rule for weight qkw matches no matrix of this model, which has the roles embedding, attention, expert, "
         r"head, the weights qkv, out, first, second and the layers 0 to 2"),
        ("preset: int4\nrules: [{layers: [3], bits: 8}]", OWN, "rule for layers 3 matches no matrix"),
        ("default: {bits: 4, block: 128}", OWN,
         r"wte.weight by the recipe mine: its 192 input features are not a multiple of 128; take blocks of 32 or 64"),
        ("default: {bits: 3, block: 64}", CPU,
         r"found 3 bits, and the kernel of embedding weights, of onnxruntime on cpu, has 4, 8; add a rule for"),
        ("default: {bits: 4, block: 32}", CUDA, r"found 32, and .* of onnxruntime on cuda, has blocks of 64, 128"),
        ("default: {bits: 4, block: 64, scales: float16}", CPU, "found scales of float16, and .* takes float32"),
        ("preset: int4\nrules: [{role: expert, symmetric: false}]", OWN, "found symmetric false, and no method"),
    ],
)  # fmt: skip
def test_a_recipe_that_the_kernels_or_the_model_cannot_have_is_refused(
    tmp_path, tiny_checkpoint, text, provider, error
):
    with pytest.raises(QuantizationError, match=error):
        checked(written(tmp_path, text), provider, tiny_checkpoint)


@pytest.mark.parametrize(
    ("field", "error"),
    [
        ("bits: 8", "found 8 bits in blocks of 64 beside 4 bits in blocks of 64"),
        ("block: 32", r"one block size for .*fc1.weight and .*fc2.weight, found 64 and 32; give both the same"),
    ],
)
def test_onnx_runtimes_experts_have_one_storage(tmp_path, tiny_checkpoint, field, error):
    path = written(tmp_path, f"default: {{bits: 4, block: 64}}\nrules: [{{weight: second, {field}}}]")
    options = EngineOptions(checkpoint=str(tiny_checkpoint), recipe=path, kernels="onnxruntime")
    with pytest.raises(KernelsError, match=error):
        prepare_build(options)


@pytest.mark.parametrize("kernels", [None, "onnxruntime"])
@pytest.mark.parametrize("floats", ["first", "second"])
def test_one_matrix_of_experts_cannot_be_quantised_alone(tmp_path, tiny_checkpoint, kernels, floats):
    path = written(tmp_path, f"default: {{bits: 4, block: 64}}\nrules: [{{weight: {floats}, bits: float}}]")
    name = "fc1" if floats == "first" else "fc2"
    with pytest.raises(QuantizationError, match=f"found .*{name}.weight stored as floats and .* quantised, expected"):
        prepare_build(EngineOptions(checkpoint=str(tiny_checkpoint), recipe=path, kernels=kernels))


@pytest.mark.parametrize(
    ("text", "flags", "error"),
    [
        ("default: {bits: 9, block: 64}", [], "default.bits is 9"),
        ("preset: int4", ["--precision", "int8"], "not allowed with argument --recipe"),
        ("preset: int4", ["--backend", "tensorrt-llm"], "--recipe: for --backend onnxruntime only"),
    ],
)
def test_the_command_ends_with_2_and_one_error(tmp_path, tiny_checkpoint, capsys, text, flags, error):
    path = written(tmp_path, text)
    try:
        status = main(["plan", str(tiny_checkpoint), "--recipe", str(path), *flags])
    except SystemExit as ended:  # argparse's own
        status = ended.code
    assert status == 2
    assert error in capsys.readouterr().err


def test_plan_says_how_each_role_is_stored(tmp_path, tiny_checkpoint, capsys):
    path = written(tmp_path, "preset: int4\nrules: [{layers: [1], role: attention, bits: 8, block: 32}]")
    flags = ["--recipe", str(path), "--kernels", "onnxruntime", "--method", "search"]
    assert main(["plan", str(tiny_checkpoint), *flags]) == 0
    lines = {
        line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines() if " bits in" in line
    }
    assert lines["attention"] == "4, 8 bits in blocks of 32, 64, search"
    assert lines["expert"] == "4 bits in blocks of 64, search"


def test_an_engines_recipe_is_shown(tiny_engine, capsys):
    assert main(["inspect", str(tiny_engine)]) == 0
    shown = capsys.readouterr().out
    attention = {
        "moeship": "5 bits in blocks of 32, search: 5.50",
        "onnxruntime": "4 bits in blocks of 64, search: 4.50",
    }
    kernels = open_engine(tiny_engine, check_digests=False).manifest.kernels
    assert f"attention  {attention[kernels]} bits per weight" in shown
    assert "recipe int4\n  default  bits 4, block " in shown
    assert main(["inspect", str(tiny_engine), "--experts-per-token", "1"]) == 2
    assert "--experts-per-token is for checkpoints" in capsys.readouterr().err
