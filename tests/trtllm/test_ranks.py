"""Rank files joined again: every tensor of both families, in every precision, is that of the one rank that holds all.

What is compared is bits, of codes and of floats. Faults put into what ranks hold are seen, and the whole is held to the
checkpoint that it is made of.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file
from trtllm.conftest import PACKABLE
from trtllm.rejoined import MASK, RankFiles, differences
from trtllm.tables import expected_tensors
from trtllm.weight_layout import Array, read_ranks

from export.trtllm.parallel import Parallelism

NUM_TEXT_IDS = 257  # of the tokenizer; the rows behind them are masked
SIZES = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 128, "num_layers": 3}
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int8 plain": {"precision": "int8", "plain": True},
    "int4 plain": {"precision": "int4", "plain": True},
    "int4 for SM 90": {"precision": "int4", "sm": 90},
    "int4 and bfloat16": {"precision": "int4", "dtype": "bfloat16"},
    "int4_gptq": {"precision": "int4_gptq", "group_size": 64},
    "int4_awq": {"precision": "int4_awq", "group_size": 64},
    "int4 without an expert": {"precision": "int4", "left_out": (1,)},
}
# tp_size, moe_ep_size, pp_size. The Mixtral has two key/value heads and three layers; 277 rows of a vocabulary do not
# divide, nor do 371.
MIXES = {
    "phixtral": [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 4, 1)],
    "mixtral": [(2, 1, 1), (4, 2, 1), (4, 4, 2), (2, 2, 3), (1, 1, 3)],
    "phi": [(2, 1, 1), (4, 1, 1)],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, packable_phixtral) -> dict[str, Path]:
    """Checkpoint folders by family, "packed" the Mixtral's other spelling."""
    parent = tmp_path_factory.mktemp("sources")
    sizes = {**SIZES, "num_experts": 4, "vocab_size": 371, "dtype": "float16"}
    mixtral, packed = (
        write_mixtral_checkpoint(parent / name, seed=6, spelling=name, **sizes) for name in ("published", "packed")
    )
    phi = write_phi_checkpoint(parent / "phi", seed=9, **{**PACKABLE, "ffn_size": 512})
    return {"phixtral": packable_phixtral, "mixtral": mixtral, "packed": packed, "phi": phi}


@pytest.fixture(scope="module")
def ranks_of(rank_files, sources) -> Callable[..., Path]:
    """(family, form, tp_size, moe_ep_size, pp_size) -> a folder of rank files."""

    def ranks_of(family: str, form: str, tp: int = 1, ep: int = 1, pp: int = 1) -> Path:
        parallel = Parallelism(tp_size=tp, pp_size=pp, moe_ep_size=None if ep == 1 else ep)
        masked = {} if family in ("mixtral", "packed") else {"mask_from": NUM_TEXT_IDS}
        return rank_files(sources[family], parallel=parallel, **FORMS[form], **masked)

    return ranks_of


CASES = [
    pytest.param(family, form, mix, id=f"{family} {form} {mix}")
    for family, mixes in MIXES.items()
    for form, mix in itertools.product(FORMS, mixes)
    if not (family == "phixtral" and form == "int4_awq" and mix[1] > 1)  # refused: the library clears biases
    if not (form == "int4 without an expert" and (family == "phi" or mix[1] > 1))  # three do not divide
]


@pytest.fixture(scope="module")
def whole_of(ranks_of) -> Callable[[str, str], dict[str, Array]]:
    """(family, form) -> what one rank that holds all holds."""
    return functools.cache(lambda family, form: RankFiles(ranks_of(family, form), sm_of(form)).whole())


def sm_of(form: str) -> int:
    return FORMS[form].get("sm", 80)


@pytest.mark.parametrize(("family", "form", "mix"), CASES)
def test_the_ranks_rejoin_to_the_whole(ranks_of, whole_of, family, form, mix):
    ranks = RankFiles(ranks_of(family, form, *mix), sm_of(form))
    assert len(ranks.ranks) == mix[0] * mix[2]
    assert differences(ranks, whole_of(family, form)) == []


