"""Ends requests early by our clients, at random moments, against a served model, and counts how they end.

    moeship serve REPOSITORY --json > server.json &
    python ci/early_ends.py --url 127.0.0.1:8001 --model phixtral --number 5000

Each request is ended in one of the ways in which users end theirs: the generator is closed, the task is cancelled, the
deadline passes, the client is closed. Several run side by side, so that some wait in the model's queue. After every
hundred a whole answer is asked for and must be the one that the model gave at first. Counts are printed as JSON. The
exit status is 1 where an end took longer than a server has for it (a hang), or where the server gave an error or did
not answer any more (a death); it is named at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress

from clients.errors import ClientError, DeadlineExceeded, RequestCancelled
from clients.generation import AsyncClient, Client, Generation, GenerationRequest
from clients.streams import STOP_PATIENCE_S

NO_END_ID = -1
BATCH = 100
# Seconds without a response after which a server counts as hung.
HANG_S = 60.0
# Longest time in seconds that ending a request may take: less than STOP_PATIENCE_S, after which the call is cancelled.
LONGEST_END_S = STOP_PATIENCE_S - 1


class EarlyEnds:
    """Sends requests to one model and ends them early; `seed` decides how and when."""

    def __init__(self, url: str, model: str, seed: int, longest_s: float, max_tokens: int) -> None:
        self.url, self._model = url, model
        self._longest_s, self._max_tokens = longest_s, max_tokens
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.problems: list[str] = []

    def end_one(self, client: Client) -> None:
        """Send a request and end it in a random way at a random moment."""
        with self._lock:
            way = self._random.choice((self._close, self._pass_the_deadline, self._cancel_the_task, self._close_client))
            moment_s = self._random.uniform(0.001, self._longest_s)
            stream = self._random.random() < 0.7
        try:
            took_s = way(client, moment_s, stream)
        except ClientError as error:
            self.problems.append(f"{way.__name__}: {error}")
            return
        with self._lock:
            self.counts[way.__name__.strip("_")] += 1
            self.slowest_s = max(self.slowest_s, took_s)
        if took_s > LONGEST_END_S:
            self.problems.append(f"{way.__name__}: the end took {took_s:.1f} s")

    def request(self, **fields: object) -> GenerationRequest:
        given = {
            "model": self._model,
            "prompt": "def main(",
            "max_tokens": self._max_tokens,
            "end_id": NO_END_ID,
            "timeout_s": HANG_S,
        }
        return GenerationRequest(**{**given, **fields})  # type: ignore[arg-type]

    def _close(self, client: Client, moment_s: float, _stream: bool) -> float:
        """Close the generator after the first piece that arrives after `moment_s`."""
        due = time.monotonic() + moment_s
        with closing(client.stream(self.request())) as pieces:
            for _ in pieces:
                if time.monotonic() >= due:
                    break
            begun = time.monotonic()
        return time.monotonic() - begun

    def _pass_the_deadline(self, client: Client, moment_s: float, stream: bool) -> float:
        begun = time.monotonic()
        with suppress(DeadlineExceeded):
            request = self.request(timeout_s=moment_s)
            if stream:
                list(client.stream(request))
            else:
                client.generate(request)
        return time.monotonic() - begun - moment_s

    def _cancel_the_task(self, client: Client, moment_s: float, stream: bool) -> float:
        async def read(client: AsyncClient) -> None:
            if not stream:
                await client.generate(self.request())
                return
            async with aclosing(client.stream(self.request())) as pieces:
                async for _ in pieces:
                    pass

        async def main() -> float:
            async with AsyncClient(client.url) as asynchronous:
                task = asyncio.create_task(read(asynchronous))
                await asyncio.wait({task}, timeout=moment_s)
                begun = time.monotonic()
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                return time.monotonic() - begun

        return asyncio.run(main())

    def _close_client(self, client: Client, moment_s: float, stream: bool) -> float:
        """Close the client during a request, as Ctrl-C does in `moeship generate`."""
        own = Client(client.url)

        def read() -> None:
            with suppress(RequestCancelled):
                if stream:
                    list(own.stream(self.request()))
                else:
                    own.generate(self.request())

        with ThreadPoolExecutor(max_workers=1) as pool:
            reader = pool.submit(read)
            time.sleep(moment_s)
            begun = time.monotonic()
            own.close()
            took_s = time.monotonic() - begun
            error = reader.exception()
        # A client that is closed before it sends the request raises this error.
        if isinstance(error, ClientError) and "this client is closed" not in str(error):
            raise error
        return took_s


def main() -> int:
    arguments = read_arguments()
    ends = EarlyEnds(arguments.url, arguments.model, arguments.seed, arguments.longest, arguments.max_tokens)
    begun, done = time.monotonic(), 0
    with Client(arguments.url) as client, ThreadPoolExecutor(max_workers=arguments.side_by_side) as pool:
        expected = whole_answer(client, ends)
        while done < arguments.number and not ends.problems and time.monotonic() - begun < arguments.seconds:
            batch = min(BATCH, arguments.number - done)
            list(pool.map(ends.end_one, [client] * batch))
            done += batch
            if not ends.problems and whole_answer(client, ends) != expected:
                ends.problems.append("the model gives another answer than at first")
    seconds = round(time.monotonic() - begun, 1)
    print(
        json.dumps(
            {
                "early_ends": sum(ends.counts.values()),
                "by_way": dict(ends.counts),
                "slowest_end_s": round(ends.slowest_s, 3),
                "seconds": seconds,
                "problems": ends.problems[:10],
            }
        )
    )
    return 1 if ends.problems else 0


def whole_answer(client: Client, ends: EarlyEnds) -> Generation | None:
    """A short whole answer; None if the server gives none, which is recorded in `ends`."""
    try:
        return client.generate(ends.request(max_tokens=8))
    except ClientError as error:
        ends.problems.append(str(error))
        return None


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--url", default="127.0.0.1:8001", help="the server's gRPC address (default: %(default)s)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--number", type=int, default=5000, help="number of requests to end (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="end after this many seconds in any case (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--side-by-side", type=int, default=4, help="requests at the same time (default: %(default)s)")
    parser.add_argument(
        "--longest", type=float, default=0.3, help="latest moment of an end, in seconds (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=600, help="tokens of each request (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
