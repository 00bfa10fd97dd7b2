"""`response_format`: what an answer is kept to, as the text contract's guide.

`json_object` is the contract's guide type `json`, and `json_schema` its type of the same name. Whether a schema can be
kept to is the server's to say (docs/guided-decoding.md); its refusal comes back with status 400.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clients.gateway.api import fields
from clients.gateway.errors import invalid, unsupported
from clients.gateway.state import Gateway
from triton_repo.contracts.wire import MOST_GUIDE_BYTES

FORMAT, GUIDE_TYPE = "response_format", "guided_decoding_guide_type"
_SCHEMA = fields.within(
    "json_schema",
    {"name": fields.text(64), "schema": fields.mapping},
    unread=frozenset({"description", "strict"}),
)


def read_format(value: Any) -> tuple[str, str]:  # noqa: ANN401 - JSON value
    """The guide's type and its text; two empty texts for an answer that is kept to nothing."""
    kind = fields.mapping(value).get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError("expected an object whose type is text, json_object or json_schema")
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if set(value) - known:
        raise ValueError(f"expected no other fields of {kind} than {', '.join(sorted(known))}")
    if kind != "json_schema":
        return ("json", "") if kind == "json_object" else ("", "")
    stated = _SCHEMA(value.get("json_schema"))
    if "schema" not in stated:
        raise ValueError("expected json_schema.schema, the schema itself")
    guide = json.dumps(stated["schema"], ensure_ascii=False)
    if len(guide.encode()) > MOST_GUIDE_BYTES:
        raise ValueError(f"expected a schema of at most {MOST_GUIDE_BYTES} bytes")
    return "json_schema", guide


async def check_format(gateway: Gateway, model: str, values: Mapping[str, Any]) -> None:
    """Raise ApiError for a format that the model's server cannot keep an answer to."""
    kind, _ = values.get(FORMAT, ("", ""))
    if kind and GUIDE_TYPE not in await gateway.pool.inputs(model):
        raise unsupported(
            FORMAT, f"found {'json_object' if kind == 'json' else kind}, and this model's server keeps no answer to a "
            "format; leave it out, or ask for the format in the prompt",
        )  # fmt: skip
    if kind and values.get("ignore_eos"):
        raise invalid("ignore_eos", f"found true beside {FORMAT}, whose answers must end; leave one of the two out")
