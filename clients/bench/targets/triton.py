"""moeship's own servers over gRPC, as the load generator uses them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from clients.bench.load import Work
from clients.bench.records import Arrival
from clients.generation import AsyncClient
from clients.messages import GenerationRequest

# Takes the work, the model's name and the seconds that a request may take.
MakeRequest = Callable[[Work, str, float | None], GenerationRequest]
NO_END = -1  # value of end_id for "no token ends the answer"


def request_of(work: Work, model: str, timeout_s: float | None = None) -> GenerationRequest:
    """The request of one piece of work."""
    sampling = work.sampling
    return GenerationRequest(
        model=model,
        prompt=work.prompt,
        max_tokens=work.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        random_seed=work.seed,
        end_id=NO_END if sampling.ignore_end else None,
        timeout_s=timeout_s,
    )


class TritonTarget:
    """A model of a Triton server. The client belongs to the caller. `make` makes the request of one piece of work."""

    counting = "the token ids of each response"

    def __init__(
        self, client: AsyncClient, model: str, timeout_s: float | None = None, make: MakeRequest = request_of
    ) -> None:
        self._client, self._model, self._timeout_s, self._make = client, model, timeout_s, make

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Send one request and yield what arrives. Raises ClientError."""
        request = self._make(work, self._model, self._timeout_s)
        async with aclosing(self._client.stream(request)) as pieces:
            async for piece in pieces:
                yield Arrival(
                    tokens=len(piece.token_ids),
                    finish_reason=piece.finish_reason,
                    num_input_tokens=piece.num_input_tokens,
                    num_output_tokens=piece.num_output_tokens,
                )
