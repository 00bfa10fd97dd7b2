"""config.pbtxt as protobuf messages: builds Triton's ModelConfig, writes it as text, and reads it back.

The text is never put together by hand, so that a misspelt field or a wrong type fails here and not in the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import named
from export.files.reading import read_text
from export.optional import optional_package
from triton_repo.contracts.ensemble import ModelTensor
from triton_repo.contracts.model_parameters import ENGINE_KEY, ModelParameters
from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS, WireTensor
from triton_repo.errors import RepositoryError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

MAX_CONFIG_BYTES = 4 << 20
CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What differs between packaged models."""

    name: str
    max_batch: int
    parameters: ModelParameters
    provider: str = "cpu"
    unary: bool = False  # one response for each request, for Triton's plain infer


def model_config(model: ServedModel) -> ModelConfig:
    """The ModelConfig of a packaged engine: decoupled unless unary, with every tensor of contracts/wire.py.

    There is one instance on the CPU, or one on each GPU, and it computes many requests together. More instances would
    be more processes with queues of their own, and a request to stop another could reach the wrong one.
    """
    pb = messages()
    config = pb.ModelConfig(name=model.name, backend="python", max_batch_size=model.max_batch)
    declare(config, (*INPUTS, *COMPATIBILITY_INPUTS), (*OUTPUTS, *ADDED_OUTPUTS))
    kind = pb.ModelInstanceGroup.KIND_CPU if model.provider == "cpu" else pb.ModelInstanceGroup.KIND_GPU
    config.instance_group.add(kind=kind, count=1)
    config.model_transaction_policy.decoupled = not model.unary
    set_parameters(config, model.parameters.to_texts())
    return config


def declare(
    config: ModelConfig, inputs: Sequence[WireTensor | ModelTensor], outputs: Sequence[WireTensor | ModelTensor]
) -> None:
    """Add a model's inputs and outputs."""
    for tensor in inputs:
        added = config.input.add(
            name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims, optional=tensor.optional
        )
        if isinstance(tensor, ModelTensor):
            added.allow_ragged_batch = tensor.ragged
            if tensor.scalar:
                added.reshape.SetInParent()
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims)


def set_parameters(config: ModelConfig, texts: Mapping[str, str]) -> None:
    """Add a model's parameters. An empty text is a valid value."""
    for key, text in texts.items():
        config.parameters[key].string_value = text


def config_text(config: ModelConfig) -> str:
    """The text of config.pbtxt, with fields in the order of their numbers and parameters in the order of their keys."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config, use_short_repeated_primitives=True)
    return text


def read_config(path: Path) -> ModelConfig:
    """Parse a config.pbtxt. Raises RepositoryError for a file that is absent, unreadable or has unknown fields."""
    from google.protobuf import text_format

    text = read_text(path, "a model's configuration", most=MAX_CONFIG_BYTES, error=RepositoryError)
    try:
        return text_format.Parse(text, messages().ModelConfig())
    except (ValueError, OverflowError, RecursionError, text_format.ParseError) as error:
        raise RepositoryError(
            f"reading {named(path)}: not a model configuration that Triton takes ({named(error, 300)}); package the "
            "engine again"
        ) from error


def packaged_parameters(config: ModelConfig, model: str) -> ModelParameters | None:
    """The parameters of a model that moeship packaged; None for another maker's model. Raises RepositoryError."""
    if ENGINE_KEY not in config.parameters:
        return None
    texts = {key: value.string_value for key, value in config.parameters.items()}
    return ModelParameters.from_texts(texts, model)


def messages():  # type: ignore[no-untyped-def]  # noqa: ANN201 - a generated module
    """The module of Triton's message types. Raises MissingPackageError."""
    with optional_package("tritonclient[grpc]", "reading or writing a model's configuration", "client"):
        from tritonclient.grpc import model_config_pb2
    return model_config_pb2
