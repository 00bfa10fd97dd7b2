"""Names at the ends of the graph: those that onnxruntime-genai expects of a decoder."""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
LOGITS = "logits"
OPSET = 21
IR_VERSION = 10
MICROSOFT_DOMAIN = "com.microsoft"

BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"


def past_key(layer: int) -> str:
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    return f"present.{layer}.value"


def router_logits(layer: int) -> str:
    """Output of the scoring graph alone: [B*S, E] in the engine's expert order."""
    return f"router_logits.{layer}"