# Names, shapes and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MIXES)
def test_every_rank_holds_the_contracts_tensors(ranks_of, family, form):
    mixes = [(1, 1, 1), *(case.values[2] for case in CASES if case.values[:2] == (family, form))]
    for mix in mixes:
        folder = ranks_of(family, form, *mix)
        config = json.loads((folder / "config.json").read_text())
        for rank, tensors in enumerate(read_ranks(folder)):
            found = {name: (stored.dtype, list(stored.values.shape)) for name, stored in tensors.items()}
            plain = bool(FORMS[form].get("plain"))
            assert found == expected_tensors(family, config, rank, plain=plain), (mix, rank)


@pytest.mark.parametrize("form", FORMS)
def test_both_spellings_of_a_mixtral_give_the_same_bytes(ranks_of, form):
    mix = (2, 1, 3) if "left_out" in FORMS[form] else (4, 2, 1)
    published, packed = (ranks_of(family, form, *mix) for family in ("mixtral", "packed"))
    for rank in range(mix[0] * mix[2]):
        name = f"rank{rank}.safetensors"
        assert (published / name).read_bytes() == (packed / name).read_bytes()


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
def test_without_an_expert_the_others_are_what_they_were(whole_of, family):
    less, whole = (whole_of(family, form) for form in ("int4 without an expert", "int4"))
    assert less.keys() == whole.keys()
    for name, values in whole.items():
        assert np.array_equal(less[name], values[[0, 2, 3]] if ".mlp." in name else values), name


# Faults ---------------------------------------------------------------------------------------------------------------

LAYER = "transformer.layers.1."
Ranks = list[dict[str, Array]]


def swap_rows(name: str, rank: int, sizes: Sequence[int], order: str, axis: int = 0) -> Callable[[Ranks], None]:
    """Put a tensor's parts of these sizes, "abc", into another order."""

    def fault(ranks: Ranks) -> None:
        parts = dict(zip("abc", np.split(ranks[rank][name], np.cumsum(sizes)[:-1], axis=axis), strict=False))
        ranks[rank][name] = np.concatenate([parts[letter] for letter in order], axis=axis)

    return fault


def change(name: str, rank: int, value: Callable[[Array], Array]) -> Callable[[Ranks], None]:
    def fault(ranks: Ranks) -> None:
        ranks[rank][name] = value(ranks[rank][name])

    return fault


def exchange(first: int, second: int, names: str = "") -> Callable[[Ranks], None]:
    """Two ranks' tensors whose names have this in them."""

    def fault(ranks: Ranks) -> None:
        for name in [name for name in ranks[first] if names in name]:
            ranks[first][name], ranks[second][name] = ranks[second][name], ranks[first][name]

    return fault


def one_more(values: Array) -> Array:
    values = values.copy()
    values.reshape(-1)[-1] ^= 1
    return values


