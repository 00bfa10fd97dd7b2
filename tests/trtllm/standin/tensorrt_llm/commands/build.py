"""Stands for tensorrt_llm/commands/build.py: the program trtllm-build.

A class file is loaded under the module name `models` before config.json is read, and its class takes the place of the
one that MODEL_MAP names; the config class is looked up in MODEL_MAP all the same.
"""

from __future__ import annotations

import argparse
import copy
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tensorrt_llm._utils import device_count
from tensorrt_llm.bindings import KVCacheType
from tensorrt_llm.builder import BuildConfig, Engine, build
from tensorrt_llm.logger import logger
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
from tensorrt_llm.plugin import PluginConfig, add_plugin_argument

# Flags with a default of their own, and what type they parse.
_VALUES: dict[str, tuple[type, Any]] = {
    "checkpoint_dir": (str, None), "model_config": (str, None), "build_config": (str, None),
    "model_cls_file": (str, None), "model_cls_name": (str, None), "output_dir": (str, "engine_outputs"),
    "max_batch_size": (int, 2048), "max_input_len": (int, 1024), "max_seq_len": (int, None),
    "max_beam_width": (int, 1), "max_num_tokens": (int, 8192), "opt_num_tokens": (int, None),
    "max_encoder_input_len": (int, 1024), "max_prompt_embedding_table_size": (int, 0),
    "input_timing_cache": (str, None), "output_timing_cache": (str, "model.cache"),
    "profiling_verbosity": (str, "layer_names_only"), "workers": (int, 1), "log_level": (str, "info"),
    "visualize_network": (str, None), "logits_dtype": (str, None), "speculative_decoding_mode": (str, None),
    "max_draft_len": (int, 0),
}  # fmt: skip
_SWITCHES = (
    "strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output", "dry_run",
    "monitor_memory", "gather_context_logits", "gather_generation_logits", "gather_all_token_logits",
)  # fmt: skip


def parse_arguments() -> argparse.ArgumentParser:
    """The parser; its name is upstream's."""
    parser = argparse.ArgumentParser(prog="trtllm-build")
    choices = {"logits_dtype": ("float16", "float32"), "profiling_verbosity": ("layer_names_only", "detailed", "none")}
    for name, (kind, default) in _VALUES.items():
        parser.add_argument(f"--{name}", type=kind, default=default, choices=choices.get(name))
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    kinds = [kind.value for kind in KVCacheType]
    parser.add_argument("--kv_cache_type", type=str.lower, default=argparse.SUPPRESS, choices=kinds)
    add_plugin_argument(parser.add_argument_group("Plugin config arguments"))
    return parser


def load_class(path: str, name: str) -> Any:
    loader = SourceFileLoader("models", path)
    module = module_from_spec(spec_from_loader("models", loader))
    sys.modules["models"] = module
    loader.exec_module(module)
    return getattr(module, name)


def build_model(
    build_config: BuildConfig, rank: int, ckpt_dir: str | None, model_config: PretrainedConfig, model_cls: Any
) -> Engine:
    config = copy.deepcopy(model_config)
    config.set_rank(rank)
    if model_cls is None:
        assert config.architecture in MODEL_MAP, f"Unsupported model architecture: {config.architecture}"
        model_cls = MODEL_MAP[config.architecture]
    model = model_cls(config) if ckpt_dir is None else model_cls.from_checkpoint(ckpt_dir, config=config)
    return build(model, build_config)


def build_and_save(rank: int, output_dir: str, *arguments: Any) -> None:
    ckpt_dir, build_config, model_config, model_cls = arguments
    build_model(build_config, rank, ckpt_dir, model_config, model_cls).save(output_dir)


def parallel_build(world_size: int, workers: int, output_dir: str, *arguments: Any) -> None:
    """Every rank in turn, or in as many processes as there are workers, to which the class must be importable."""
    if workers == 1:
        for rank in range(world_size):
            build_and_save(rank, output_dir, *arguments)
        return
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(build_and_save, rank, output_dir, *arguments) for rank in range(world_size)]
    for future in futures:
        future.result()


def _build_config(args: argparse.Namespace) -> BuildConfig:
    names = set(BuildConfig.__dataclass_fields__) & set(vars(args)) - {"speculative_decoding_mode", "kv_cache_type"}
    values = {name: getattr(args, name) for name in names}
    if hasattr(args, "kv_cache_type"):
        values["kv_cache_type"] = KVCacheType(args.kv_cache_type)
    values["use_strip_plan"] = args.strip_plan
    return BuildConfig(**values, plugin_config=PluginConfig.from_arguments(args))


def main() -> None:
    args = parse_arguments().parse_args()
    logger.setLevel(args.log_level.upper())
    if args.gather_all_token_logits:
        args.gather_context_logits = args.gather_generation_logits = True
    model_cls = None
    if args.model_cls_file is not None:
        assert args.model_cls_name is not None
        model_cls = load_class(args.model_cls_file, args.model_cls_name)
    workers = min(device_count(), args.workers)
    source = args.checkpoint_dir if args.checkpoint_dir is not None else args.model_config
    is_config = source.lower().endswith(".json")
    model_config = PretrainedConfig.from_json_file(source if is_config else str(Path(source) / "config.json"))
    if args.logits_dtype is not None:
        model_config.logits_dtype = args.logits_dtype
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    ckpt_dir, build_config = None if is_config else source, _build_config(args)
    world_size = model_config.mapping.world_size
    parallel_build(world_size, workers, args.output_dir, ckpt_dir, build_config, model_config, model_cls)
    if build_config.output_timing_cache is not None and not build_config.dry_run:
        Path(build_config.output_timing_cache).write_bytes(b"")


if __name__ == "__main__":
    main()
