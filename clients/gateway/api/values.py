"""What completions and chats read of a body in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clients.gateway.api.fields import Fields
from clients.gateway.api.guides import check_format
from clients.gateway.api.sampling import check_routing, required_model
from clients.gateway.guard import Record
from clients.gateway.state import Gateway


async def read_values(
    gateway: Gateway, record: Record, body: Mapping[str, Any], fields: Fields
) -> tuple[str, Mapping[str, Any]]:
    """The model and the values of a body's fields, checked against what the model's server has. Raises ApiError."""
    values = fields.read(body)
    record.model = model = required_model(values)
    gateway.check_model(model)
    await check_routing(gateway, model, values)
    await check_format(gateway, model, values)
    return model, values
