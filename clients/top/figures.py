"""The figures of each engine of a server: one object for a program to read and for the screen to draw.

A figure is None where the server does not publish it. What a server of ONNX Runtime publishes is in
docs/operations.md. TensorRT-LLM's backend has gauges of its own (`nv_trt_llm_...`), and any Triton counts requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from clients.top.scrape import Change, History, Scrape

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
ONNX, TENSORRT_LLM, TRITON = "ONNX Runtime", "TensorRT-LLM", "Triton"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one engine does. Seconds, bytes, and rates a second over the last interval; percentiles, shares and the
    experts' load over `window_s`, or since the server's start where that is None."""

    model: str
    kind: str  # ONNX, TENSORRT_LLM or TRITON
    streams: float | None = None  # sequences that are computed
    slots: float | None = None
    waiting: float | None = None
    waiting_limit: float | None = None
    requests_running: float | None = None
    counts_tokens: bool = False  # whether the server publishes what rates of tokens are computed from
    output_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    steps_per_s: float | None = None
    first_token_s: Mapping[str, float | None] = field(default_factory=dict)
    between_tokens_s: Mapping[str, float | None] = field(default_factory=dict)
    queue_s: Mapping[str, float | None] = field(default_factory=dict)
    step_s: Mapping[str, float | None] = field(default_factory=dict)
    cache_held_bytes: float | None = None
    cache_reserved_bytes: float | None = None
    cache_budget_bytes: float | None = None
    cache_used_share: float | None = None  # of blocks, where a server counts blocks
    cache_max_tokens: float | None = None
    prefix_kept_tokens: float | None = None
    prefix_kept_bytes: float | None = None
    prefix_hit_share: float | None = None  # of the prompts' tokens
    drafts_accepted_share: float | None = None  # of the drafted tokens
    drafts_per_s: float | None = None
    ended_per_s: Mapping[str, float] = field(default_factory=dict)
    refused_per_s: Mapping[str, float] = field(default_factory=dict)
    refused_total: float | None = None
    restarts: float | None = None
    # By layer of the checkpoint, the tokens that each expert got as a multiple of an equal share.
    expert_load: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    window_s: float | None = None

    def as_json(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def lacks(self) -> list[str]:
        """What the server does not publish of this engine."""
        wanted = {
            "streams": self.streams,
            "queue": self.waiting,
            "tokens/s": self.counts_tokens or None,
            "first token": self.first_token_s or None,
            "between tokens": self.between_tokens_s or None,
            "cache": self.cache_budget_bytes or self.cache_used_share,
            "prefix hits": self.prefix_kept_tokens,
            "expert load": self.expert_load or None,
        }
        return [name for name, value in wanted.items() if value is None]


def figures(history: History, *, since_start: bool = False) -> list[Figures]:
    """The figures of every engine, in the order of names. `since_start` counts percentiles and experts since the
    server's start instead of within the window."""
    now = history.newest
    last = history.last or Change(now, now)
    window = Change(Scrape(at_s=now.at_s), now) if since_start else history.whole or Change(now, now)
    has_rates = history.last is not None
    ours = now.models("moeship_steps_total")
    theirs = now.models("nv_trt_llm_request_metrics") - ours
    found = [_onnx(model, now, last, window, has_rates=has_rates) for model in ours]
    found += [_tensorrt_llm(model, now, last, has_rates=has_rates) for model in theirs]
    if not found:
        found = [_triton(model, now, last, has_rates=has_rates) for model in now.models("nv_inference_request_success")]
    whole = None if since_start else history.whole.seconds if history.whole else None
    return [replace(each, window_s=whole) for each in sorted(found, key=lambda each: each.model)]


def _onnx(model: str, now: Scrape, last: Change, window: Change, *, has_rates: bool) -> Figures:
    def gauge(name: str) -> float | None:
        return now.value(f"moeship_{name}", model)

    def rate(name: str) -> float | None:
        return last.rate(f"moeship_{name}", model) if has_rates else None

    def rates(name: str, label: str) -> dict[str, float]:
        grown = last.grown_by(f"moeship_{name}", model, label)
        return {key: value / last.seconds for (key,), value in grown.items()} if has_rates else {}

    def percentiles(name: str) -> dict[str, float | None]:
        return {key: window.quantile(f"moeship_{name}", model, share) for key, share in SHARES.items()}

    def share(part: str, whole: str) -> float | None:
        total = window.grown(f"moeship_{whole}", model)
        return (window.grown(f"moeship_{part}", model) or 0.0) / total if total else None

    return Figures(
        model=model,
        kind=ONNX,
        streams=gauge("sequences_running"),
        slots=gauge("slots"),
        waiting=gauge("requests_waiting"),
        waiting_limit=gauge("requests_waiting_limit"),
        requests_running=gauge("requests_running"),
        counts_tokens=gauge("output_tokens_total") is not None,
        output_tokens_per_s=rate("output_tokens_total"),
        prompt_tokens_per_s=rate("prompt_tokens_total"),
        steps_per_s=rate("steps_total"),
        first_token_s=percentiles("first_token_seconds"),
        between_tokens_s=percentiles("between_tokens_seconds"),
        queue_s=percentiles("queue_seconds"),
        step_s=percentiles("step_seconds"),
        cache_held_bytes=gauge("kv_held_bytes"),
        cache_reserved_bytes=gauge("kv_reserved_bytes"),
        cache_budget_bytes=gauge("kv_budget_bytes"),
        prefix_kept_tokens=gauge("prefix_kept_tokens"),
        prefix_kept_bytes=gauge("prefix_kept_bytes"),
        prefix_hit_share=share("prefix_reused_tokens_total", "prefix_asked_tokens_total"),
        drafts_accepted_share=share("draft_accepted_tokens_total", "draft_tokens_total"),
        drafts_per_s=rate("draft_tokens_total"),
        ended_per_s=rates("requests_ended_total", "end"),
        refused_per_s=rates("requests_refused_total", "reason"),
        refused_total=gauge("requests_refused_total"),
        restarts=gauge("server_restarts_total"),
        expert_load=_expert_load(window.grown_by("moeship_expert_tokens_total", model, "layer", "expert")),
    )


def _expert_load(tokens: Mapping[tuple[str, ...], float]) -> dict[int, tuple[float, ...]]:
    by_layer: dict[int, dict[int, float]] = {}
    for (layer, expert), count in tokens.items():
        if layer.isdecimal() and expert.isdecimal():
            by_layer.setdefault(int(layer), {})[int(expert)] = count
    return {
        layer: tuple(
            counts.get(expert, 0.0) * (max(counts) + 1) / (sum(counts.values()) or 1.0)
            for expert in range(max(counts) + 1)
        )
        for layer, counts in sorted(by_layer.items())
    }


def _tensorrt_llm(model: str, now: Scrape, last: Change, *, has_rates: bool) -> Figures:
    """The gauges of Triton's backend for TensorRT-LLM. Those of waiting requests came with its release 25.03."""

    def requests(kind: str) -> float | None:
        return now.value("nv_trt_llm_request_metrics", model, request_type=kind)

    def blocks(kind: str) -> float | None:
        return now.value("nv_trt_llm_kv_cache_block_metrics", model, kv_cache_block_type=kind)

    running, active, waiting = requests("scheduled"), requests("active"), requests("waiting")
    if waiting is None and running is not None and active is not None:
        waiting = max(0.0, active - running)
    used, most, size = blocks("used"), blocks("max"), blocks("tokens_per")
    lengths = {side: last.rate(f"nv_llm_{side}_token_len_sum", model) for side in ("input", "output")}
    general = last.rate("nv_trt_llm_general_metrics", model, general_type="iteration_counter")
    return Figures(
        model=model,
        kind=TENSORRT_LLM,
        streams=running,
        slots=requests("max"),
        waiting=waiting,
        requests_running=active,
        counts_tokens=now.value("nv_llm_output_token_len_sum", model) is not None,
        output_tokens_per_s=lengths["output"] if has_rates else None,
        prompt_tokens_per_s=lengths["input"] if has_rates else None,
        steps_per_s=general if has_rates else None,
        cache_used_share=used / most if used is not None and most else None,
        cache_max_tokens=most * size if most is not None and size is not None else None,
        ended_per_s=_requests(model, last, has_rates=has_rates),
    )


def _triton(model: str, now: Scrape, last: Change, *, has_rates: bool) -> Figures:
    """What any Triton counts of a model."""
    return Figures(
        model=model,
        kind=TRITON,
        waiting=now.value("nv_inference_pending_request_count", model),
        ended_per_s=_requests(model, last, has_rates=has_rates),
    )


def _requests(model: str, last: Change, *, has_rates: bool) -> dict[str, float]:
    if not has_rates:
        return {}
    return {
        "success": last.rate("nv_inference_request_success", model) or 0.0,
        "failure": last.rate("nv_inference_request_failure", model) or 0.0,
    }
