"""Stands for tensorrt_llm/runtime/model_runner_cpp.py: generation from an engine directory, with upstream's arguments,
limits and result keys. mpirun must have started a process a rank; here the first runs the ranks of all, and the others
give nothing, as they do upstream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tensorrt_llm._utils import absent, mpi_world
from tensorrt_llm.builder import EngineConfig
from tensorrt_llm.runtime.executor import Executor, Response

Tensor = torch.Tensor


class ModelRunnerCpp:
    def __init__(
        self,
        executor: Executor | None,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_beam_width: int,
        model_config: EngineConfig,
        world_config: Any,
        use_kv_cache: bool,
        lora_manager: Any = None,
    ) -> None:
        self.session, self.model_config, self.mapping = executor, model_config, world_config
        self.max_batch_size, self.max_input_len = max_batch_size, max_input_len
        self.max_seq_len, self.max_beam_width = max_seq_len, max_beam_width
        self.use_kv_cache, self.lora_manager = use_kv_cache, lora_manager
        self.gather_generation_logits = False

    @classmethod
    def from_dir(
        cls,
        engine_dir: str,
        *,
        lora_dir: str | None = None,
        rank: int = 0,
        max_batch_size: int | None = None,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
        max_beam_width: int | None = None,
        max_attention_window_size: list[int] | None = None,
        sink_token_length: int | None = None,
        kv_cache_free_gpu_memory_fraction: float | None = None,
        cross_kv_cache_fraction: float | None = None,
        medusa_choices: list[list[int]] | None = None,
        eagle_choices: list[list[int]] | None = None,
        eagle_posterior_threshold: float | None = None,
        eagle_use_dynamic_tree: bool = False,
        eagle_dynamic_tree_max_top_k: int | None = None,
        lookahead_config: list[int] | None = None,
        debug_mode: bool = False,
        lora_ckpt_source: str = "hf",
        use_gpu_direct_storage: bool = False,
        gpu_weights_percent: float = 1,
        max_tokens_in_paged_kv_cache: int | None = None,
        kv_cache_enable_block_reuse: bool = False,
        enable_chunked_context: bool = False,
        is_enc_dec: bool = False,
        multi_block_mode: bool = True,
        enable_context_fmha_fp32_acc: bool | None = None,
        cuda_graph_mode: bool | None = None,
        logits_processor_map: dict[str, Any] | None = None,
        device_ids: list[int] | None = None,
        is_orchestrator_mode: bool = False,
        use_runtime_defaults: bool = True,
        gather_generation_logits: bool = False,
        use_variable_beam_width_search: bool = False,
        mm_embedding_offloading: bool = False,
        fail_fast_on_attention_window_too_large: bool = False,
    ) -> ModelRunnerCpp:
        """Raises KeyError for an architecture that this process has not registered, RuntimeError where there are not as
        many processes as ranks (cpp/tensorrt_llm/runtime/worldConfig.cpp)."""
        config = EngineConfig.from_json_file(str(Path(engine_dir) / "config.json"))
        build, mapping = config.build_config, config.pretrained_config.mapping
        world_rank, world_size = mpi_world()
        if world_size != mapping.world_size:
            raise RuntimeError(f"Assertion failed: mpiSize == tp * pp * cp ({world_size} vs. {mapping.world_size})")
        assert rank == world_rank
        assert max_batch_size is None or max_batch_size <= build.max_batch_size
        assert max_beam_width is None or max_beam_width <= build.max_beam_width
        max_input_len = build.max_input_len if max_input_len is None else max_input_len
        max_seq_len = build.max_seq_len
        if max_output_len is not None:
            max_seq_len = max_input_len + max_output_len
            assert max_seq_len <= build.max_seq_len
        runner = cls(
            Executor(engine_dir) if rank == 0 else None,
            build.max_batch_size if max_batch_size is None else max_batch_size,
            max_input_len,
            max_seq_len,
            build.max_beam_width if max_beam_width is None else max_beam_width,
            config,
            mapping,
            use_kv_cache=True,
        )
        runner.gather_generation_logits = gather_generation_logits or build.gather_generation_logits
        return runner

    @property
    def gather_context_logits(self) -> bool:
        return self.model_config.build_config.gather_context_logits

    @property
    def vocab_size(self) -> int:
        return self.model_config.pretrained_config.vocab_size

    def generate(
        self,
        batch_input_ids: list[Tensor],
        *,
        position_ids: list[Tensor] | None = None,
        encoder_input_ids: list[Tensor] | None = None,
        encoder_input_features: list[Tensor] | None = None,
        encoder_output_lengths: list[int] | None = None,
        cross_attention_masks: list[Tensor] | None = None,
        mrope_params: Any = None,
        sampling_config: Any = None,
        lora_uids: list[Any] | None = None,
        lookahead_config: list[int] | None = None,
        streaming: bool = False,
        stopping_criteria: Any = None,
        logits_processor_names: list[str] | None = None,
        max_new_tokens: int = 1,
        end_id: int | None = None,
        pad_id: int | None = None,
        bad_words_list: list[list[int]] | None = None,
        stop_words_list: list[list[int]] | None = None,
        return_dict: bool = False,
        output_sequence_lengths: bool = False,
        output_generation_logits: bool = False,
        output_log_probs: bool = False,
        output_cum_log_probs: bool = False,
        prompt_table: Any = None,
        prompt_tasks: str | None = None,
        input_token_extra_ids: list[list[int]] | None = None,
        return_all_generated_tokens: bool = False,
        language_adapter_uids: list[int] | None = None,
        mm_embedding_offloading: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Greedy answers: int32 [batch, 1, max_seq_len], or with return_dict the results by name."""
        absent(
            streaming=streaming, top_k=kwargs.get("top_k", 1) != 1, stop_words_list=stop_words_list,
            bad_words_list=bad_words_list, prompt_table=prompt_table, lora_uids=lora_uids,
        )  # fmt: skip
        if self.session is None:
            return []
        self._check(batch_input_ids, max_new_tokens, kwargs.get("num_beams", 1))
        responses = [self.session.generate(ids.tolist(), max_new_tokens, end_id) for ids in batch_input_ids]
        output_ids = torch.tensor(
            [[r.token_ids + [end_id] * (self.max_seq_len - len(r.token_ids))] for r in responses], dtype=torch.int32
        )
        if not return_dict:
            return output_ids
        outputs: dict[str, Any] = {"output_ids": output_ids}
        if output_sequence_lengths:
            lengths = [[len(response.token_ids)] for response in responses]
            outputs["sequence_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        if self.gather_context_logits:
            outputs["context_logits"] = [response.context_logits for response in responses]
        if self.gather_generation_logits or output_generation_logits:
            outputs["generation_logits"] = _padded_logits(responses)
        return outputs

    def _check(self, batch_input_ids: list[Tensor], max_new_tokens: int, num_beams: int) -> None:
        longest = max(len(ids) for ids in batch_input_ids)
        limits = (
            ("Input batch size", len(batch_input_ids), self.max_batch_size),
            ("Maximum input length", longest, self.max_input_len),
            ("Maximum input length + maximum new tokens", longest + max_new_tokens, self.max_seq_len),
            ("Num beams", num_beams, self.max_beam_width),
        )
        for what, found, limit in limits:
            if found > limit:
                raise RuntimeError(f"{what} ({found}) exceeds the engine or specified limit ({limit})")


def _padded_logits(responses: list[Response]) -> Tensor:
    """[batch, 1, longest answer, V], zeros after an answer's end."""
    longest = max(len(response.generation_logits) for response in responses)
    width = responses[0].generation_logits.shape[-1]
    padded = torch.zeros(len(responses), 1, longest, width)
    for row, response in zip(padded, responses, strict=True):
        row[0, : len(response.generation_logits)] = response.generation_logits
    return padded
