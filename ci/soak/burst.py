"""More requests at once than the queue holds."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from clients.errors import ClientError
from clients.generation import AsyncClient, GenerationRequest
from clients.wire import ErrorText, StreamReader, build_request
from soak.served import Report, Served
from soak.wishes import NO_END, PATIENCE_S, Answers, Wish, alone, difference, draw_wishes, joined, shape_fault

REFUSED_BAR_S, FIRST_BAR_S = 1.0, 2.0
_LOOK_S = 0.01
# What a refusal says: how many wait, and when to send the request again.
_REFUSAL = re.compile(r"UNAVAILABLE: .*\d+ requests wait already, .* send it again in about \d+ s")


@dataclass
class _Sent:
    """One request of a burst and what came back. It is read after the burst, so that the client is no slower than it
    must be: it competes with the server for the processor where both are on one machine."""

    wish: Wish
    message: pb.ModelInferRequest
    responses: list[pb.ModelStreamInferResponse] = field(default_factory=list)
    seconds: float = 0.0  # from when it was sent to its end
    error: str = ""

    async def send(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        sent = time.monotonic()
        try:
            async for response in stub.ModelStreamInfer(iter((self.message,)), timeout=PATIENCE_S):
                self.responses.append(response)
        except grpc.RpcError as error:
            self.error = f"{error.code().name}: {error.details()}"
        self.seconds = time.monotonic() - sent

    def read(self) -> Answers:
        """The answer, or nothing and the error."""
        reader = StreamReader("a request of a burst", log_probs=bool(self.wish.request.return_log_probs))
        try:
            pieces = [piece for response in self.responses for piece in reader.read(response)]
            return () if self.error else joined([*pieces, *reader.finish()])
        except ErrorText as error:
            self.error = f"{error.status}: {error.details}"
        except ClientError as error:
            self.error = str(error)
        return ()


async def burst(served: Served, number: int, different: int, seed: int, *, rounds: bool) -> Report:
    """Send `number` requests at once, of so many different ones. `rounds` says that the engine rounds, so that a text
    may differ in a batch."""
    report = Report()
    wishes = [wish for wish in draw_wishes(served.model, different, seed) if wish.request.num_return_sequences is None]
    wishes = [replace(wish, stream=True) for wish in wishes]
    async with served.client() as client:
        expected = dict(zip(map(id, wishes), await alone(client, wishes), strict=True))
        before = await served.settled()
        chosen = [wishes[at % len(wishes)] for at in range(number)]
        sent = [_Sent(wish, build_request(wish.request, stream=True)) for wish in chosen]
        async with served.channel(served.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            await channel.channel_ready()
            late = asyncio.create_task(_lateness())
            await asyncio.gather(*(one.send(stub) for one in sent))
            late.cancel()
            report.numbers["client_late_s"] = round(await late, 3)
        _judge(report, sent, expected, rounds=rounds)
        after = await served.settled()
        report.numbers["queue"] = int(before["requests_waiting_limit"])
        report.require(
            report.counts["answered"] >= min(number, before["requests_waiting_limit"]),
            f"{report.counts['answered']} were answered, fewer than the queue holds",
        )
        report.require(not after["requests_running"] + after["requests_waiting"], "requests are left behind")
        [behind] = await alone(client, wishes[:1])
        report.require(not difference(behind, expected[id(wishes[0])]), "a request behind the burst has another answer")
        await _short_beside_long(report, served, client, int(before["slots"]))
    return report


async def _lateness() -> float:
    """The longest time for which this process did not get to read what had come, until the task is cancelled."""
    longest = 0.0
    with suppress(asyncio.CancelledError):
        while True:
            begun = time.monotonic()
            await asyncio.sleep(_LOOK_S)
            longest = max(longest, time.monotonic() - begun - _LOOK_S)
    return longest


def _judge(report: Report, sent: list[_Sent], expected: dict[int, Answers], *, rounds: bool) -> None:
    answers = [one.read() for one in sent]
    refused = [one for one in sent if one.error]
    for one in refused:
        report.counts["refused"] += 1
        report.require(bool(_REFUSAL.match(one.error)), f"a refusal says {one.error:.300}")
    for one, found in zip(sent, answers, strict=True):
        if one.error:
            continue
        report.counts["answered"] += 1
        gap = difference(found, expected[id(one.wish)])
        report.counts["other text"] += bool(gap)
        gap = shape_fault(found, one.wish) if rounds else gap
        report.require(not gap, f"{one.wish.kind}: {gap}")
    slowest = max((one.seconds for one in refused), default=0.0)
    report.require(bool(refused), "nothing was refused: the burst is no larger than the queue")
    report.require(slowest <= REFUSED_BAR_S, f"a refusal took {slowest:.2f} s, at most {REFUSED_BAR_S:g} s are allowed")
    report.numbers["slowest_refusal_s"] = round(slowest, 3)
    report.numbers["last_answer_s"] = round(max((one.seconds for one in sent if not one.error), default=0.0), 3)


async def _short_beside_long(report: Report, served: Served, client: AsyncClient, slots: int) -> None:
    """Short requests, one after the other, while long ones take all other slots: when their first token comes."""
    short = GenerationRequest(model=served.model, prompt="def main(", max_tokens=2, end_id=NO_END, timeout_s=PATIENCE_S)
    long = replace(short, prompt="word " * 200, max_tokens=1 << 20)
    alone_s = max([await _first_s(client, short) for _ in range(5)])
    stops = asyncio.Event()

    async def keep_busy() -> None:
        while not stops.is_set():
            async with aclosing(client.stream(long)) as pieces:
                async for _ in pieces:
                    if stops.is_set():
                        break

    tasks = [asyncio.create_task(keep_busy()) for _ in range(slots - 1)]
    await asyncio.sleep(0.2)
    beside_s = [await _first_s(client, short) for _ in range(20)]
    stops.set()
    for task in tasks:
        with suppress(ClientError):
            await task
    report.numbers["short_first_token_s"] = {"alone": round(alone_s, 3), "beside_long": round(max(beside_s), 3)}
    report.require(
        max(beside_s) <= alone_s + FIRST_BAR_S,
        f"a short request beside {slots - 1} long ones got its first token after {max(beside_s):.2f} s",
    )


async def _first_s(client: AsyncClient, request: GenerationRequest) -> float:
    sent, first = time.monotonic(), 0.0
    async with aclosing(client.stream(request)) as pieces:
        async for _ in pieces:
            first = first or time.monotonic() - sent
    return first