FAULTS = {
    "two ranks exchanged": ("phixtral", "fp16", (2, 1, 1), exchange(0, 1), "attention.qkv.weight"),
    "two packed ranks exchanged": ("phixtral", "int4", (2, 1, 1), exchange(0, 1), "attention.qkv.weight"),
    "two ranks of a pipeline exchanged": ("mixtral", "fp16", (4, 4, 2), exchange(6, 7), "mlp.fc.weight"),
    "q and k": ("phixtral", "fp16", (2, 1, 1), swap_rows(f"{LAYER}attention.qkv.weight", 1, [128] * 3, "bac"), "qkv"),
    "q and k, packed": (
        "phixtral",
        "int8",
        (2, 1, 1),
        swap_rows(f"{LAYER}attention.qkv.weight", 0, [128] * 3, "bac"),
        "qkv",
    ),
    "q and k of the bias": (
        "phi",
        "fp16",
        (4, 1, 1),
        swap_rows(f"{LAYER}attention.qkv.bias", 3, [64] * 3, "bac"),
        "qkv.bias",
    ),
    "k and v": (
        "mixtral",
        "int4",
        (4, 2, 1),
        swap_rows(f"{LAYER}attention.qkv.weight", 2, [128, 64, 64], "acb"),
        "qkv",
    ),
    "k and v of the scales": (
        "mixtral",
        "int4",
        (4, 2, 1),
        swap_rows(f"{LAYER}attention.qkv.per_channel_scale", 2, [128, 64, 64], "acb"),
        "scale",
    ),
    "another rank's key heads": ("mixtral", "fp16", (4, 4, 2), exchange(1, 2, "attention.qkv"), "attention.qkv.weight"),
    "up and gate": (
        "mixtral",
        "fp16",
        (4, 2, 1),
        swap_rows(f"{LAYER}mlp.fc.weight", 1, [64, 64], "ba", axis=1),
        "mlp.fc",
    ),
    "up and gate, packed": (
        "mixtral",
        "int4_gptq",
        (2, 1, 1),
        swap_rows(f"{LAYER}mlp.fc.weight", 0, [64, 64], "ba", axis=1),
        "mlp.fc",
    ),
    "up and gate of the scales": (
        "mixtral",
        "int4_awq",
        (2, 1, 1),
        swap_rows(f"{LAYER}mlp.fc.weights_scaling_factor", 0, [64, 64], "ba", axis=1),
        "mlp.fc.weights_scaling_factor",
    ),
    "two experts": (
        "phixtral",
        "int8",
        (2, 1, 1),
        swap_rows(f"{LAYER}mlp.proj.weight", 0, [1, 1, 2], "bac"),
        "mlp.proj.weight",
    ),
    "two blocks of experts": ("phixtral", "int4", (2, 2, 1), exchange(0, 1, "mlp.proj"), "mlp.proj.weight"),
    "two slices of the experts": ("phixtral", "fp16", (4, 2, 1), exchange(0, 2, "mlp.proj.weight"), "mlp.proj.weight"),
    "experts' biases of one rank alone": (
        "phixtral",
        "fp16",
        (4, 2, 1),
        change(f"{LAYER}mlp.proj.bias", 3, np.zeros_like),
        "mlp.proj.bias",
    ),
    "a router that differs": (
        "phixtral",
        "int4",
        (4, 4, 1),
        change(f"{LAYER}mlp.router.weight", 3, one_more),
        "router",
    ),
    "a bias that every rank adds": (
        "phixtral",
        "int4_gptq",
        (2, 1, 1),
        change(f"{LAYER}attention.dense.bias", 1, one_more),
        "attention.dense.bias",
    ),
    "one code": ("phixtral", "int4", (2, 1, 1), change(f"{LAYER}mlp.fc.weight", 1, one_more), "mlp.fc.weight"),
    "one zero": ("mixtral", "int4_gptq", (2, 1, 1), change(f"{LAYER}mlp.fc.zero", 1, one_more), "mlp.fc.zero"),
    "a filled up vocabulary that is not masked": (
        "phixtral",
        "fp16",
        (4, 4, 1),
        change("lm_head.bias", 3, one_more),
        "lm_head",
    ),
    "a filled up vocabulary with weights": (
        "phixtral",
        "fp16",
        (4, 4, 1),
        change("lm_head.weight", 3, one_more),
        "lm_head",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_ranks_is_seen(ranks_of, whole_of, fault):
    family, form, mix, spoil, told = FAULTS[fault]
    files = RankFiles(ranks_of(family, form, *mix))
    assert differences(files, whole_of(family, form)) == []
    spoil(files.ranks)
    found = differences(files, whole_of(family, form))
    assert any(told in name for name in found), found


# The whole against the source -----------------------------------------------------------------------------------------


def of_phixtral(source: dict[str, Array], num_layers: int) -> dict[str, Array]:
    found = {
        "transformer.vocab_embedding.weight": source["transformer.embd.wte.weight"],
        **{f"transformer.ln_f.{kind}": source[f"lm_head.ln.{kind}"] for kind in ("weight", "bias")},
        **{f"lm_head.{kind}": source[f"lm_head.linear.{kind}"] for kind in ("weight", "bias")},
    }
    for layer, kind in itertools.product(range(num_layers), ("weight", "bias")):
        ours, theirs = f"transformer.layers.{layer}", f"transformer.h.{layer}"
        found[f"{ours}.input_layernorm.{kind}"] = source[f"{theirs}.ln.{kind}"]
        found[f"{ours}.attention.qkv.{kind}"] = source[f"{theirs}.mixer.Wqkv.{kind}"]
        found[f"{ours}.attention.dense.{kind}"] = source[f"{theirs}.mixer.out_proj.{kind}"]
        found[f"{ours}.mlp.router.weight"] = source[f"{theirs}.moe.gate.weight"]
        for name, matrix in (("fc", "fc1"), ("proj", "fc2")):
            found[f"{ours}.mlp.{name}.{kind}"] = np.stack(
                [source[f"{theirs}.moe.mlp.{e}.{matrix}.{kind}"] for e in range(4)]
            )
    return found


def of_phi(source: dict[str, Array], num_layers: int) -> dict[str, Array]:
    found = {"transformer.vocab_embedding.weight": source["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        found |= {
            f"transformer.ln_f.{kind}": source[f"model.final_layernorm.{kind}"],
            f"lm_head.{kind}": source[f"lm_head.{kind}"],
        }
        for layer in range(num_layers):
            ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
            found[f"{ours}.input_layernorm.{kind}"] = source[f"{theirs}.input_layernorm.{kind}"]
            found[f"{ours}.attention.qkv.{kind}"] = np.concatenate(
                [source[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
            found[f"{ours}.attention.dense.{kind}"] = source[f"{theirs}.self_attn.dense.{kind}"]
            found[f"{ours}.mlp.fc.{kind}"] = source[f"{theirs}.mlp.fc1.{kind}"]
            found[f"{ours}.mlp.proj.{kind}"] = source[f"{theirs}.mlp.fc2.{kind}"]
    return found


def of_mixtral(source: dict[str, Array], num_layers: int) -> dict[str, Array]:
    found = {"transformer.vocab_embedding.weight": source["model.embed_tokens.weight"],
             "transformer.ln_f.weight": source["model.norm.weight"],
             "lm_head.weight": source["lm_head.weight"]}  # fmt: skip
    for layer in range(num_layers):
        ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
        experts = [f"{theirs}.block_sparse_moe.experts.{e}" for e in range(4)]
        found[f"{ours}.input_layernorm.weight"] = source[f"{theirs}.input_layernorm.weight"]
        found[f"{ours}.post_layernorm.weight"] = source[f"{theirs}.post_attention_layernorm.weight"]
        found[f"{ours}.attention.qkv.weight"] = np.concatenate(
            [source[f"{theirs}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        )
        found[f"{ours}.attention.dense.weight"] = source[f"{theirs}.self_attn.o_proj.weight"]
        found[f"{ours}.mlp.router.weight"] = source[f"{theirs}.block_sparse_moe.gate.weight"]
        found[f"{ours}.mlp.fc.weight"] = np.stack(
            [np.concatenate([source[f"{expert}.w3.weight"], source[f"{expert}.w1.weight"]]) for expert in experts]
        )  # up, which nothing is done to, before gate
        found[f"{ours}.mlp.proj.weight"] = np.stack([source[f"{expert}.w2.weight"] for expert in experts])
    return found


@pytest.mark.parametrize("form", ["fp32", "fp16", "int4 plain"])
@pytest.mark.parametrize(("family", "theirs"), [("phixtral", of_phixtral), ("phi", of_phi), ("mixtral", of_mixtral)])
def test_the_whole_is_the_sources_tensors_under_their_names(sources, ranks_of, whole_of, family, theirs, form):
    config = json.loads((ranks_of(family, form) / "config.json").read_text())
    source = load_file(sources[family] / "model.safetensors")
    expected = theirs(source, config["num_hidden_layers"])
    found = whole_of(family, form)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        dtype = np.float32 if form == "fp32" or name.endswith("router.weight") else np.float16
        values = values.astype(dtype)
        if name == "lm_head.bias":
            values[NUM_TEXT_IDS:] = MASK
        assert np.array_equal(found[name], values.view(found[name].dtype)), name
