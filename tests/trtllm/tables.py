"""Names, dtypes and shapes of a rank's tensors, by `checkpoint_tensors` of contract.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from trtllm.rejoined import place_of
from trtllm.weight_layout import CONTRACT

TABLES = {"phixtral": "phixtral-4x2_8", "mixtral": "mixtral-8x7b", "phi": "phixtral-4x2_8"}
COLUMNS = {None: "fp16", "W8A16": "w8a16", "W4A16": "w4a16", "W4A16_AWQ": "w4a16_awq", "W4A16_GPTQ": "w4a16_gptq"}


def expected_tensors(
    family: str, config: dict[str, Any], rank: int, *, plain: bool = False
) -> dict[str, tuple[str, list[int]]]:
    """Name -> label and shape of a rank's tensors, by the contract's table."""
    sizes, place = config["mapping"], place_of(rank, config["mapping"])
    tp, vocab, intermediate = sizes["tp_size"], config["vocab_size"], config["intermediate_size"]
    symbols = {
        "H": config["hidden_size"], "I": intermediate, "V": vocab, "Vp": -(-vocab // tp) * tp, "tp": tp,
        "nH": config["num_attention_heads"], "nKV": config["num_key_value_heads"], "D": config["head_size"],
        "g": config["quantization"].get("group_size"), "max": max, "Ir": intermediate // sizes["moe_tp_size"],
    }  # fmt: skip
    if "moe" in config:
        symbols |= {"E": config["moe"]["num_experts"], "Er": config["moe"]["num_experts"] // sizes["moe_ep_size"]}
    column = "fp16" if plain else COLUMNS[config["quantization"]["quant_algo"]]
    labels = {"int8": "I8", "float32": "F32",
              "model_dtype": {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[config["dtype"]]}  # fmt: skip
    symbols["QKVr"] = eval(CONTRACT["checkpoint_tensors"]["symbols"]["QKVr"].replace("/", "//"), {}, symbols)
    layers = np.array_split(np.arange(config["num_hidden_layers"]), sizes["pp_size"])[place["pp_rank"]]
    found = {}
    for row in CONTRACT["checkpoint_tensors"]["models"][TABLES[family]][column]:
        name, shape = row["name"], row["shape"]
        if family == "phi":  # as phixtral, with one MLP and no router
            shape = [letters for letters in shape if letters != "Er"]
            if ".router." in name:
                continue
        if name.startswith("transformer.vocab_embedding") and place["pp_rank"] > 0:
            continue
        if name.startswith(("transformer.ln_f", "lm_head")) and place["pp_rank"] < sizes["pp_size"] - 1:
            continue
        numbers = [int(eval(letters.replace("/", "//"), {}, symbols)) for letters in shape]
        for layer in range(len(layers)) if "{i}" in name else (0,):
            found[name.replace("{i}", str(layer))] = (labels[row["dtype"]], numbers)
    return found
