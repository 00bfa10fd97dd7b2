"""The answer to a request to stop others, as docs/wire.md promises it."""

from __future__ import annotations

import pytest

from triton_repo.errors import RequestError
from triton_repo.runtime.responses import wire_outputs
from triton_repo.runtime.stop_requests import STOPPED, check_stop_id


def test_a_request_to_stop_is_answered_by_an_empty_text_that_says_cancelled():
    outputs = {name: array.tolist() for name, array in wire_outputs(STOPPED).items()}
    assert outputs == {
        "text_output": [b""], "finish_reason": [[b"cancelled"]], "token_ids": [[]], "sequence_index": [[0]],
        "batch_index": [[0]], "num_input_tokens": [[0]], "num_output_tokens": [[0]],
    }  # fmt: skip


def test_a_request_to_stop_names_what_it_ends():
    check_stop_id("7")
    with pytest.raises(RequestError, match="stop is true and there is no request id; send the id"):
        check_stop_id("")
