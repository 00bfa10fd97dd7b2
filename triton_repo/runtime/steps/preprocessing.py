"""The first step of an ensemble: turns text and options of a request into tensors for the engine, and a plan of the
answer.

    preprocessor = Preprocessor(tokenizer, parameters)
    tensors = preprocessor.prepare({"QUERY": array([[b"def "]], dtype=object), "REQUEST_OUTPUT_LEN": array([[32]])})

The names of tensors are those of contracts/ensemble.py. An option that has no effect is not sent. The engine is asked
to stream if the request streams, and if it has stop words, since a stop word in the text may end the answer at any
token. Otherwise the engine is asked for all tokens in one response, which costs the steps after it very little.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.ensemble import ANSWER, PREPROCESSING_OUTPUTS, QUERY_NAMES, STOP_REQUESTS
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.contracts.wire import NUMPY_DTYPES
from triton_repo.runtime.answer import answer_plan
from triton_repo.runtime.features import TENSORRT_LLM_LACKS, refuse_features, refuse_minimum_of_several
from triton_repo.runtime.guided.tensorrt_llm import check_plan
from triton_repo.runtime.options import NO_END_ID, GenerationOptions, plan_generation
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.stop_requests import STOPPED_PLAN
from triton_repo.runtime.text.prompt import most_bytes
from triton_repo.runtime.text.words import pack_words, spell

Tensors = dict[str, npt.NDArray[Any]]
_WIRE_NAMES = {name: wire_name for wire_name, name in QUERY_NAMES.items()}
_OUTPUT_DTYPES = {tensor.name: NUMPY_DTYPES[tensor.dtype] for tensor in PREPROCESSING_OUTPUTS}
_SEED_BITS = 64


class Preprocessor:
    """Reads requests for one model."""

    def __init__(self, tokenizer: Tokenizer, parameters: TextParameters) -> None:
        self._tokenizer = tokenizer
        self._parameters = parameters
        self._most_prompt_bytes = most_bytes(tokenizer, min(parameters.max_prompt, parameters.max_sequence - 1))
        # Ids without a text, which the engine must not choose. They are sent as bad words.
        self._unused_ids = tuple((token,) for token in range(tokenizer.size, parameters.num_ids))

    def prepare(self, tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """The outputs of preprocessing for its inputs. Raises RequestError that lists every problem of the request."""
        named = {_WIRE_NAMES[name]: tensor for name, tensor in tensors.items()}
        options = read_options(named, self._most_prompt_bytes)
        if not self._parameters.echoes_keys:
            refuse_features(options, TENSORRT_LLM_LACKS, "TensorRT-LLM's engine")
        plan = plan_generation(
            options,
            self._tokenizer,
            max_sequence=self._parameters.max_sequence,
            end_token_ids=self._parameters.end_ids,
            max_prompt=self._parameters.max_prompt,
        )
        if self._parameters.one_end_id:
            refuse_minimum_of_several(plan)
        if not self._parameters.echoes_keys:
            check_plan(plan, self._parameters.end_ids, served=self._parameters.guided)
        answer = answer_plan(plan, self._tokenizer)
        # An engine takes one end token. The others are sent as stop words.
        end_id, *more_end_ids = plan.end_ids or (NO_END_ID,)
        values: dict[str, Any] = {
            "INPUT_ID": [plan.prompt_ids],
            "REQUEST_INPUT_LEN": [[len(plan.prompt_ids)]],
            "REQUEST_OUTPUT_LEN": [[plan.most_tokens]],
            "OUT_END_ID": [[end_id]],
            "OUT_PAD_ID": [[max(end_id, 0)]],
            "STREAMING": [[answer.is_watched]],
            "RETURN_LOG_PROBS": [[options.return_log_probs]],
            **_sampling(plan.options),
            ANSWER.name: [[answer.to_json().encode()]],
        }
        if options.guided_decoding_guide_type:
            values["GUIDED_DECODING_GUIDE_TYPE"] = [[options.guided_decoding_guide_type.encode()]]
        if options.guided_decoding_guide:
            values["GUIDED_DECODING_GUIDE"] = [[options.guided_decoding_guide.encode()]]
        words = {
            "STOP_WORDS_IDS": (*answer.stop_tokens, *((token,) for token in more_end_ids)),
            "BAD_WORDS_IDS": (*spell(self._tokenizer, options.bad_words), *self._unused_ids),
        }
        if plan.options.logit_bias:
            biases = np.zeros((1, self._parameters.num_ids), dtype=np.float32)
            for token, bias in plan.options.logit_bias:
                biases[0, token] = bias
            values["EMBEDDING_BIAS"] = biases
        values |= {name: [pack_words(sequences)] for name, sequences in words.items() if sequences}
        return {name: np.array(value, dtype=_OUTPUT_DTYPES[name]) for name, value in values.items()}


def prepare_stop() -> Tensors:
    """The outputs of preprocessing for a request to stop others. It passes all steps as every request does, and the
    engine's response to it becomes the answer."""
    values: dict[str, Any] = {
        "INPUT_ID": [[0]],
        "REQUEST_INPUT_LEN": [[1]],
        "REQUEST_OUTPUT_LEN": [[1]],
        STOP_REQUESTS: [[True]],
        ANSWER.name: [[STOPPED_PLAN.to_json().encode()]],
    }
    return {name: np.array(value, dtype=_OUTPUT_DTYPES[name]) for name, value in values.items()}


def _sampling(options: GenerationOptions) -> dict[str, Any]:
    """The tensors that say how tokens are chosen, and what is told of them. An engine that gets neither top_k nor
    top_p is greedy, and one that gets no seed takes 0 (TensorRT-LLM, executor::SamplingConfig)."""
    penalties = {
        "REPETITION_PENALTY": (options.repetition_penalty, 1.0),
        "PRESENCE_PENALTY": (options.presence_penalty, 0.0),
        "FREQUENCY_PENALTY": (options.frequency_penalty, 0.0),
        "MIN_TOKENS": (options.min_length, 0),
        "NUM_LOG_PROBS": (options.num_log_probs, 0),
        "NUM_RETURN_SEQUENCES": (options.num_return_sequences, 1),
        "RETURN_PROMPT_LOG_PROBS": (options.return_prompt_log_probs, False),
        "RETURN_ROUTED_EXPERTS": (options.return_routed_experts, False),
    }
    values: dict[str, Any] = {name: [[value]] for name, (value, neutral) in penalties.items() if value != neutral}
    if options.sampling_temperature == 0:
        return {**values, "RUNTIME_TOP_K": [[1]]}
    seed = secrets.randbits(_SEED_BITS) if options.random_seed is None else options.random_seed
    return {
        **values,
        "RUNTIME_TOP_K": [[options.top_k]],
        "RUNTIME_TOP_P": [[options.top_p or 1.0]],
        "TEMPERATURE": [[options.sampling_temperature]],
        "SEED": [[seed]],
        **({"MIN_P": [[options.min_p]]} if options.min_p else {}),
    }
