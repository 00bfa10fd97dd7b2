"""Which server gets a request of a batch, when a request is sent again, and when a batch stops: in simulated time."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from batch_standin import openai_line
from bench_standin import simulate

from clients.batch import pool as pools
from clients.batch.endpoints import MOST_RETRY_S, Access, EndpointAway, open_endpoint, retry_after
from clients.batch.job import Job, scan
from clients.batch.lines import Answer, RawLine, Request, write_line
from clients.batch.pool import Pool
from clients.batch.runner import FIRST_WAIT_S, Rules, Run, may_succeed_later, wait_s
from clients.batch.store import Journal as KeptJournal
from clients.errors import BatchStopped, ConnectionFailed

GOOD = Answer(status=200, body={"choices": [{"text": "x"}]})


@dataclass
class Server:
    """A server in simulated time. `answer` gets the prompt and how often it came here."""

    url: str
    answer: Callable[[str, int], Answer] = lambda _prompt, _attempt: GOOD
    takes_s: float = 1.0
    is_up: Callable[[], bool] = lambda: True
    asked: list[tuple[float, str]] = field(default_factory=list)  # when, and the prompt
    in_flight: int = 0
    most_in_flight: int = 0

    async def models(self):
        if not self.is_up():
            raise ConnectionFailed(f"asking {self.url}: away")
        return frozenset({"tiny"})

    async def ask(self, request: Request, request_id: str) -> Answer:
        if not self.is_up():
            raise EndpointAway(f"{self.url}: away")
        prompt = str(request.body["prompt"])
        self.asked.append((asyncio.get_running_loop().time(), prompt))
        attempt = sum(one == prompt for _, one in self.asked)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.takes_s)
        self.in_flight -= 1
        return self.answer(prompt, attempt)

    async def close(self):
        pass


@dataclass
class Journal:
    """Keeps records in memory."""

    records: dict[int, bool] = field(default_factory=dict)

    def append(self, index, line, is_good):
        assert index not in self.records
        self.records[index] = is_good

    def flush(self):
        pass


def send(monkeypatch, num_lines, *servers, concurrency=1, retries=3, patience_s=60.0, most_read=None):
    """Send prompts to servers; returns the records (place to whether it is good) and the seconds that passed."""
    by_url, journal = {server.url: server for server in servers}, Journal()
    monkeypatch.setattr(pools, "open_endpoint", lambda url, _access: by_url[url])
    monkeypatch.setattr("clients.batch.runner.wait_s", lambda attempt: 10.0 * attempt)
    job = Job(path=Path("in"), sha256="", num_bytes=0, num_lines=num_lines, form="openai", model=None)

    def lines():
        for number in range(num_lines):
            if most_read is not None:
                assert number - len(journal.records) <= most_read, "lines are read that no slot is free for"
            yield RawLine(index=number, number=number + 1, offset=0, data=openai_line(number).encode())

    async def main():
        rules = Rules(concurrency=concurrency, retries=retries, patience_s=patience_s)
        access = Access(timeout_s=1, models=frozenset({"tiny"}))
        pool = Pool(urls=list(by_url), access=access, concurrency=concurrency, patience_s=patience_s)
        async with pool:
            await Run(
                job=job, lines=lines(), is_done=lambda _index: False, journal=journal, pool=pool, rules=rules
            ).go()
        return asyncio.get_running_loop().time()

    return journal.records, simulate(main)


def test_no_more_lines_are_read_than_there_are_slots(monkeypatch):
    server = Server("a")
    records, seconds = send(monkeypatch, 100, server, concurrency=5, most_read=5)
    assert records == dict.fromkeys(range(100), True)
    assert server.most_in_flight == 5
    assert seconds == pytest.approx(20, abs=0.1)


def test_the_faster_server_gets_more_lines(monkeypatch):
    slow, fast = Server("slow", takes_s=4), Server("fast", takes_s=1)
    records, _ = send(monkeypatch, 100, slow, fast, concurrency=2)
    assert len(records) == 100
    assert (len(slow.asked), len(fast.asked)) == (20, 80)


def test_a_failure_is_asked_again_so_often_and_waits_between(monkeypatch):
    failing = {"prompt 1"}
    server = Server("a", lambda prompt, _: Answer(status=503) if prompt in failing else GOOD)
    records, _ = send(monkeypatch, 3, server, retries=2)
    assert records == {0: True, 1: False, 2: True}
    times = [at for at, prompt in server.asked if prompt == "prompt 1"]
    assert [later - sooner for sooner, later in itertools.pairwise(times)] == pytest.approx([11, 21])


def test_a_server_that_says_when_to_come_again_gets_nothing_until_then(monkeypatch):
    busy = Server("a", lambda prompt, n: Answer(status=429, retry_s=30) if prompt == "prompt 0" and n < 6 else GOOD)
    records, _ = send(monkeypatch, 20, busy, concurrency=2, retries=0, patience_s=600)
    assert records == dict.fromkeys(range(20), True), "being told to wait is no attempt"
    refused = [at for at, prompt in busy.asked if prompt == "prompt 0"]
    assert [later - sooner for sooner, later in itertools.pairwise(refused)] == pytest.approx([31] * 5)
    for begin in refused[:5]:
        assert [at for at, _ in busy.asked if begin + 1 < at < begin + 30.9] == []


def test_a_server_that_is_always_busy_uses_up_patience_and_then_attempts(monkeypatch):
    server = Server("a", lambda prompt, _: Answer(status=429, retry_s=5) if prompt == "prompt 0" else GOOD)
    records, _ = send(monkeypatch, 2, server, retries=2, patience_s=20)
    assert records == {0: False, 1: True}
    assert sum(prompt == "prompt 0" for _, prompt in server.asked) == 4 + 3


def test_lines_of_a_server_that_went_away_go_to_the_other(monkeypatch):
    gone, other = Server("gone"), Server("other")
    gone.is_up = lambda: len(gone.asked) < 3
    records, _ = send(monkeypatch, 30, gone, other, concurrency=2, retries=0)
    assert records == dict.fromkeys(range(30), True)
    assert len(gone.asked) + len(other.asked) == 30
    assert other.most_in_flight == 2, "a server gets no more at a time because another one is away"


@pytest.mark.parametrize(
    "failure", [Answer(status=500), Answer(error=("timeout", "x")), Answer(error=("unreadable_answer", "<"))]
)
def test_a_server_that_fails_at_once_fails_no_lines_that_another_answers(monkeypatch, failure):
    broken, good = Server("broken", lambda *_: failure, takes_s=0.01), Server("good", takes_s=2)
    records, _ = send(monkeypatch, 60, broken, good, concurrency=4, retries=2)
    assert records == dict.fromkeys(range(60), True)
    assert broken.asked


def test_a_server_that_comes_back_is_asked_again(monkeypatch):
    server = Server("a")

    def is_up():
        return not 5 < asyncio.get_running_loop().time() < 40

    server.is_up = is_up
    records, seconds = send(monkeypatch, 10, server, retries=0, patience_s=60)
    assert records == dict.fromkeys(range(10), True)
    assert 40 < seconds < 55


def test_a_batch_stops_when_no_server_can_be_reached_for_too_long(monkeypatch):
    server = Server("a")
    server.is_up = lambda: len(server.asked) < 3
    with pytest.raises(BatchStopped, match=r"could be reached for 60 s: .*a: away.* answers so far are kept"):
        send(monkeypatch, 10, server, patience_s=60)


def test_failures_are_kept_once_another_request_succeeds(monkeypatch):
    server = Server("a", lambda prompt, _: GOOD if prompt == "prompt 19" else Answer(error=("timeout", "late")))
    records, _ = send(monkeypatch, 20, server, retries=0)
    assert records == {**dict.fromkeys(range(19), False), 19: True}


def test_a_failure_of_the_last_line_is_kept(monkeypatch):
    server = Server("a", lambda prompt, _: Answer(status=500) if prompt == "prompt 2" else GOOD)
    records, _ = send(monkeypatch, 3, server, retries=0)
    assert records == {0: True, 1: True, 2: False}


@pytest.mark.parametrize(
    "then", [lambda journal: journal.append(1, b"x\n", is_good=True), lambda journal: journal.close()]
)
def test_a_disk_that_failed_to_flush_is_told_of_later_though_the_system_tells_once(tmp_path, monkeypatch, then):
    told = iter([OSError(errno.EIO, "Input/output error")])

    def flush(_descriptor):
        for error in told:
            raise error

    monkeypatch.setattr("os.fdatasync", flush)
    journal = KeptJournal(tmp_path)
    journal.append(0, b"x\n", is_good=True)
    with pytest.raises(OSError, match="Input/output error"):
        journal.flush()  # in a thread, for nobody
    with pytest.raises(OSError, match="Input/output error"):
        then(journal)


def test_statuses_after_which_the_same_request_may_succeed():
    assert [status for status in range(200, 600) if may_succeed_later(Answer(status=status))] == [
        408, 409, 425, 429, 500, 502, 503, 504, *range(506, 600)
    ]  # fmt: skip
    codes = ("timeout", "connection_lost", "unreadable_answer", "answer_too_large", "invalid_line")
    assert [code for code in codes if may_succeed_later(Answer(error=(code, "")))] == list(codes[:3])


def test_values_that_are_nested_too_deeply_to_be_written_fail_their_line_alone():
    """Of some depth that depends on the stack, a line or an answer can be read and not be written."""
    deep = []
    for _ in range(100_000):
        deep = [deep]

    async def ask():
        endpoint = open_endpoint("http://127.0.0.1:1", Access(timeout_s=1))
        try:
            return await endpoint.ask(Request(custom_id="a", url="/v1/completions", body={"deep": deep}), "x")
        finally:
            await endpoint.close()

    assert asyncio.run(ask()) == Answer(error=("invalid_line", "found values nested too deeply to be sent"))
    for form in ("openai", "prompts"):
        made = {"choices": [{"text": deep}]}
        line, is_good = write_line(Answer(status=200, body=made), form, answer_id="i", number=1, custom_id="a")
        told = json.loads(line)
        assert (told["id"], told["custom_id"], is_good) == ("i", "a", False)
        assert told["error"]["message"] == "the answer has values nested too deeply to be written"


def test_waits_double_up_to_a_minute():
    for attempt, longest in ((1, FIRST_WAIT_S), (2, 1.0), (3, 2.0), (7, 32.0), (8, 60.0), (10_000, 60.0)):
        assert all(longest / 2 <= wait_s(attempt) <= longest for _ in range(20))


def test_retry_after_is_seconds_or_a_date():
    assert [retry_after(text) for text in (None, "", "soon", "-3", "nan", "1e400")] == [None] * 6
    assert [retry_after(text) for text in ("0", "7", " 1.5 ", "999999999")] == [0.0, 7.0, 1.5, MOST_RETRY_S]
    ahead = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 60 < (retry_after(ahead) or 0) <= 100
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_shards_cover_every_line_that_is_not_blank(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(openai_line(number) for number in range(10)) + "\n \n")
    found = scan(path, form=None, shard_lines=4, scratch=tmp_path)
    shards = [(shard.index, shard.number, shard.num_lines) for shard in found.shards]
    assert shards == [
        (0, 1, 4),
        (4, 9, 4),
        (8, 17, 2),
    ]
    assert (found.num_lines, found.form, found.models, found.lacks_model) == (10, "openai", {"tiny"}, False)
    data = path.read_bytes()
    assert [data[shard.offset :].startswith(openai_line(shard.index).encode()) for shard in found.shards] == [True] * 3
