"""Refuses, by name, options that an engine or a layout cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from triton_repo.runtime.options import GenerationOptions, GenerationPlan, refusal

# Tensor by which a request asks for a feature, to what the options say of it and what a request without it says.
_ASKS: dict[str, Callable[[GenerationOptions], tuple[object, object]]] = {
    "min_p": lambda options: (options.min_p, 0.0),
    "logit_bias_ids": lambda options: (f"{len(options.logit_bias)} ids", "0 ids"),
    "embedding_bias_words": lambda options: (f"{len(options.embedding_bias)} words", "0 words"),
    "num_log_probs": lambda options: (options.num_log_probs, 0),
    "return_prompt_log_probs": lambda options: (str(options.return_prompt_log_probs).lower(), "false"),
    "return_routed_experts": lambda options: (str(options.return_routed_experts).lower(), "false"),
    "num_return_sequences": lambda options: (options.num_return_sequences, 1),
}
# What TensorRT-LLM's engines are not asked for. Its Triton model `tensorrt_llm` has no tensors for min-p, for
# log-probabilities of other tokens than the chosen one, for those of a prompt, and for the routing. The others could be
# asked for; no test on a machine with TensorRT-LLM holds them here.
TENSORRT_LLM_LACKS = tuple(_ASKS)


def refuse_features(options: GenerationOptions, lacking: Iterable[str], who: str) -> None:
    """Raise RequestError for options that need one of the features `lacking`, which are names of tensors. `who` names
    the engine or layout that lacks them, at the start of a sentence without its verb."""
    found = {name: _ASKS[name](options) for name in lacking}
    problems = [
        f"{name}: found {value}, expected {neutral}; {who} does not serve it: leave it out"
        for name, (value, neutral) in found.items()
        if value != neutral
    ]
    if problems:
        raise refusal(problems)


def refuse_routing(asked: bool, *, given: bool) -> None:
    """Raise RequestError for a request for the experts of its tokens, if the engine does not give the logits of its
    routers."""
    if asked and not given:
        raise refusal(
            [
                "return_routed_experts: found true, expected false; this engine gives no logits of routers, since it "
                "has none or was built by a release whose steps have no such output: leave it out"
            ]
        )


def refuse_minimum_of_several(plan: GenerationPlan) -> None:
    """Raise RequestError for a minimum of new tokens if several tokens may end the answer. TensorRT-LLM would hold back
    only the first of them until the minimum is reached (NVIDIA/TensorRT-LLM#4776)."""
    least, end_ids = plan.options.min_length, plan.end_ids
    if least and len(end_ids) > 1:
        raise refusal(
            [
                f"min_tokens: found {least} beside the end tokens {', '.join(map(str, end_ids[:8]))}, expected 0: "
                "TensorRT-LLM applies it to one end token only; name one in end_id, or leave min_tokens out"
            ]
        )
