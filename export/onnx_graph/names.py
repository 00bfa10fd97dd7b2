"""Names of the graphs' inputs and outputs. Those of the generating graph are the ones that onnxruntime-genai expects of
a decoder."""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
LOGITS = "logits"
# Inputs of the serving graph (export/onnx_graph/forms.py: ServingGraph).
TOKEN_OF_QUERY = "token_of_query"
QUERY_OF_TOKEN = "query_of_token"
NEW_LENGTHS = "new_lengths"
LAST_POSITIONS = "last_positions"
TOTAL_LENGTH = "total_length"
LOGIT_TOKENS = "logit_tokens"
OPSET = 21
IR_VERSION = 10
MICROSOFT_DOMAIN = "com.microsoft"
MOESHIP_DOMAIN = "moeship"  # operator domain of the kernels in trt_build/ort/kernels

BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"
HIDDEN = "hidden_size"


PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."


def past_key(layer: int) -> str:
    return f"{PAST_PREFIX}{layer}.key"


def past_value(layer: int) -> str:
    return f"{PAST_PREFIX}{layer}.value"


def present_key(layer: int) -> str:
    return f"{PRESENT_PREFIX}{layer}.key"


def present_value(layer: int) -> str:
    return f"{PRESENT_PREFIX}{layer}.value"


def router_logits(number: int) -> str:
    """The name of an output of the scoring graph: the router logits [B*S, E] of the `number`-th layer that has experts,
    in the engine's expert order."""
    return f"router_logits.{number}"
