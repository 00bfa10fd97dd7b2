"""Reads golden.npz, runs an engine on its tokens, and compares the engine's logits with the golden logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from device_engine import SCORING_GRAPH, SERVING_GRAPH, Decoder, Facts, open_graph


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The contents of golden.npz: logits [S, V] and router logits [L, S, E] of S tokens, limits of the comparison's
    figures, and the bytes of weights by the operation that reads them."""

    token_ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    router_logits: npt.NDArray[np.float32]
    limits: dict[str, float]
    source: str
    expert_bytes: int
    embedding_bytes: int
    other_bytes: int


def read_golden(path: Path) -> Golden:
    with np.load(path, allow_pickle=False) as stored:
        return Golden(
            **{name: stored[name] for name in ("token_ids", "logits", "router_logits")},
            **{name: int(stored[name]) for name in ("expert_bytes", "embedding_bytes", "other_bytes")},
            limits=json.loads(str(stored["limits"])),
            source=str(stored["source"]),
        )


def score(facts: Facts, golden: Golden, provider: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Logits [S, V] and router logits [L, S, E], in the checkpoint's expert order, of the golden tokens."""
    session = open_graph(facts.folder / SCORING_GRAPH, provider)
    ids = golden.token_ids.reshape(1, -1)
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), np.float16)
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {item.name: empty for item in session.get_inputs() if item.name.startswith("past_key_values.")}
    routers = [f"router_logits.{layer}" for layer in range(facts.num_layers if facts.num_experts else 0)]
    logits, *routed = session.run(["logits", *routers], feeds)
    places = np.argsort(facts.expert_order)
    return logits[0], np.stack(routed)[..., places] if routed else golden.router_logits


def decode(facts: Facts, golden: Golden, provider: str) -> npt.NDArray[Any]:
    """Logits [S - S/2 + 1, V] of the serving graph: one row from prefilling the first half of the golden tokens, then
    one row for each decoded token of the second half."""
    session = open_graph(facts.folder / SERVING_GRAPH, provider)
    ids = golden.token_ids.reshape(1, -1)
    decoder, half = Decoder(session, facts, provider, 1, ids.shape[1]), ids.shape[1] // 2
    rows = []
    for part in (ids[:, :half], *np.split(ids[:, half:], ids.shape[1] - half, axis=1)):
        decoder.run(part)
        rows.append(decoder.logits.numpy()[0, 0].copy())
    return np.stack(rows)


def divergence(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Mean Kullback-Leibler divergence KL(expected, found) in nats."""
    found_log, expected_log = log_softmax(found), log_softmax(expected)
    return float((np.exp(expected_log) * (expected_log - found_log)).sum(-1).mean())


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def chosen(router: npt.NDArray[Any], experts_per_token: int) -> npt.NDArray[np.int64]:
    """The indices of the K experts with the largest logits, ascending. Of equal logits the lowest index is chosen."""
    return np.sort(np.argsort(-router, axis=-1, kind="stable")[..., :experts_per_token], axis=-1)


def compare(facts: Facts, golden: Golden, provider: str) -> dict[str, Any]:
    """The figures of the comparison, and in `failures` those past the limits in golden.npz. NaN is past every limit."""
    with np.errstate(invalid="ignore"):
        return _figures(facts, golden, provider)


def _figures(facts: Facts, golden: Golden, provider: str) -> dict[str, Any]:
    logits, routed = score(facts, golden, provider)
    decoded = decode(facts, golden, provider)
    same = chosen(routed, facts.experts_per_token) == chosen(golden.router_logits, facts.experts_per_token)
    figures = {
        "mean_kl": divergence(logits, golden.logits),
        "mean_decoded_kl": divergence(decoded, golden.logits[-len(decoded) :]),
        "max_logit_difference": float(np.abs(logits - golden.logits).max()),
        "top1_agreement": float((logits.argmax(-1) == golden.logits.argmax(-1)).mean()),
        "routing_agreement": float(same.all(-1).mean()) if facts.num_experts else 1.0,
    }
    failures = []
    for name, limit in golden.limits.items():
        found = figures[name]
        good = found >= limit if name.endswith("agreement") else found <= limit
        if not good:
            failures.append(f"{name} {found:.3g}, limit {limit:.3g}")
    return {"golden": golden.source, "tokens": len(golden.token_ids), **figures, "limits": golden.limits,
            "failures": failures}  # fmt: skip
