"""Engines of dense Mistrals, Llamas and Qwens against transformers' own classes, and what cannot be built of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from cuda_kernels import check_types
from decoding import KINDS, each
from dense_checkpoints import write_dense_checkpoint
from torch_reference import ByTransformers
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, ExportError
from export.families import read_model
from export.reference.model import Reference
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine

CLASSES = {
    "mistral": MistralForCausalLM, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM,
}  # fmt: skip
LATE_WINDOW = {"use_sliding_window": True, "sliding_window": 23, "max_window_layers": 1}  # the second layer has it
CONFIGS = {"mistral": {"sliding_window": 23}, "qwen2": LATE_WINDOW, "qwen3": LATE_WINDOW}
TOKENS = np.random.default_rng(3).integers(0, 365, 120).tolist()
SIZES = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 192}


def write(folder, family, **more):
    return write_dense_checkpoint(folder, seed=4, family=family, config=CONFIGS.get(family, {}), **SIZES | more)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("kind", each(KINDS))
def test_an_engine_gives_the_logits_of_transformers_class(tmp_path, family, kind):
    folder = write(tmp_path / "c", family)
    options = BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision=kind[0], kernels=kind[1])
    engine = build_engine(options)
    theirs = CLASSES[family].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    report = verify.compare(engine, ByTransformers(theirs), [TOKENS], lambda _: None)
    assert report.num_decoded_tokens == len(TOKENS) // 2
    if kind[0] == "fp32":
        with torch.no_grad():
            largest = float(theirs(torch.tensor([TOKENS])).logits.abs().max())
        assert max(report.max_logit_difference, report.max_decoded_difference) <= 1e-4 * largest
        assert report.failures(parity.THRESHOLDS["fp32"]) == []
    else:
        assert report.mean_kl <= {"int8": 1e-3, "int4": 0.2}[kind[0]]


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 5, "num_kv_heads": 1, "hidden_size": 80, "ffn_size": 37, "tied": True},
        {"num_heads": 6, "num_kv_heads": 3, "hidden_size": 96, "num_layers": 3, "dtype": "bfloat16"},
    ],
    ids=["tied", "bfloat16"],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwens_engine_gives_transformers_logits_at_odd_sizes(tmp_path, family, sizes):
    more = {} if family == "qwen2" else {"head_dim": 48}
    folder = write_dense_checkpoint(tmp_path / "c", seed=4, family=family, **sizes, **more)
    engine = build_engine(BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision="fp32"))
    theirs = CLASSES[family].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    report = verify.compare(engine, ByTransformers(theirs), [TOKENS], lambda _: None)
    with torch.no_grad():
        largest = float(theirs(torch.tensor([TOKENS])).logits.abs().max())
    assert max(report.max_logit_difference, report.max_decoded_difference) <= 1e-4 * largest
    assert report.failures(parity.THRESHOLDS["fp32"]) == []


@pytest.mark.parametrize("types", [["sliding_attention", "full_attention"], ["full_attention"] * 2])
def test_layer_types_say_which_layers_of_a_qwen_have_the_window(tmp_path, types):
    config = {**LATE_WINDOW, "layer_types": types}
    folder = write_dense_checkpoint(tmp_path / "c", seed=4, family="qwen2", config=config, **SIZES)
    model = read_model(open_checkpoint(folder))
    assert [model.architecture.window(layer) for layer in (0, 1)] == [23 if "sliding" in one else None for one in types]
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    [(found, _)] = Reference(model).run([TOKENS])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("said", "window"), [(True, 23), (1, 23), (False, None), (0, None), (None, None)])
def test_engine_and_reference_take_the_same_window_from_each_way_to_say_yes_and_no(tmp_path, said, window):
    config = {**LATE_WINDOW, "use_sliding_window": said}
    model = read_model(open_checkpoint(write_dense_checkpoint(tmp_path / "c", seed=4, family="qwen2", config=config)))
    layers = model.family.network(model.weights.checkpoint.config).layers
    assert [layer.attention.window for layer in layers] == [None, window]
    assert [model.architecture.window(layer) for layer in (0, 1)] == [None, window]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_sliding_window": 3}, "use_sliding_window is 3; moeship builds only False or True"),
        ({"sliding_window": 0}, "sliding_window is 0, expected a whole number of 1"),
        ({"max_window_layers": None}, "max_window_layers is null, and transformers has no default for it"),
        ({"layer_types": ["sliding_attention"]}, "expected sliding_attention or full_attention for each of 2 layers"),
        ({"layer_types": ["chunked_attention"] * 2}, "expected sliding_attention or full_attention for each of 2"),
        (
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2},
            "layer_types = .* is a key that moeship does not support",
        ),
        ({"attention_bias": True}, "attention_bias is True; moeship builds only False"),
    ],
)
def test_what_a_qwen_cannot_be_is_refused_by_name(tmp_path, changes, problem):
    folder = write_dense_checkpoint(tmp_path / "c", seed=1, family="qwen3", config={**LATE_WINDOW, **changes})
    with pytest.raises(ConfigError, match=problem):
        read_model(open_checkpoint(folder))


@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_graph_for_cuda_has_kernels_for_its_types(tmp_path, family, precision):
    folder = write(tmp_path / "c", family, dtype="float16")
    options = BuildOptions(checkpoint=str(folder), output=tmp_path / "e", precision=precision, provider="cuda")
    engine = build_engine(options)
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        problems, operators = check_types(onnx.load(str(engine.folder / name), load_external_data=False))
        assert problems == []
        assert {"Sigmoid", "Mul"} <= operators


@pytest.mark.parametrize("family", CLASSES)
def test_tensorrt_llm_is_refused_by_the_familys_name(tmp_path, family):
    with pytest.raises(ExportError, match=rf"engines of mixtral, .*, not of {family}; build for onnxruntime"):
        plan_checkpoint(read_model(open_checkpoint(write(tmp_path / "c", family))), CheckpointOptions())


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_is_refused(tmp_path, key):
    folder = write_dense_checkpoint(tmp_path / "c", seed=1, family="llama", config={key: True})
    with pytest.raises(ConfigError, match=f"{key} is True; moeship builds only False"):
        read_model(open_checkpoint(folder))
