"""Scaled rotary embeddings: the tables, the reference and the engines against transformers, at far positions too."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from dense_checkpoints import write_dense_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export import rotary
from export.architecture import Architecture
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError
from export.families import family_named, read_model
from export.files.typed_json import read_typed
from export.reference.model import Reference
from export.trtllm.config import rotary_scaling

POSITIONS = 512
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear by the older name": {"type": "linear", "factor": 4},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 96},
    "llama3 without a length": LLAMA3,
    "yarn": YARN,
    "yarn with all of its keys": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.25},
    "yarn with mscale": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4, "finetuned": True},
    "yarn without a factor": {**YARN, "factor": None},
}


def longrope(width, **more):
    rng = np.random.default_rng(2)
    short, long = (np.sort(1 + scale * rng.random(width // 2)).tolist() for scale in (0.3, 5.0))
    return {
        "rope_type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 128,
        **more,
    }  # fmt: skip


def phi(folder):
    return write_phi_checkpoint(
        folder, seed=1, num_layers=2, hidden_size=64, num_heads=2, rotary_dim=16, max_positions=POSITIONS
    )


def mixtral(folder):
    return write_mixtral_checkpoint(folder, seed=1, max_positions=POSITIONS, num_experts=3)


def granitemoe(folder):
    write_granitemoe_checkpoint(folder, seed=1, max_positions=POSITIONS)
    path = folder / "config.json"  # with factors by which attention counts for much
    raw = json.loads(path.read_text()) | {"attention_multiplier": 0.25, "residual_multiplier": 1.0, "logits_scaling": 1}
    path.write_text(json.dumps(raw))
    return folder


def olmoe(folder):
    return write_olmoe_checkpoint(folder, seed=1, max_positions=POSITIONS)


def flex_olmo(folder):
    return write_flex_olmo_checkpoint(folder, seed=1, max_positions=POSITIONS)


def gpt_oss(folder):
    return write_gpt_oss_checkpoint(folder, seed=1, max_positions=POSITIONS)


def qwen3_moe(folder):
    return write_qwen_checkpoint(folder, "qwen3_moe", seed=1, max_positions=POSITIONS)


def llama(folder):
    return write_dense_checkpoint(folder, seed=1, family="llama", hidden_size=96, max_positions=POSITIONS)


def qwen3(folder):
    return write_dense_checkpoint(folder, seed=1, family="qwen3", max_positions=POSITIONS)


WRITERS = {
    "phi": phi,
    "mixtral": mixtral,
    "granitemoe": granitemoe,
    "olmoe": olmoe,
    "flex_olmo": flex_olmo,
    "gpt_oss": gpt_oss,
    "qwen3_moe": qwen3_moe,
    "llama": llama,
    "qwen3": qwen3,
}
WIDTHS = dict.fromkeys(WRITERS, 16)
TOKENS = np.random.default_rng(3).integers(0, 256, POSITIONS).tolist()


def scaled(folder, scaling, spelling="rope_scaling", **more):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **more}
    if spelling == "rope_parameters":
        raw.pop("rope_scaling", None)
        rope = raw.pop("rope_parameters", {})
        top = {key: raw.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in raw}
        rope = {key: value for key, value in {**top, **rope}.items() if key != "rope_type"}
        raw["rope_parameters"] = {**rope, **scaling}
    else:
        rope = raw.pop("rope_parameters", {})
        raw |= {key: value for key, value in rope.items() if key != "rope_type"}
        raw["rope_scaling"] = scaling
    path.write_text(json.dumps(raw))
    return folder


def theirs(folder, tokens=TOKENS):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def ours(folder, tokens=TOKENS):
    return next(Reference(read_model(open_checkpoint(folder))).run([tokens]))[0]


def expect_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# A factor of null is written in both spellings for Phi alone: one reader reads it for all families.
CASES = [
    (family, name, spelling)
    for family in WRITERS
    for name, values in SCALINGS.items()
    for spelling in ("rope_scaling", "rope_parameters")
    if values.get("factor", 1) is not None or spelling == "rope_scaling" or family == "phi"
]


@pytest.mark.parametrize(("family", "name", "spelling"), CASES)
def test_the_reference_gives_transformers_logits_up_to_the_last_position(tmp_path, family, name, spelling):
    plain = WRITERS[family](tmp_path / "c")
    unscaled = ours(plain)
    folder = scaled(plain, SCALINGS[name], spelling)
    found = ours(folder)
    expect_close(found, theirs(folder))
    assert np.abs(found - unscaled)[-1].max() > 1e-2, "the scaling changes nothing here"
    facts = read_model(open_checkpoint(folder)).architecture
    assert facts.max_positions == POSITIONS
    assert read_typed(Architecture, json.loads(json.dumps(dataclasses.asdict(facts)))) == facts


@pytest.mark.parametrize("more", [{}, {"factor": 3.0}, {"attention_factor": 1.5}])
@pytest.mark.parametrize("family", WRITERS)
def test_a_longropes_texts_of_either_length_have_transformers_logits(tmp_path, family, more, caplog):
    folder = scaled(WRITERS[family](tmp_path / "c"), longrope(WIDTHS[family], **more))
    for tokens in (TOKENS[:128], TOKENS[:129], TOKENS):
        expect_close(ours(folder, tokens), theirs(folder, tokens))
    both = [logits for logits, _ in Reference(read_model(open_checkpoint(folder))).run([TOKENS[:60], TOKENS[:200]])]
    expect_close(both[0], theirs(folder, TOKENS[:60]))
    expect_close(both[1], theirs(folder, TOKENS[:200]))
    assert read_model(open_checkpoint(folder)).architecture.max_positions == 128
    assert "engines take 128 of the model's 512 positions" in caplog.text


@pytest.mark.parametrize("family", [family for family in WRITERS if family not in ("phi", "gpt_oss")])
@pytest.mark.parametrize("nested", [False, True])
def test_a_class_that_turns_the_whole_head_does_not_look_at_a_share_of_null(tmp_path, family, nested):
    folder = WRITERS[family](tmp_path / "c")
    before, config = ours(folder), json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    share = {"partial_rotary_factor": None}
    config |= {"rope_parameters": rope | share} if nested else {"rope_parameters": rope, **share}
    (folder / "config.json").write_text(json.dumps(config))
    assert np.array_equal(ours(folder), before)
    expect_close(before, theirs(folder))


def test_a_length_at_the_top_is_the_one_that_counts(tmp_path):
    """As in configurations of Phi-3, and in transformers' standardize_rope_params."""
    folder = scaled(llama(tmp_path / "c"), {**LLAMA3, "original_max_position_embeddings": 300})
    before = ours(folder)
    folder = scaled(folder, {**LLAMA3, "original_max_position_embeddings": 300}, original_max_position_embeddings=64)
    expect_close(ours(folder), theirs(folder))
    assert np.abs(ours(folder) - before).max() > 1e-2


