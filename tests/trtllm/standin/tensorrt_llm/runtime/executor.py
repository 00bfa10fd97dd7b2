"""Stands for the C++ executor: runs an engine's ranks, a request at a time, each as a prefill and steps of one token.

Greedy: of equal logits the lowest token. Where the prompt does not fit into max_num_tokens it is refused, as it is
upstream without chunked context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tensorrt_llm.builder import Engine
from tensorrt_llm.layers import KeyValueCacheParams
from tensorrt_llm.models import MODEL_MAP
from tensorrt_llm.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm.world import World, exchange

Tensor = torch.Tensor


@dataclass(frozen=True)
class Response:
    """Token ids with the prompt's first; logits [prompt, V] and [new, V], each of the position before. V is what the
    head has, filled up to a multiple of tp_size."""

    token_ids: list[int]
    context_logits: Tensor
    generation_logits: Tensor


def load_rank(engine_dir: str, rank: int) -> DecoderModelForCausalLM:
    """One rank's model with the parameters of its engine."""
    engine = Engine.from_dir(engine_dir, rank)
    config = engine.config.pretrained_config
    model = MODEL_MAP[config.architecture](config)
    parameters = engine.parameters()
    for name, parameter in model.named_parameters():
        if not parameter.is_buffer:
            parameter.dtype = parameters[name].dtype
            parameter.value = parameters[name]
    return model


def likeliest(logits: Tensor, vocab_size: int) -> int:
    """The token of the last position; what fills the vocabulary up is never one."""
    return int(logits[-1, :vocab_size].argmax())


class CachedSequence:
    """One sequence on one rank: its model and the cache that grows."""

    def __init__(self, model: DecoderModelForCausalLM) -> None:
        self.model, self.mapping = model, model.config.mapping
        self.presents: Sequence[tuple[Tensor, Tensor]] | None = None

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [new tokens, V], on whichever pipeline rank they arise handed to all."""
        shape = (len(token_ids), self.model.config.hidden_size)
        output, self.presents = self.model(
            input_ids=torch.tensor(token_ids),
            use_cache=True,
            kv_cache_params=KeyValueCacheParams(past_key_value=self.presents),
            hidden_states=None if self.mapping.is_first_pp_rank() else torch.empty(shape),
        )
        if not self.mapping.has_pp():
            return output
        found = exchange(output if self.mapping.is_last_pp_rank() else None, range(self.mapping.world_size))
        return next(logits for logits in reversed(found) if logits is not None)


class Executor:
    def __init__(self, engine_dir: str) -> None:
        config = Engine.from_dir(engine_dir).config
        self.config, self.world = config, World(config.pretrained_config.mapping.world_size)
        self.models = [load_rank(engine_dir, rank) for rank in range(self.world.size)]

    def generate(self, prompt: Sequence[int], max_new_tokens: int, end_id: int | None) -> Response:
        """What rank 0 has in the end. Raises RuntimeError for a prompt that the engine cannot take at once."""
        limit = self.config.build_config.max_num_tokens
        if len(prompt) > limit:
            raise RuntimeError(f"Prompt length ({len(prompt)}) exceeds maximum input length ({limit}).")

        def run(rank: int) -> Response:
            sequence, token_ids = CachedSequence(self.models[rank]), list(prompt)
            context = sequence.step(prompt)
            generated = []
            logits = context[-1:]
            while len(generated) < max_new_tokens:
                generated.append(logits)
                token_ids.append(likeliest(logits, self.config.pretrained_config.vocab_size))
                if token_ids[-1] == end_id or len(generated) == max_new_tokens:
                    break
                logits = sequence.step(token_ids[-1:])
            return Response(token_ids, context, torch.cat(generated))

        return self.world.run(run)[0]
