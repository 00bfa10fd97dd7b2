"""Writes genai_config.json, with which onnxruntime-genai loads an engine directory without changes.

Fields: microsoft/onnxruntime-genai, src/config.h and its model builder's output for decoder-only models.

An engine for moeship's kernels names the kernels' library without a folder, so that its files are the same on every
machine. genai looks for the library in the engine's folder, then where the dynamic linker looks (LD_LIBRARY_PATH). A
program can give the path:

    config = onnxruntime_genai.Config("engine")
    config.overlay(json.dumps(with_library(trt_build.ort.kernels.library())))
    model = onnxruntime_genai.Model(config)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.architecture import Architecture
from export.checkpoint.token_ids import TokenIds
from export.exporter import GENERATING_GRAPH
from export.onnx_graph import names
from export.provider import OWN_KERNELS, Provider
from trt_build.ort.kernels import LIBRARY_FILE

GENAI_FILE = "genai_config.json"


def genai_config(architecture: Architecture, max_sequence: int, ids: TokenIds, provider: Provider) -> dict[str, Any]:
    """The content of genai_config.json as a JSON object. A token id that the checkpoint does not name is left out."""
    end = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos)
    first_end = ids.eos[0] if ids.eos else None
    # If no file names a padding token, the end token pads a batch, as in transformers' `generate`.
    tokens = {
        "bos_token_id": first_end if ids.bos is None else ids.bos,
        "eos_token_id": end,
        "pad_token_id": first_end if ids.pad is None else ids.pad,
    }
    pattern = {"past_key": names.past_key, "past_value": names.past_value,
               "present_key": names.present_key, "present_value": names.present_value}  # fmt: skip
    # genai_config.json has a format directive in place of the layer's number.
    cache_names = {key: name(0).replace("0", "%d", 1) for key, name in pattern.items()}
    # Without a provider onnxruntime-genai runs on the CPU.
    provider_options = [] if provider.name == "cpu" else [{provider.name: dict(provider.options)}]
    session_options = {"log_id": "onnxruntime-genai", "provider_options": provider_options}
    if provider.kernels == OWN_KERNELS:
        session_options["custom_ops_library"] = LIBRARY_FILE
    decoder = {
        "session_options": session_options,
        "filename": GENERATING_GRAPH,
        "head_size": architecture.head_size,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_heads,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.num_kv_heads,
        "inputs": {
            "input_ids": names.INPUT_IDS,
            "attention_mask": names.ATTENTION_MASK,
            "past_key_names": cache_names["past_key"],
            "past_value_names": cache_names["past_value"],
        },
        "outputs": {
            "logits": names.LOGITS,
            "present_key_names": cache_names["present_key"],
            "present_value_names": cache_names["present_value"],
        },
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": architecture.vocab_size,
            "context_length": max_sequence,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": max_sequence,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def with_library(library: Path) -> dict[str, Any]:
    """The JSON object to overlay on genai_config.json so that the kernels are loaded from the path `library`."""
    return {"model": {"decoder": {"session_options": {"custom_ops_library": str(library)}}}}