@pytest.mark.parametrize("width", [16, 80, 128])
@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_transformers_own(name, base, width):
    values = dict(SCALINGS[name])
    raw = {"rope_scaling": values, "rope_theta": base, "max_position_embeddings": 8192}
    kind = values.get("rope_type", values.get("type"))
    config = AutoConfig.for_model("llama", hidden_size=width * 2, num_attention_heads=2, head_dim=width, **raw)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    found = rotary.scaling_of(rotary.parameters(raw, 1.0), 8192)
    np.testing.assert_allclose(rotary.frequencies(width, base, found), expected.numpy(), rtol=1e-6, atol=0)
    assert found.attention_factor == pytest.approx(factor, rel=1e-12)


REFUSED = [
    ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic': its frequencies change with the length"),
    ({"type": "su", "factor": 2.0}, r"(?<!_)type is 'su'; moeship builds default, linear, llama3, yarn, longrope"),
    ({"rope_type": ["yarn"]}, r"rope_type is \['yarn'\]; moeship builds"),
    ({"rope_type": "proportional"}, "rope_type is 'proportional'; moeship builds"),
    ({"rope_type": "linear"}, "factor is None, expected a positive, finite number"),
    ({"rope_type": "linear", "factor": 0}, "factor is 0, expected a positive, finite number"),
    ({"rope_type": "linear", "factor": "2"}, "factor is '2', expected a positive, finite number"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "of kind 'linear' has beta_fast, which"),
    ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "rope_type is 'linear' and type is 'yarn'; keep one of"),
    ({"rope_type": "default", "factor": 2.0}, "of kind 'default' has factor, which"),
    ({**YARN, "short_mscale": 1.1}, "of kind 'yarn' has short_mscale, which"),
    ({**YARN, "truncate": None}, "truncate is None, expected true or false"),
    ({**YARN, "attention_factor": 0}, "attention_factor is 0, expected a positive number"),
    ({**YARN, "original_max_position_embeddings": 0.5}, "original_max_position_embeddings is 0.5, expected a whole"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor is None, expected a positive, finite number"),
    ({**LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor must be below high_freq_factor"),
    (longrope(14), "short_factor is .*, expected 8 positive numbers"),
    ({**longrope(16), "long_factor": None}, "long_factor is None, expected 8 positive numbers"),
    ("yarn", "rope_scaling is 'yarn', expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "problem"), REFUSED)
@pytest.mark.parametrize("family", ["phi", "mixtral"])
def test_a_scaling_that_cannot_be_computed_is_refused_with_the_reason(tmp_path, family, scaling, problem):
    folder = scaled(WRITERS[family](tmp_path / "c"), scaling)
    with pytest.raises(ConfigError, match=problem):
        read_model(open_checkpoint(folder))


def test_a_factor_of_the_head_is_for_families_that_have_one(tmp_path):
    folder = scaled(mixtral(tmp_path / "c"), {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5})
    with pytest.raises(ConfigError, match="partial_rotary_factor is 0.5; this family turns the whole head"):
        read_model(open_checkpoint(folder))


def test_a_phixtral_has_no_scaling(tmp_path):
    folder = scaled(write_phixtral_checkpoint(tmp_path / "c", seed=1, num_experts=3, experts_per_token=2), YARN)
    with pytest.raises(ConfigError, match="the published modeling_phi.py does not scale the rotary embedding"):
        read_model(open_checkpoint(folder))


def test_tensorrt_llm_gets_what_its_networks_compute(tmp_path):
    linear = rotary.RotaryScaling(kind="linear", factor=2.0)
    assert rotary_scaling(None) is None
    assert rotary_scaling(linear) == {"type": "linear", "factor": 2.0}
    llama3 = rotary.RotaryScaling(kind="llama3", factor=8.0, original_positions=8192)
    assert rotary_scaling(llama3) == {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    facts = read_model(open_checkpoint(mixtral(tmp_path / "c"))).architecture
    yarn = rotary.RotaryScaling(kind="yarn", factor=4.0, original_positions=2048)
    networks = {name: family_named(name).trtllm_network() for name in ("mixtral", "phi")}
    for scaling in (linear, llama3):
        assert networks["mixtral"].problems(dataclasses.replace(facts, rotary_scaling=scaling)) == []
    [problem] = networks["mixtral"].problems(dataclasses.replace(facts, rotary_scaling=yarn))
    assert "scaled (yarn, factor 4, original 2048 positions), and TensorRT-LLM's MixtralForCausalLM scales" in problem
    problems = networks["phi"].problems(dataclasses.replace(facts, rotary_scaling=linear))
    assert [text for text in problems if "TensorRT-LLM's PhiForCausalLM does not scale it; build for onnx" in text]


WHOLE = {
    "default": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16},
    "yarn": {**YARN, "original_max_position_embeddings": 16},
}  # fmt: skip
NESTED = sorted(
    {*(key for keys in rotary.KEYS.values() for key in keys), "type", "rope_theta", "partial_rotary_factor"}
)
NESTED_VALUES = [None, 0.5, 3, True, False, "linear", [2.0] * 8]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_nested_key_that_changes_transformers_logits_changes_ours_or_is_refused(tmp_path, kind):
    folder = write_dense_checkpoint(
        tmp_path / "c", seed=1, family="llama", hidden_size=96, num_layers=1, max_positions=64
    )
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    compared = 0
    for key in [*NESTED, "mrope_section", "short_mscale", "unknown"]:
        for value in NESTED_VALUES:
            path.write_text(json.dumps({**raw, "rope_scaling": {**WHOLE[kind], key: value}}))
            try:
                found = ours(folder, TOKENS[:40])
            except ConfigError:
                continue
            try:
                expected = theirs(folder, TOKENS[:40])
            except Exception:
                continue  # transformers does not take it
            compared += 1
            assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), (key, value)
    assert compared > 10
