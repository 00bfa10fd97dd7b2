"""Engines for moeship's own CPU kernels: what they hold, that any instruction set gives the same, and what is refused.

Parity, ties, plans and memory of them are in the tests of every kind of engine.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from kernel_nodes import levels
from onnx.external_data_helper import load_external_data_for_model
from safetensors.numpy import load_file, save_file

from ci.kill_builds import compare
from cli.main import main
from clients.generation import Client, GenerationRequest
from export.errors import QuantizationError
from export.quantize.grid import quantize_blocks
from export.quantize.layout import MatrixLayout
from export.tokenizer.loading import load_tokenizer
from tests.manifests import edit_manifest
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.errors import EngineError
from trt_build.ort import kernels
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

PROMPT = [11, 5, 300, 42, 7, 8, 9, 150]
GRAPHS = ("model.onnx", "model_serving.onnx", "model_scoring.onnx")


def build(checkpoint, output, progress=None, **options):
    options = {"kernels": "moeship", **options}
    return build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, **options), progress)


def interrupt(progress):
    if progress.parts >= 9:
        raise KeyboardInterrupt


def graph_of(folder, name="model.onnx", *, weights=False):
    model = onnx.load(str(folder / name), load_external_data=False)
    if weights:
        load_external_data_for_model(model, str(folder))
    return model


@pytest.fixture
def copies(tmp_path, tiny_engines):
    return lambda precision="int4": Path(
        shutil.copytree(tiny_engines(precision, kernels="moeship"), tmp_path / precision)
    )


def logits(folder):
    session = Session(open_engine(folder, check_digests=False))
    cache = session.new_cache()
    return [session.run(cache, ids).copy() for ids in (PROMPT, [3], [99])]


def edit_graph(folder, edit):
    """Change the serving graph; sizes are put right."""
    model = graph_of(folder, "model_serving.onnx")
    edit(model)
    (folder / "model_serving.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "engine.json").read_text())
    manifest["files"]["model_serving.onnx"]["bytes"] = (folder / "model_serving.onnx").stat().st_size
    edit_manifest(folder, files=manifest["files"])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_quantised_matrix_is_of_the_kernels_in_all_graphs(tiny_engines, precision):
    folder = tiny_engines(precision, kernels="moeship")
    manifest = open_engine(folder).manifest
    assert manifest.kernels == "moeship"
    assert manifest.expert_order == (0, 1, 2, 3, 4)
    assert {path.name for path in folder.glob("*.onnx")} == set(GRAPHS)
    for name in GRAPHS:
        model = graph_of(folder, name)
        operators = [node.op_type for node in model.graph.node if node.domain == "moeship"]
        counts = {operator: operators.count(operator) for operator in operators}
        assert counts == {"BlockLinear": 3 * 2 + 1, "Experts": 3, "Embedding": 1}
        assert not {"MatMulNBits", "QMoE", "GatherBlockQuantized"} & {node.op_type for node in model.graph.node}
        assert {opset.domain: opset.version for opset in model.opset_import}["moeship"] == 1
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert int(entries.get("offset", 0)) % 256 == 0


@pytest.mark.parametrize(("precision", "bits", "layer"), [("int8", 8, 2), ("int4", 4, 1), ("int4", 5, 2)])
def test_stored_experts_are_the_checkpoints_in_its_order_rounded_for_the_scales_that_are_stored(
    tiny_checkpoint, copies, precision, bits, layer
):
    block = 32
    found = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph_of(copies(precision), weights=True).graph.initializer
    }
    outside, name = load_file(tiny_checkpoint / "model.safetensors"), f"transformer.h.{layer}.moe.mlp.fc1.weight"
    assert found[f"{name}.scales"].dtype == np.float16
    for expert in range(5):
        values = outside[f"transformer.h.{layer}.moe.mlp.{expert}.fc1.weight"]
        layout = MatrixLayout(rows=values.shape[0], features=values.shape[1], bits=bits, block_size=block)
        codes = layout.unpack_codes(found[f"{name}.codes"][expert]).astype(int) - (1 << (bits - 1))
        scales = np.repeat(layout.unpack_scales(found[f"{name}.scales"][expert]).astype(np.float32), block, axis=1)
        # No other code is nearer: off by half a scale at the most, but for what lies past the grid's ends.
        ends = (codes == -(1 << (bits - 1))) | (codes == (1 << (bits - 1)) - 1)
        assert ends.mean() < 0.15
        errors = np.abs(codes * scales - values)
        assert (errors <= 0.5001 * np.abs(scales))[~ends].all()
        assert np.std(errors) < {8: 0.006, 5: 0.05, 4: 0.1}[bits] * np.std(values)


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_half_scales_are_the_nearest_to_what_the_stored_scale_can_say(bits, magnitude):
    values = (np.random.default_rng(3).standard_t(4, (64, 64)) * magnitude).astype(np.float32)
    codes, scales = quantize_blocks(values, bits, 32, half_scales=True)
    np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)
    half, blocks = 1 << (bits - 1), values.reshape(64, 2, 32)
    steps = np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] != 0)
    found = codes.reshape(blocks.shape).astype(int) - half
    assert np.abs(found - np.clip(steps, -half, half - 1)).max() <= 0.5001
    if magnitude == 1.0:
        # A float16 has 11 bits: against float32 scales the error grows by less than a hundredth.
        plain, exact = quantize_blocks(values, bits, 32)
        errors = [
            np.square((c.reshape(blocks.shape) - float(half)) * s[..., None] - blocks).sum()
            for c, s in ((codes, scales), (plain, exact))
        ]
        assert errors[0] <= 1.01 * errors[1]


@pytest.mark.needs_kernels
def test_every_instruction_set_gives_the_same_logits_bit_for_bit(tiny_engines, monkeypatch):
    found = {}
    for level in levels():
        monkeypatch.setenv(kernels.LEVEL_VARIABLE, level)
        found[level] = logits(tiny_engines("int4", kernels="moeship"))
    for level, others in found.items():
        for one, other in zip(found["plain"], others, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=level)


def test_two_builds_of_one_checkpoint_are_equal_byte_for_byte_also_when_one_was_interrupted(
    tmp_path, tiny_checkpoint, tiny_engines
):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        build(tiny_checkpoint, tmp_path / "engine", interrupt)
    build(tiny_checkpoint, tmp_path / "engine", seen.append)
    assert seen[0].resumed_parts == 9
    compare(tmp_path / "engine", tiny_engines("int4", kernels="moeship"))


def test_an_interrupted_build_with_the_other_kernels_is_not_taken_up(tmp_path, tiny_checkpoint, tiny_engines, caplog):
    with pytest.raises(KeyboardInterrupt):
        build(tiny_checkpoint, tmp_path / "engine", interrupt, kernels="onnxruntime")
    build(tiny_checkpoint, tmp_path / "engine")
    assert "kernels: found moeship, it was onnxruntime" in caplog.text
    compare(tmp_path / "engine", tiny_engines("int4", kernels="moeship"))


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--precision", "fp32"], "kernels of moeship multiply quantised matrices, found fp32, expected int8 or int4"),
        (["--precision", "fp16"], "kernels of moeship multiply quantised matrices, found fp16, expected int8 or int4"),
        (["--provider", "cuda"], "the kernels of moeship are for the provider cpu, found cuda; leave"),
        (["--kernels", "mlas"], "choosing the kernels: 'mlas' is unknown. There are: onnxruntime, moeship"),
        (["--backend", "tensorrt-llm"], "reading the flags: --kernels: for --backend onnxruntime only; leave them out"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_refused_by_name(tmp_path, tiny_checkpoint, capsys, command, words, text):
    output = tmp_path / "engine"
    flags = ["--checkpoint", str(tiny_checkpoint), "--output", str(output), "--kernels", "moeship", *words]
    assert main(["-q", command, *flags]) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_weight_beyond_float16s_scales_is_refused(tmp_path, tiny_checkpoint):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.h.1.mixer.out_proj.weight"][2, 5] = 3e6
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(
        QuantizationError, match=r"h\.1\.mixer\.out_proj\.weight: .* beyond float16's 65504; .* --kernels onnxruntime"
    ):
        build(checkpoint, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_scales_too_small_for_float16_are_told_once_of_each_matrix_also_by_the_run_that_resumes(
    tmp_path, tiny_checkpoint, caplog
):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    weight = tensors["transformer.h.0.mixer.Wqkv.weight"]
    weight[3] *= 1e-6 / np.abs(weight[3]).max()  # a row of 192 features: 6 blocks of 32
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, tmp_path / "engine", interrupt)
    engine = build(checkpoint, tmp_path / "engine")
    found = [line for line in caplog.messages if "float16" in line]
    assert len(found) == 1
    assert re.match(
        r"quantising transformer\.h\.0\.mixer\.Wqkv\.weight: 6 of 3456 blocks .* by up to \d+\.\d%", found[0]
    )
    assert "float16" not in (engine.folder / "weights.jsonl").read_text()
    caplog.clear()
    build(checkpoint, tmp_path / "onnxruntime", kernels="onnxruntime")
    assert "float16" not in caplog.text


@pytest.mark.needs_kernels
def test_an_unknown_layout_version_is_refused(copies):
    folder = copies()

    def edit(model):
        [attribute] = [a for a in model.graph.node[-2].attribute if a.name == "layout"]
        attribute.i = 2

    edit_graph(folder, edit)
    with pytest.raises(EngineError, match="found layout 2, expected 1; export the engine again"):
        logits(folder)


@pytest.mark.needs_kernels
def test_weights_of_another_shape_are_refused(copies):
    folder = copies()

    def edit(model):
        first, second = (
            next(t for t in model.graph.initializer if t.name == f"transformer.h.0.mixer.{name}.weight.codes")
            for name in ("Wqkv", "out_proj")
        )
        first.name, second.name = second.name, first.name

    edit_graph(folder, edit)
    with pytest.raises(EngineError, match="the codes' tensor has the shape"):
        logits(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernels": "mlas"}, "kernels is 'mlas', expected one of onnxruntime, moeship"),
        ({"provider": "cuda"}, "provider is 'cuda', expected one of cpu"),
    ],
    ids=str,
)
def test_a_manifest_that_says_what_no_such_engine_has_is_refused(copies, change, text):
    folder = copies()
    edit_manifest(folder, **change)
    with pytest.raises(EngineError) as caught:
        open_engine(folder)
    assert text in str(caught.value)


def test_a_manifest_that_names_the_other_kernels_does_not_load_the_graph(copies):
    folder = copies()
    edit_manifest(folder, kernels="onnxruntime")
    with pytest.raises(EngineError, match="refuses it"):
        logits(folder)


def test_genai_is_told_the_librarys_name_and_no_folder_of_this_machine(tiny_engines):
    config = json.loads((tiny_engines("int4", kernels="moeship") / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == kernels.LIBRARY_FILE
    config = json.loads((tiny_engines("int4", kernels="onnxruntime") / "genai_config.json").read_text())
    assert "custom_ops_library" not in config["model"]["decoder"]["session_options"]


def test_genai_says_which_library_it_does_not_find(tiny_engines):
    import onnxruntime_genai as genai

    with pytest.raises(Exception, match=r"moeship_kernels\.so: cannot open shared object file"):
        genai.Model(str(tiny_engines("int4", kernels="moeship")))


@pytest.mark.needs_kernels
def test_triton_serves_the_sessions_greedy_tokens(tmp_path, tiny_engines):
    engine = tiny_engines("int4", kernels="moeship")
    package_engine(PackageOptions(engine=engine, name="own", output=tmp_path / "repository"))
    with running_server(ServerOptions(repository=tmp_path / "repository")) as server, Client(server.grpc_url) as client:
        answer = client.generate(GenerationRequest(model="own", prompt="def main(", max_tokens=24, end_id=-1))
    session, ids, expected = Session(open_engine(engine)), load_tokenizer(engine).encode_prompt("def main("), []
    cache = session.new_cache()
    for _ in range(24):  # the server gives no id that the tokenizer has not
        expected.append(int(session.run(cache, ids)[: session.engine.manifest.tokenizer_size].argmax()))
        ids = expected[-1:]
    assert list(answer.token_ids) == expected
