"""The first question: sound engines pass at every precision, and each seeded fault is found and named."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from conftest import QUANTIZABLE
from decoding import KINDS, each
from engine_faults import FAULTS, with_fault
from safetensors.numpy import load_file, save_file

from cli.verify import answer_lines
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.quantize.grid import SEARCH_VERSION, STRETCHES, block_scales, dequantize_blocks, quantize_blocks
from trt_build.comparison.limits import limits_of, proved_row_error
from trt_build.comparison.weights.bands import past_nearest, worse_scales
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.questions.weights import ask_about_weights

FOUND = [name for name, fault in FAULTS.items() if fault.at == "weights"]


def network(model):
    return model.family.network(model.weights.checkpoint.config)


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
@pytest.mark.parametrize(
    ("precision", "kernels", "provider"),
    each([*((*kind, "cpu") for kind in KINDS),
          *((precision, "onnxruntime", "cuda") for precision in ("fp16", "int8", "int4"))], apart=True),
)  # fmt: skip
def test_sound_engines_pass(built, family, precision, kernels, provider):
    engine, model = built(family, precision, kernels, provider)
    answer = ask_about_weights(engine, model)
    assert answer.failures == ()
    assert answer.figures["num_weights"] == sum(spec.num_elements for spec in model.weights.table.values())


# Each kind of file and each family once; ci/engine_faults.py asks all of them of the trained examples too.
@pytest.mark.parametrize(
    ("family", "precision", "kernels"),
    each(
        [
            ("small-phixtral", "fp32", "onnxruntime"),
            ("small-phixtral", "int4", "moeship"),
            ("mixtral", "int8", "onnxruntime"),
            ("small-phixtral", "q2", "moeship"),  # 2, 3 and 5 bits
            ("mixtral", "q3", "moeship"),  # 3, 4, 5 and 6 bits
        ],
        apart=True,
    ),
)
def test_each_fault_is_found(built, tmp_path, family, precision, kernels):
    engine, model = built(family, precision, kernels)
    missed = []
    for name in FOUND:
        if FAULTS[name].needs_bias and family == "mixtral":
            continue
        wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
        if ask_about_weights(wrong, model).passed:
            missed.append(name)
    assert missed == []


def of_search(engine, version):
    precision = dataclasses.replace(engine.manifest.precision, search=version)
    return dataclasses.replace(engine, manifest=dataclasses.replace(engine.manifest, precision=precision))


@pytest.mark.parametrize(
    "stretches", [dict.fromkeys(STRETCHES, (1.0,)), dict.fromkeys(STRETCHES, (1.0, 0.97, 0.94, 1.03))]
)
def test_engines_of_another_search_are_judged_by_what_holds_for_any(tmp_path, monkeypatch, stretches):
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=4, num_experts=2, experts_per_token=1, **QUANTIZABLE)
    model = read_model(open_checkpoint(folder))
    with monkeypatch.context() as another:
        another.setattr("export.quantize.grid.STRETCHES", stretches)
        engine = build_engine(BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision="int4"))
    assert engine.manifest.precision.search == SEARCH_VERSION
    assert not ask_about_weights(engine, model).passed
    answer = ask_about_weights(of_search(engine, SEARCH_VERSION + 1), model)
    assert answer.failures == ()
    assert "another version's search" in answer.figures["other_search"]
    assert "another version" in "".join(answer_lines([answer]))


def test_each_fault_of_an_engine_of_another_search_is_found(built, tmp_path):
    engine, model = built("small-phixtral", "int4", "moeship")
    engine = of_search(engine, SEARCH_VERSION + 1)
    wrong = (with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model)) for name in FOUND)
    assert [name for name, one in zip(FOUND, wrong, strict=True) if ask_about_weights(one, model).passed] == []


NAMED = {
    "an embedding row of zeros": ["embedding transformer.embd.wte.weight", "row 65", "found relative error 1,"],
    "two experts swapped": [
        "layer 1, expert, expert 0 transformer.h.1.moe.mlp.0.fc1.weight", "relative error 1.",
        "; from row 0 on they are nearer to layer 1, expert, expert 2 transformer.h.1.moe.mlp.2.fc1.weight (relative",
    ],
    "one expert's second times 1.05": ["expert 1 transformer.h.1.moe.mlp.1.fc2.weight", "1.05 times", "within 0.002"],
    "one bias of zero": ["layer 1, bias transformer.h.1.mixer.out_proj.bias, row 3: found 0, expected -0.", "exactly"],
    "one expert less in a layer": ["model_scoring.onnx: transformer.h.1.moe has k 1, expected 2"],
    "head bias dropped": ["lm_head.linear.bias"],
    "rotary base off by one": ["rotary/cos_cache at position 1", "for base 10000 and width 16"],
    "another layer's norm": ["transformer.h.1.ln.weight is taken by no node"],
}  # fmt: skip


@pytest.mark.needs_kernels
def test_a_failure_names_what_is_wrong_where(built, tmp_path):
    engine, model = built("phixtral", "int4", "moeship")
    for name, words in NAMED.items():
        wrong = with_fault(engine, tmp_path / "wrong", FAULTS[name], network(model))
        text = re.sub(r"1\.04[5-9]\d", "1.05", "\n".join(ask_about_weights(wrong, model).failures))
        assert [word for word in words if word not in text] == [], text


def test_graphs_that_disagree_about_a_place_are_found(built, tmp_path):
    engine, model = built("phixtral", "int8", "onnxruntime")

    def move(files):
        for tensor in files.models["model_serving.onnx"].graph.initializer:
            if tensor.name == "transformer.h.0.ln.bias":
                other = next(t for t in files.models["model.onnx"].graph.initializer if t.name == "lm_head.ln.bias")
                for entry, theirs in zip(tensor.external_data, other.external_data, strict=True):
                    entry.value = theirs.value

    fault = dataclasses.replace(FAULTS["norm times 1.03"], edit=move)
    failures = ask_about_weights(with_fault(engine, tmp_path / "wrong", fault, network(model)), model).failures
    assert [text.partition(" at byte")[0] for text in failures] == [
        "model_serving.onnx: the initializer transformer.h.0.ln.bias is float32 [192]"
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_rounding_to_the_nearest_never_passes_the_proved_error_of_a_row(bits, block):
    rng = np.random.default_rng(0)
    rows = rng.standard_t(1, (256, 4 * block)).astype(np.float32)
    half_steps = np.full((1, block), 0.5, np.float32)  # the worst: all but the largest lie between two steps
    half_steps[0, 0] = -(2 ** (bits - 1))
    worst = 0.0
    for values in (rows, half_steps):
        codes, scales = quantize_blocks(values, bits, block)
        error = dequantize_blocks(codes, scales, bits) - values
        worst = max(worst, (np.linalg.norm(error, axis=1) / np.linalg.norm(values, axis=1)).max())
    assert worst <= proved_row_error(bits, block) == limits_of(bits, block).row
    # Where codes are few, other scales help here.
    assert worst > {2: 0.45, 3: 0.35, 4: 0.55}.get(bits, 0.7) * proved_row_error(bits, block)


@pytest.mark.needs_kernels
def test_scales_too_small_for_float16_are_no_fault(tmp_path):
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=4, num_experts=2, experts_per_token=1, **QUANTIZABLE)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.moe.mlp.0.fc1.weight"][5] *= np.float32(1e-7)
    save_file(tensors, folder / "model.safetensors")
    engine = build_engine(BuildOptions(checkpoint=str(folder), output=tmp_path / "e", kernels="moeship"))
    assert ask_about_weights(engine, read_model(open_checkpoint(folder))).failures == ()


def test_small_scales_that_are_rounded_after_the_codes_are_no_fault(tmp_path):
    """Engines for CUDA round scales to float16 once the codes are computed, and so does what they are judged by."""
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=4, num_experts=2, experts_per_token=1, **QUANTIZABLE)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.moe.mlp.0.fc1.weight"][5::8] *= np.float32(1e-5)
    save_file(tensors, folder / "model.safetensors")
    options = BuildOptions(
        checkpoint=str(folder), output=tmp_path / "e", precision="int4", kernels="onnxruntime", provider="cuda"
    )
    assert ask_about_weights(build_engine(options), read_model(open_checkpoint(folder))).failures == ()


def test_scales_that_are_the_recipes_are_not_searched_for_again():
    rows = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    codes, scales = quantize_blocks(rows, 4, 64, half_scales=True)
    units, asked = np.abs(rows.reshape(64, 16, 64)).max(axis=2) / 8, []

    def again(blocks):
        asked.append(len(blocks))
        return dequantize_blocks(*quantize_blocks(blocks, 4, 64, half_scales=True), 4)

    def worse(own_codes, own_scales):
        found = dequantize_blocks(own_codes, own_scales, 4)
        return worse_scales(
            found, rows, own_scales, units, lambda b: block_scales(b, 4, 64, half_scales=True)[:, 0], again
        )

    assert worse(codes, scales).max() == 0
    assert asked == []
    # Codes that are the nearest for the plain scale of the largest value: what the recipe's search would not have kept.
    plain_codes, plain = quantize_blocks(rows, 4, 64, half_scales=True, nearest=True)
    plain_error, best_error = (
        ((dequantize_blocks(*both, 4) - rows) ** 2).reshape(64, 16, 64).sum(axis=2)
        for both in ((plain_codes, plain), (codes, scales))
    )
    wrong = np.argwhere(plain_error > 1.2 * best_error)[0]
    codes.reshape(64, 16, 64)[tuple(wrong)] = plain_codes.reshape(64, 16, 64)[tuple(wrong)]
    scales[tuple(wrong)] = plain[tuple(wrong)]
    assert np.flatnonzero(worse(codes, scales) > limits_of(4, 64).scale).tolist() == [wrong[0]]
    assert asked == [1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("half_scales", [False, True])
def test_one_code_and_one_scale_show_in_a_large_matrix(bits, half_scales):
    """Beside 4,095 others of its row neither shows in a sum over rows or bands."""
    rows = np.random.default_rng(1).standard_normal((64, 4096)).astype(np.float32)
    codes, scales = quantize_blocks(rows, bits, 64, half_scales=half_scales)
    units = np.abs(rows.reshape(64, 64, 64)).max(axis=2) / 2 ** (bits - 1)
    limits = limits_of(bits, 64)

    def worse():
        def sound_scales(blocks):
            return block_scales(blocks, bits, 64, half_scales=half_scales)[:, 0]

        def again(blocks):
            return dequantize_blocks(*quantize_blocks(blocks, bits, 64, half_scales=half_scales), bits)

        return worse_scales(dequantize_blocks(codes, scales, bits), rows, scales, units, sound_scales, again)

    assert past_nearest(dequantize_blocks(codes, scales, bits), rows, scales, bits).max() <= limits.code
    assert worse().max() <= limits.scale
    codes[3, 100] ^= 1
    scales[5, 7] *= np.float32(1.01 if bits > 3 else 1.05)
    scales[9] = -scales[9]
    past = past_nearest(dequantize_blocks(codes, scales, bits), rows, scales, bits)
    assert past[3] > limits.code
    assert {5, 9} <= set(np.flatnonzero(worse() > limits.scale).tolist()) <= {3, 5, 9}
