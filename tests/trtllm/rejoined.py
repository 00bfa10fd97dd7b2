"""Rank files joined again, by other code than cut them: packed weights unpacked, slices put together, on bits.

    found = RankFiles(folder).whole()       # name -> tensor, [experts, out, in]; None where ranks do not agree
    differences(RankFiles(folder), whole)   # names

Ranks are told apart by the rules of contract.json's `mapping_rules`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from trtllm.weight_layout import CONTRACT, Array, Stored, read_ranks, unpacked

RULES = dict(rule.split(" = ") for rule in CONTRACT["config_json"]["mapping_rules"] if "_rank = " in rule)
MASK = -1e4  # the bias of an id that stands for no text


class UnequalError(Exception):
    """Ranks that must hold the same hold something else."""


def place_of(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """What `mapping_rules` say of a rank."""
    names = {**sizes, "rank": rank}
    for name, rule in RULES.items():
        names[name] = eval(rule, {}, names)
    return names


def whole_name(name: str, stage: int, sizes: dict[str, int], num_layers: int) -> str:
    """With the layer's index in the whole model: layers are shared out evenly, the first stages taking what is left."""
    before, mark, rest = name.partition("transformer.layers.")
    if not mark:
        return name
    local, _, rest = rest.partition(".")
    layers = np.array_split(np.arange(num_layers), sizes["pp_size"])[stage]
    return f"{before}{mark}{layers[int(local)]}.{rest}"


def logical(name: str, stored: Stored, algo: str | None, sm: int) -> Array:
    """Bits or signed codes, the output axis before the input axis, experts first."""
    module, _, kind = name.rpartition(".")
    values = stored.values
    if algo == "W4A16_GPTQ" and kind in ("weights_scaling_factor", "zero"):
        return values.swapaxes(-1, -2)
    if kind != "weight" or algo is None or not module.endswith(("qkv", "dense", "fc", "proj")):
        return values
    if algo == "W4A16_AWQ":  # two rows in a byte
        return np.stack([values & 15, values >> 4], axis=-2).reshape(*values.shape[:-2], -1, values.shape[-1])
    if stored.dtype != "I8" and algo != "W4A16_GPTQ":
        return values  # plain
    bits = 8 if algo == "W8A16" else 4
    *experts, rows, width = values.shape
    columns, interleaved = width * values.itemsize * 8 // bits, bool(experts) or sm != 90
    codes = [unpacked(one.tobytes(), rows, columns, bits, interleaved).T for one in values.reshape(-1, rows, width)]
    return np.stack(codes).reshape(*experts, columns, rows)


def the_same(parts: Sequence[Array]) -> Array:
    if not all(np.array_equal(part, parts[0]) for part in parts):
        raise UnequalError
    return parts[0]


