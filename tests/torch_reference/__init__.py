"""transformers' own model of a checkpoint, in float32 on the CPU: what tests and programs of ci/ compare with.

It shares only the reading of tensors with engines and with `export.reference`: transformers reads config.json itself,
independently of the facts that the engine was built from. The family's record in `tests/transformers_models.py` names
transformers' class and the names of the tensors in it. Where transformers lacks a module of a family, a module of
this package adds it. As in every engine, the router chooses the lowest expert index among equal
logits.

This module imports torch and transformers, which the extra `transformers` installs. No command of moeship uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers_models import TRANSFORMERS_MODELS

from export.checkpoint.tensor_table import Join
from export.families import Model

FloatArray = npt.NDArray[np.float32]

_LOADING_KEYS = (
    "dtype", "torch_dtype", "auto_map", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "is_encoder_decoder", "chunk_size_feed_forward", "problem_type",
)  # fmt: skip


def load_reference(model: Model) -> PreTrainedModel:
    """Load the checkpoint as a complete transformers model in float32, which has `generate` too."""
    record = TRANSFORMERS_MODELS[model.family.name]
    model_class = getattr(transformers, record.model)
    config = _config(model, model_class.config_class)
    with torch.device("meta"):
        reference = model_class(config).eval()
    if record.additions is not None:
        importlib.import_module(f"torch_reference.{record.additions}").add(reference, model)
    layers = [dict(layer.named_modules()) for layer in reference.model.layers]
    routers = [modules[record.router] for modules in layers if record.router is not None and record.router in modules]
    if len(routers) != model.architecture.num_mixtures:
        raise AssertionError(
            f"the reference and the family disagree: {len(routers)} layers of {record.model} have the router "
            f"{record.router}, expected {model.architecture.num_mixtures}"
        )
    if record.additions is None:  # an added mixture settles it itself
        for router in routers:
            _prefer_the_lowest(router)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    _, unexpected = reference.load_state_dict(dict(_state(model)), strict=False, assign=True)
    tensors = chain(reference.named_parameters(), reference.named_buffers())
    absent = [name for name, tensor in tensors if tensor.is_meta]
    if absent or unexpected:
        raise AssertionError(f"the reference and the table disagree: missing {absent}, unexpected {unexpected}")
    return reference


class ByTransformers:
    """A transformers model in the place of an `export.reference.model.Reference`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def run(
        self, windows: Sequence[Sequence[int]], progress: Callable[[str], None] = lambda _: None
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """As `export.reference.model.Reference.run`."""
        for index, window in enumerate(windows):
            progress(f"transformers computes window {index}")
            yield run_model(self._model, window)


def run_model(model: PreTrainedModel, window: Sequence[int]) -> tuple[FloatArray, FloatArray | None]:
    """A model's logits [S, V] and the router logits [M, S, E] of its M layers that have a router (None without)."""
    routed: list[FloatArray] = []

    def keep(_gate: nn.Module, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        logits = output if isinstance(output, torch.Tensor) else output[0]  # [S, E], first in a router's tuple
        routed.append(logits.numpy())

    paths = {record.router for record in TRANSFORMERS_MODELS.values()} - {None}
    layers = [dict(layer.named_modules()) for layer in model.model.layers]
    hooks = [layer[path].register_forward_hook(keep) for layer in layers for path in paths & layer.keys()]
    try:
        with torch.no_grad():
            logits = model(torch.tensor([list(window)]), use_cache=False).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, np.stack(routed) if routed else None


def _config(model: Model, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """The configuration that transformers reads from config.json, without the keys about loading the model and about
    what its calls return. The number of experts per token comes from `model`, as a build may have overridden it."""
    raw = TRANSFORMERS_MODELS[model.family.name].config(model.weights.checkpoint.config)
    config = config_class.from_dict({key: value for key, value in raw.items() if key not in _LOADING_KEYS})
    config._attn_implementation = "eager"
    if model.architecture.is_moe:
        config.num_experts_per_tok = model.architecture.experts_per_token
        config._experts_implementation = "eager"
    return config


def _state(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs of a transformers tensor name and its tensor; each tensor is loaded when the iterator reaches it."""
    record = TRANSFORMERS_MODELS[model.family.name]
    for name, spec in model.weights.table.items():
        theirs = record.name(name)
        if theirs is None:
            continue
        tensor = torch.from_numpy(model.weights.load(name))
        if "{}" in theirs:
            for letter, part in zip("qkv", tensor.split(model.architecture.qkv_rows), strict=True):
                yield theirs.format(letter), part.contiguous()
        elif spec.join is Join.INTERLEAVE:  # gate and up rows alternate here; transformers stores gate before up
            yield theirs, torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
        elif record.transposes and tensor.dim() == 3:
            yield theirs, tensor.transpose(1, 2).contiguous()
        else:
            yield theirs, tensor


class _StableTopK(TorchFunctionMode):
    """Makes torch.topk choose the lowest index among equal values; by itself torch.topk guarantees no order."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.topk, torch.Tensor.topk):
            return func(*args, **(kwargs or {}))
        return _stable_topk(*args, **(kwargs or {}))


def _stable_topk(values: torch.Tensor, k: int, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, places = torch.sort(values, dim=dim, descending=True, stable=True)
    return ordered.narrow(dim, 0, k), places.narrow(dim, 0, k)


def _prefer_the_lowest(router: nn.Module) -> None:
    """Make a transformers router choose the lowest expert index among equal logits."""
    forward = router.forward

    def settled(*args: Any, **kwargs: Any) -> Any:
        with _StableTopK():
            return forward(*args, **kwargs)

    router.forward = settled
