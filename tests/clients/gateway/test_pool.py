"""What a gateway's operator is told of servers that do not answer."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

from clients.errors import ConnectionFailed, DeadlineExceeded, TlsFailed
from clients.gateway.pool import Pool


def test_a_server_that_does_not_answer_is_told_once_for_each_reason_and_again_once_it_has_answered(caplog):
    refused, expired = ConnectionFailed("connection refused"), TlsFailed("certificate has expired")
    answers = [refused, refused, expired, expired, [], expired, refused]

    async def models():
        answer = answers.pop(0)
        if isinstance(answer, list):
            return answer
        raise answer

    async def main():
        pool = Pool(SimpleNamespace(tritons=("127.0.0.1:1",), tls=None))
        [triton] = pool.tritons
        triton.client = SimpleNamespace(models=models, url="127.0.0.1:1")
        while answers:
            await pool._look(triton)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    told = [record.getMessage().removeprefix("a server is away: ") for record in caplog.records]
    assert told == [str(error) for error in (refused, expired, expired, refused)]


def test_a_server_that_is_up_and_late_is_told_once_it_counts_as_away(caplog):
    async def models():
        raise DeadlineExceeded("no answer within 5 s")

    async def main():
        pool = Pool(SimpleNamespace(tritons=("127.0.0.1:1",), tls=None))
        [triton] = pool.tritons
        triton.client, triton.is_up = SimpleNamespace(models=models, url="127.0.0.1:1"), True
        for _ in range(5):
            await pool._look(triton)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("a server is away: no answer within 5 s")
