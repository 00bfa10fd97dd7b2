"""Guides that TensorRT-LLM's own guided decoding follows: what it is not asked for, and how the LLM API is asked.

TensorRT-LLM compiles a guide in the loop that computes all requests, so that a guide that it cannot read would harm
others (cpp/tensorrt_llm/batch_manager/guidedDecoder.cpp). What can be checked without its library is checked here.
"""

from __future__ import annotations

from typing import Any

from triton_repo.runtime.guided.grammars import check_guide
from triton_repo.runtime.options import NO_END_ID, GenerationPlan, refusal

FLAG = "--guided-decoding-backend xgrammar"


def check_plan(plan: GenerationPlan, model_end_ids: tuple[int, ...], *, served: bool) -> None:
    """Raise RequestError for a guide that TensorRT-LLM would not follow. `served`: whether the model was packaged with
    guided decoding. Its answers end at the model's own end tokens, whichever the request names."""
    options = plan.options
    if not options.guided_decoding_guide_type:
        return
    problems = []
    if not served:
        problems.append(
            f"guided_decoding_guide_type: found {options.guided_decoding_guide_type}, expected none; this model was "
            f"packaged without guided decoding: leave it out, or package it with {FLAG}"
        )
    elif options.end_id is not None and options.end_id not in model_end_ids:
        found = "none" if options.end_id == NO_END_ID else options.end_id
        problems.append(
            f"end_id: found {found} beside a guide, which ends at {', '.join(map(str, model_end_ids[:8]))} on "
            "TensorRT-LLM; leave it out"
        )
    if problems:
        raise refusal(problems)
    check_guide(options.guided_decoding_guide_type, options.guided_decoding_guide)


def llm_fields(guide_type: str, guide: str) -> dict[str, Any]:
    """The fields of the LLM API's GuidedDecodingParams (tensorrt_llm/sampling_params.py)."""
    if guide_type == "json":
        return {"json_object": True}
    return {{"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}[guide_type]: guide}
