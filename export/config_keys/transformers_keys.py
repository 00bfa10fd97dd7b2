"""What transformers 5.24.0 does with the keys of config.json. Written by ci/transformers_keys.py.

FIELDS: class -> key -> default in the configuration class. LOOKED_UP: names that transformers looks up in a
configuration of any of these classes while it loads a model, computes and generates. ATTRIBUTES: names of the classes
themselves, which a key of config.json would overwrite. ALIASES: class -> key -> the field that transformers sets
instead. GENERATION: keys of generation_config.json, which older files have in config.json.
"""
# ruff: noqa: SIM905

from __future__ import annotations

from typing import Any

VERSION = "5.24.0"
GENERATION = frozenset(
    """
    _from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id cache_config cache_implementation
    compile_config constraints continuous_batching_config decoder_start_token_id disable_compile diversity_penalty
    do_sample dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids forced_bos_token_id
    forced_eos_token_id guidance_scale is_assistant length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_logits output_scores pad_token_id penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
    sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind temperature token_healing top_h
    top_k top_p transformers_version typical_p use_cache use_mtp watermarking_config
    """.split()
)
LOOKED_UP = frozenset(
    """
    _attn_implementation_internal _experts_implementation_internal _heterogeneity_spec _name_or_path
    _output_attentions _post_init_done _rope_type_labels assistant_confidence_threshold assistant_lookbehind
    attention_chunk_size auto_map bad_words_ids begin_suppress_tokens decoder diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id fusion_config generator
    gradient_checkpointing head_dim is_causal kv_sharing_modes layer_types length_penalty max_length min_length
    mlp_layer_types mtp_layer_types no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_heads num_local_experts num_return_sequences original_max_position_embeddings
    output_scores partial_rotary_factor quantization_config remove_invalid_values repetition_penalty
    return_dict_in_generate rope_theta sliding_window suppress_tokens target_lookbehind temperature text_config
    top_k top_p transformers_weights typical_p vision_aspect_ratio vision_feature_layer
    vision_feature_select_strategy
    """.split()
)
ATTRIBUTES = frozenset(
    """
    _attn_implementation _auto_class _check_received_keys _decode_special_floats _dict_from_json_file
    _encode_special_floats _experts_implementation _get_config_dict _get_files_timestamps _get_generation_parameters
    _getattr_without_heterogeneous_validation _hasattr_without_heterogeneous_validation
    _iter_config_keys_with_heterogeneous_adjustment _remove_keys_not_serialized _update_heterogeneous_to_dict_output
    _upload_modified_files _validate_axial_rope_parameters _validate_default_rope_parameters
    _validate_dynamic_rope_parameters _validate_linear_rope_parameters _validate_llama3_rope_parameters
    _validate_longrope_rope_parameters _validate_proportional_rope_parameters _validate_yarn_rope_parameters
    allow_global_per_layer_attribute_access attribute_map base_config_key base_model_ep_plan base_model_fsdp_plan
    base_model_pp_plan base_model_tp_plan convert_rope_params_to_dict default_config_fields default_rope_type
    default_theta dict_dtype_to_str extra_config_files extra_files from_dict from_json_file from_pretrained
    get_config_dict get_mtp_config get_text_config ignore_keys_at_rope_validation is_custom_code is_heterogeneous
    is_remote_code model_type name_or_path nested_rope_parameter_keys num_labels output_attentions
    per_layer_attributes per_layer_config push_to_hub register_for_auto_class rope_scaling save_pretrained
    serialize_explicit_per_layer_config standardize_rope_params sub_configs sub_configs_defaults to_dict
    to_diff_dict to_json_file to_json_string torch_dtype update update_from_string use_return_dict validate
    validate_architecture validate_layer_type validate_output_attentions validate_rope validate_token_ids
    """.split()
)
ALIASES: dict[str, dict[str, str]] = {
    "GptOssConfig": {"num_experts": "num_local_experts"},
    "GraniteMoeConfig": {},
    "LlamaConfig": {},
    "MistralConfig": {},
    "MixtralConfig": {"num_experts": "num_local_experts"},
    "OlmoeConfig": {"num_local_experts": "num_experts"},
    "PhiConfig": {},
    "Qwen3MoeConfig": {"num_experts": "num_local_experts"},
}
FIELDS: dict[str, dict[str, Any]] = {
    "GptOssConfig": {
        "architectures": None,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "eos_token_id": None,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "is_encoder_decoder": False,
        "label2id": None,
        "layer_types": None,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "output_hidden_states": False,
        "output_router_logits": False,
        "pad_token_id": None,
        "problem_type": None,
        "return_dict": True,
        "rms_norm_eps": 1e-05,
        "rope_parameters": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 201088,
    },
    "GraniteMoeConfig": {
        "architectures": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 1.0,
        "bos_token_id": 1,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "embedding_multiplier": 1.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "is_encoder_decoder": False,
        "label2id": None,
        "logits_scaling": 1.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "num_local_experts": 8,
        "output_hidden_states": False,
        "output_router_logits": False,
        "pad_token_id": None,
        "problem_type": None,
        "residual_multiplier": 1.0,
        "return_dict": True,
        "rms_norm_eps": 1e-06,
        "rope_parameters": None,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "LlamaConfig": {
        "architectures": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "is_encoder_decoder": False,
        "label2id": None,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "output_hidden_states": False,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "problem_type": None,
        "return_dict": True,
        "rms_norm_eps": 1e-06,
        "rope_parameters": None,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "MistralConfig": {
        "architectures": None,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "is_encoder_decoder": False,
        "label2id": None,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "output_hidden_states": False,
        "pad_token_id": None,
        "problem_type": None,
        "return_dict": True,
        "rms_norm_eps": 1e-06,
        "rope_parameters": None,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "MixtralConfig": {
        "architectures": None,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "is_encoder_decoder": False,
        "label2id": None,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_hidden_states": False,
        "output_router_logits": False,
        "pad_token_id": None,
        "problem_type": None,
        "return_dict": True,
        "rms_norm_eps": 1e-05,
        "rope_parameters": None,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "OlmoeConfig": {
        "architectures": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "chunk_size_feed_forward": 0,
        "clip_qkv": None,
        "dtype": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "is_encoder_decoder": False,
        "label2id": None,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": None,
        "output_hidden_states": False,
        "output_router_logits": False,
        "pad_token_id": 1,
        "problem_type": None,
        "return_dict": True,
        "rms_norm_eps": 1e-05,
        "rope_parameters": None,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 50304,
    },
    "PhiConfig": {
        "architectures": None,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "chunk_size_feed_forward": 0,
        "dtype": None,
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "gelu_new",
        "hidden_size": 2048,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "is_encoder_decoder": False,
        "label2id": None,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": None,
        "output_hidden_states": False,
        "pad_token_id": None,
        "problem_type": None,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "return_dict": True,
        "rope_parameters": None,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "vocab_size": 51200,
    },
    "Qwen3MoeConfig": {
        "architectures": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "chunk_size_feed_forward": 0,
        "decoder_sparse_step": 1,
        "dtype": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "id2label": None,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "is_encoder_decoder": False,
        "label2id": None,
        "max_position_embeddings": 32768,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "output_hidden_states": False,
        "output_router_logits": False,
        "pad_token_id": None,
        "problem_type": None,
        "return_dict": True,
        "rms_norm_eps": 1e-06,
        "rope_parameters": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": None,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