class RankFiles:
    """A folder of rank files, weights unpacked. `whole()` joins them."""

    def __init__(self, folder: Path, sm: int = 80) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.sizes, self.algo = self.config["mapping"], self.config["quantization"]["quant_algo"]
        files = read_ranks(folder)
        assert len(files) == self.sizes["world_size"]
        self.places = [place_of(rank, self.sizes) for rank in range(len(files))]
        self.ranks = [
            {
                whole_name(name, place["pp_rank"], self.sizes, self.config["num_hidden_layers"]): logical(
                    name, stored, self.algo, sm
                )
                for name, stored in tensors.items()
            }
            for tensors, place in zip(files, self.places, strict=True)
        ]

    def whole(self) -> dict[str, Array | None]:
        """Every tensor by name; None for one that ranks do not agree on."""
        found: dict[str, Array | None] = {}
        for stage in range(self.sizes["pp_size"]):
            ranks = [held for held, place in zip(self.ranks, self.places, strict=True) if place["pp_rank"] == stage]
            assert all(held.keys() == ranks[0].keys() for held in ranks)
            assert not found.keys() & ranks[0].keys()
            for name in ranks[0]:
                try:
                    found[name] = self._joined(name, [held[name] for held in ranks])
                except UnequalError:
                    found[name] = None
        return found

    def _joined(self, name: str, parts: list[Array]) -> Array:
        """One tensor of the ranks of a stage, which are in the order of their tp_rank."""
        module, _, kind = name.rpartition(".")
        module = module.split(".", 3)[-1] if module.startswith("transformer.layers.") else module
        rows, columns = (None, -1) if kind == "prequant_scaling_factor" else (-1, None)
        if kind in ("weight", "weights_scaling_factor", "zero"):
            rows, columns = -2, -1
        if module == "lm_head":
            return self._vocabulary(kind, np.concatenate(parts))
        if module == "attention.qkv":
            return self._heads(parts, rows) if rows else the_same(parts)
        if module == "attention.dense" or (module == "mlp.proj" and "moe" not in self.config):
            if (kind, self.algo) == ("bias", "W4A16_GPTQ"):  # every rank adds its own
                the_same([np.zeros_like(parts[0]), *parts[1:]])
                return parts[0]
            return np.concatenate(parts, columns) if columns else the_same(parts)
        if module in ("mlp.fc", "mlp.proj"):
            return self._mlp(module, kind, parts, rows, columns)
        return the_same(parts)

    def _heads(self, parts: list[Array], rows: int) -> Array:
        """Each rank's queries, keys and values; key/value heads that several ranks hold once."""
        tp, size = self.sizes["tp_size"], self.config["head_size"]
        queries, keys = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        each = max(1, keys // tp)
        cuts = [queries // tp * size, (queries // tp + each) * size]
        q, k, v = zip(*(np.split(part, cuts, axis=rows) for part in parts), strict=True)
        copies = max(1, tp // keys)
        k, v = ([the_same(held[i : i + copies]) for i in range(0, tp, copies)] for held in (k, v))
        return np.concatenate([*q, *k, *v], axis=rows)

    def _mlp(self, module: str, kind: str, parts: list[Array], rows: int | None, columns: int | None) -> Array:
        """Blocks of experts, and slices of each: of a gated first matrix, of its two halves."""
        cut = rows if module == "mlp.fc" else columns
        blocks: dict[int, list[Array]] = {}
        if "moe" not in self.config:
            blocks[0] = parts
        else:
            for place, part in zip(self.places, parts, strict=False):
                blocks.setdefault(place["moe_ep_rank"], []).append(part)
        gated = self.config["hidden_act"] == "swiglu" and module == "mlp.fc"
        joined = []
        for _, slices in sorted(blocks.items()):
            if cut is None:
                joined.append(the_same(slices))
            elif gated:
                halves = zip(*(np.split(part, 2, axis=cut) for part in slices), strict=True)
                joined.append(np.concatenate([half for held in halves for half in held], axis=cut))
            else:
                joined.append(np.concatenate(slices, axis=cut))
        if "moe" not in self.config:
            return joined[0]
        return the_same(joined) if kind == "prequant_scaling_factor" else np.concatenate(joined)

    def _vocabulary(self, kind: str, whole: Array) -> Array:
        """Without what fills the vocabulary up: zeros, and biases that keep it from being sampled."""
        size = self.config["vocab_size"]
        filling = np.full_like(whole[size:], masked_bits(self.config["dtype"])) if kind == "bias" else 0 * whole[size:]
        the_same([whole[size:], filling])
        return whole[:size]


def masked_bits(dtype: str) -> int:
    """The bits of the bias that stands for no text."""
    value = np.array([MASK], dtype={"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    return int(value.view(f"<u{value.itemsize}")[0])


def differences(found: RankFiles, whole: dict[str, Array | None]) -> list[str]:
    """Names of the tensors that are not those of the whole, or that ranks do not agree on."""
    joined = found.whole()
    assert joined.keys() == whole.keys()
    return [name for name, values in whole.items() if joined[name] is None or not np.array_equal(joined[name], values)]
