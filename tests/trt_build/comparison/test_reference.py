"""The reference is built from config.json as it stands, so that a fact that the engine's reader gets wrong shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from dense_checkpoints import write_dense_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from gpt_oss_checkpoints import write_gpt_oss_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from olmoe_checkpoints import write_olmoe_checkpoint
from phimoe_checkpoints import write_phimoe_checkpoint
from qwen_checkpoints import write_qwen_checkpoint
from safetensors.numpy import load_file, save_file
from torch_reference import load_reference
from transformers_models import TRANSFORMERS_MODELS

from export.checkpoint.folder import open_checkpoint
from export.families import read_model

TOKENS = torch.arange(40).unsqueeze(0)
DENSE = {"mlp_only_layers": [1]}
WRITERS = {
    "phi": lambda folder: write_phi_checkpoint(folder, seed=1),
    "phi-msft": lambda folder: write_phi_checkpoint(folder, seed=1, spelling="phi-msft"),
    "phixtral": lambda folder: write_phixtral_checkpoint(folder, seed=1, num_experts=3, experts_per_token=2),
    "mixtral": lambda folder: write_mixtral_checkpoint(folder, seed=1),
    "granitemoe": lambda folder: write_granitemoe_checkpoint(folder, seed=1),
    "olmoe": lambda folder: write_olmoe_checkpoint(folder, seed=1),
    "flex_olmo": lambda folder: write_flex_olmo_checkpoint(folder, seed=1),
    "gpt_oss": lambda folder: write_gpt_oss_checkpoint(folder, seed=1),
    "qwen3_moe": lambda folder: write_qwen_checkpoint(folder, "qwen3_moe", seed=1, num_layers=3, config=DENSE),
    "qwen2_moe": lambda folder: write_qwen_checkpoint(folder, "qwen2_moe", seed=1, num_layers=3, config=DENSE),
    "phimoe": lambda folder: write_phimoe_checkpoint(folder, seed=1),
    "mistral": lambda folder: write_dense_checkpoint(folder, seed=1, family="mistral"),
    "llama": lambda folder: write_dense_checkpoint(folder, seed=1, family="llama", num_heads=4),
    "qwen2": lambda folder: write_dense_checkpoint(folder, seed=1, family="qwen2"),
    "qwen3": lambda folder: write_dense_checkpoint(folder, seed=1, family="qwen3"),
}


def logits_of(model):
    with torch.no_grad():
        return load_reference(model)(TOKENS).logits


@pytest.mark.parametrize("family", WRITERS)
def test_facts_that_were_read_wrongly_do_not_reach_the_reference(tmp_path, family):
    model = read_model(open_checkpoint(WRITERS[family](tmp_path / "c")))
    wrong = replace(model.architecture, rope_base=50.0, norm_epsilon=0.5, max_positions=48, sliding_window=3)
    assert torch.equal(logits_of(model), logits_of(replace(model, architecture=wrong)))


@pytest.mark.parametrize("family", WRITERS)
def test_what_a_config_says_of_loading_and_training_changes_nothing(tmp_path, family):
    folder = WRITERS[family](tmp_path / "c")
    expected = logits_of(read_model(open_checkpoint(folder)))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    more = {"torch_dtype": "float16", "use_cache": False, "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    families = (
        "phi",
        "mixtral",
        "granitemoe",
        "olmoe",
        "flex_olmo",
        "gpt_oss",
        "qwen3_moe",
        "qwen2_moe",
        "mistral",
        "llama",
    )
    if family in (*families, "phimoe"):
        more |= {"return_dict": False, "output_attentions": True, "is_decoder": True}
    if family in ("mixtral", "phimoe"):
        more |= {"output_router_logits": True}
    if family == "mixtral":
        more |= {"router_jitter_noise": 0.5}
    path.write_text(json.dumps(config | more))
    assert torch.equal(expected, logits_of(read_model(open_checkpoint(folder))))


def test_the_number_of_experts_a_token_is_the_one_asked_for(tmp_path):
    for family in ("phixtral", "mixtral", "granitemoe", "olmoe", "flex_olmo", "gpt_oss", "qwen3_moe", "qwen2_moe"):
        folder = WRITERS[family](tmp_path / family)
        asked = logits_of(read_model(open_checkpoint(folder), 1))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 1}))
        assert torch.equal(asked, logits_of(read_model(open_checkpoint(folder))))


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_of_equal_router_logits_the_lowest_experts_are_chosen(tmp_path, family):
    folder = WRITERS[family](tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    routers = [name for name, values in tensors.items() if values.shape[0] == 5 and values.ndim == 2]
    assert len(routers) == 2
    for name in routers:
        tensors[name][:] = 0  # sums of the same products may differ in their last bit, those of zeros do not
    save_file(tensors, folder / "model.safetensors")
    model = read_model(open_checkpoint(folder), 3)
    for layer in load_reference(model).model.layers:
        with torch.no_grad():
            _, shares, chosen = layer.get_submodule(TRANSFORMERS_MODELS[family].router)(torch.ones(64, 80))
        assert torch.equal(chosen, torch.arange(3).expand(64, 3))
        torch.testing.assert_close(shares, torch.full((64, 3), 1 / 3))


@pytest.mark.parametrize(
    "family", ["phixtral", "mixtral", "granitemoe", "olmoe", "flex_olmo", "gpt_oss", "qwen3_moe", "qwen2_moe"]
)
@pytest.mark.parametrize("router", ["mlp.none", None])
def test_a_record_that_names_no_router_of_the_class_is_told_as_its_routing_would_not_be_compared(
    tmp_path, family, router, monkeypatch
):
    model = read_model(open_checkpoint(WRITERS[family](tmp_path / "c")))
    wrong = replace(TRANSFORMERS_MODELS[family], router=router)
    monkeypatch.setattr("torch_reference.TRANSFORMERS_MODELS", {**TRANSFORMERS_MODELS, family: wrong})
    with pytest.raises(AssertionError, match=f"0 layers of .* have the router {router}, expected [23]$"):
        load_reference(model)
