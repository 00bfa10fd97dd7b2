"""`moeship top`: figures from texts of metrics, the screen at its sizes, a server that goes away and comes back."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import accumulate
from pathlib import Path

import pytest
from serve_command import PATIENCE_S, wait_until

from cli.main import main
from clients.errors import MetricsUnavailable
from clients.top import live
from clients.top.figures import Figures, figures
from clients.top.live import Watcher
from clients.top.scrape import Change, History, Scrape, parse
from clients.top.screen import ASCII, UNICODE, Screen, _bytes, _seconds

BOUNDS = ("0.01", "0.1", "1.0", "+Inf")
# In the form that Triton's backend for TensorRT-LLM publishes.
TENSORRT_LLM = """# TYPE nv_inference_request_success counter
nv_inference_request_success{model="tensorrt_llm",version="1"} 10
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 3
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 5
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 50
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 200
"""


def engine_text(
    model="phixtral", *, steps=100.0, output=1000.0, first=(0, 0, 0, 0), layers=2, experts=4, drafted=None, hot=None
) -> str:
    """What an engine of ONNX Runtime publishes, with `first` values in the buckets of the first tokens' times."""
    label, lines = f'model="{model}"', []
    for name, kind, value in (
        ("sequences_running", "gauge", 5), ("slots", "gauge", 8), ("requests_waiting", "gauge", 2),
        ("requests_waiting_limit", "gauge", 64), ("requests_running", "gauge", 4), ("kv_held_bytes", "gauge", 5e8),
        ("kv_reserved_bytes", "gauge", 2e8), ("kv_budget_bytes", "gauge", 1e9), ("prefix_kept_tokens", "gauge", 1234),
        ("prefix_kept_bytes", "gauge", 4e6), ("prefix_asked_tokens_total", "counter", 10 * steps),
        ("prefix_reused_tokens_total", "counter", 8 * steps), ("steps_total", "counter", steps),
        ("output_tokens_total", "counter", output), ("prompt_tokens_total", "counter", 2 * steps),
    ):  # fmt: skip
        lines += [f"# TYPE moeship_{name} {kind}", f"moeship_{name}{{{label}}} {value}"]
    if drafted:
        for name, value in zip(("draft_tokens_total", "draft_accepted_tokens_total"), drafted, strict=True):
            lines += [f"# TYPE moeship_{name} counter", f"moeship_{name}{{{label}}} {value}"]
    lines.append("# TYPE moeship_first_token_seconds_bucket counter")
    lines += [
        f'moeship_first_token_seconds_bucket{{le="{bound}",{label}}} {total}'
        for bound, total in zip(BOUNDS, accumulate(first), strict=True)
    ]
    lines.append("# TYPE moeship_requests_refused_total counter")
    lines.append(f'moeship_requests_refused_total{{{label},reason="queue_full"}} {steps / 10}')
    lines.append("# TYPE moeship_expert_tokens_total counter")
    lines += [
        f'moeship_expert_tokens_total{{expert="{expert}",layer="{layer}",{label}}} '
        f"{steps * (3 if expert == hot else 1)}"
        for layer in range(layers)
        for expert in range(experts)
    ]
    return "\n".join(lines) + "\n"


def scrape(text: str, at_s: float = 0.0) -> Scrape:
    return Scrape(at_s=at_s, values=parse(text, "reading").values)


def history(*texts: str, seconds: float = 2.0) -> History:
    found = History()
    for number, text in enumerate(texts):
        found.add(scrape(text, number * seconds))
    return found


def test_rates_are_of_the_last_interval_and_shares_of_the_window():
    texts = [
        engine_text(steps=100, output=1000),
        engine_text(steps=110, output=1100),
        engine_text(steps=140, output=1500),
    ]
    [found] = figures(history(*texts))
    assert (found.kind, found.streams, found.slots, found.waiting) == ("ONNX Runtime", 5, 8, 2)
    assert (found.output_tokens_per_s, found.steps_per_s, found.prompt_tokens_per_s) == (200, 15, 30)
    assert found.prefix_hit_share == pytest.approx(0.8)
    assert found.refused_per_s == {"queue_full": 1.5}
    assert found.window_s == 4
    assert found.drafts_per_s is None


def test_drafts_are_shown_where_the_server_has_them():
    [found] = figures(history(engine_text(drafted=(10, 5)), engine_text(drafted=(30, 17))))
    assert (found.drafts_per_s, found.drafts_accepted_share) == (10, 0.6)
    [none] = figures(history(engine_text(drafted=(10, 5)), engine_text(drafted=(10, 5))))
    assert none.drafts_accepted_share is None


def test_percentiles_come_from_what_the_buckets_gained():
    change = Change(
        scrape(engine_text(first=(100, 0, 0, 0))), scrape(engine_text(first=(100, 8, 2, 0)), 1.0)
    )  # fmt: skip
    name = "moeship_first_token_seconds"
    # Ten values: eight from 0.01 to 0.1, two from 0.1 to 1. The fifth is at 5/8 of the first range, the ninth at 1/2.
    assert change.quantile(name, "phixtral", 0.5) == pytest.approx(0.01 + 0.09 * 5 / 8)
    assert change.quantile(name, "phixtral", 0.9) == pytest.approx(0.1 + 0.9 / 2)
    above = Change(change.before, scrape(engine_text(first=(100, 0, 0, 4)), 1.0))
    assert above.quantile(name, "phixtral", 0.5) == 1.0  # nothing more is known of the last bucket
    assert Change(change.before, change.before).quantile(name, "phixtral", 0.5) is None
    assert change.quantile(name, "another", 0.5) is None


def test_experts_are_compared_with_an_equal_share():
    [found] = figures(history(engine_text(steps=0, hot=1), engine_text(steps=10, hot=1)))
    assert found.expert_load[1] == pytest.approx((4 / 6, 2.0, 4 / 6, 4 / 6))


def test_counters_that_begin_anew_are_not_compared_with_those_before():
    found = history(engine_text(steps=1000, output=9000), engine_text(steps=5, output=50))
    assert found.restarts == 1
    [first] = figures(found)
    assert (first.output_tokens_per_s, first.window_s) == (None, None)
    found.add(scrape(engine_text(steps=10, output=100), 4.0))
    [second] = figures(found)
    assert second.output_tokens_per_s == 25


def test_the_window_forgets_what_is_older():
    found = History(window_s=10)
    for second in range(0, 60, 2):
        found.add(scrape(engine_text(steps=second), second))
    assert found.whole.seconds == 10


def test_a_window_keeps_few_readings_however_short_the_interval():
    found = History(window_s=60)
    for number in range(1000):
        found.add(scrape(engine_text(steps=number, layers=0), number * 0.2))
        assert found.last is None or found.last.seconds == pytest.approx(0.2)
    assert len(found._scrapes) <= 33
    assert 58 <= found.whole.seconds <= 62


def test_a_server_of_tensorrt_llm_shows_what_it_has_and_says_what_it_lacks():
    [found] = figures(history(TENSORRT_LLM, TENSORRT_LLM.replace("} 10\n", "} 14\n")))
    assert (found.kind, found.streams, found.slots, found.waiting) == ("TensorRT-LLM", 3, 512, 2)
    assert (found.cache_used_share, found.cache_max_tokens) == (0.25, 12800)
    assert found.ended_per_s == {"success": 2, "failure": 0}
    assert found.lacks == ["tokens/s", "first token", "between tokens", "prefix hits", "expert load"]
    newer = TENSORRT_LLM + 'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 7\n'
    assert figures(history(newer))[0].waiting == 7


def test_rates_that_need_a_second_reading_are_not_called_unpublished():
    _, first = looked(engine_text())
    text = "\n".join(draw(first, 80, 40))
    assert "not published" not in text
    assert "tokens/s       a rate needs two readings" in text
    _, second = looked(engine_text(output=1000), engine_text(output=1100))
    assert "tokens/s       output   100.0" in "\n".join(draw(second, 80, 40))


def test_metrics_without_a_model_ask_for_the_address():
    _, engines = looked("# TYPE moeship_gateway_requests_in_flight gauge\nmoeship_gateway_requests_in_flight 0\n")
    lines = draw(engines, 80, 24)
    assert lines[2:] == [
        "This server has no model with metrics yet.",
        "Is the address the one that moeship serve prints as metrics?",
    ]


def test_any_triton_counts_requests():
    text = '# TYPE nv_inference_request_success counter\nnv_inference_request_success{model="m",version="1"} 3\n'
    [found] = figures(history(text, text.replace("} 3", "} 9")))
    assert (found.kind, found.ended_per_s["success"]) == ("Triton", 3)


def looked(*texts: str, url: str = "http://127.0.0.1:8002/metrics"):
    """What a watcher finds when the server answers with these texts."""
    watcher = Watcher(url, None, 1.0)
    for number, text in enumerate(texts):
        watcher._history.add(scrape(text, float(number)))
    watcher._engines = tuple(figures(watcher._history))
    return watcher, watcher._engines


def draw(engines: tuple[Figures, ...], width: int, height: int, glyphs=UNICODE, fault: str = "") -> list[str]:
    from datetime import UTC, datetime

    from clients.top.live import Look

    look = Look(time=datetime.now(UTC), url="http://127.0.0.1:8002/metrics", engines=engines, fault=fault, silent_s=7)
    return Screen(glyphs).draw(look, width, height, "q quit").plain.splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 12), (20, 5)])
@pytest.mark.parametrize(("layers", "experts"), [(4, 4), (32, 8), (32, 40)])
def test_a_frame_fits_the_terminal(width, height, layers, experts):
    texts = [engine_text(layers=layers, experts=experts, steps=n, drafted=(n, n)) for n in (1, 2)]
    _, engines = looked(*texts)
    lines = draw(engines, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    if width >= 80:
        text = "\n".join(lines)
        assert "5 of 8 slots, 4 requests" in text
        assert "500 MB of 1 GB, 200 MB reserved" in text
        assert "80% of prompt tokens; keeps 1,234 (4 MB)" in text
        assert "queue_full 0.10" in text
        assert "  0 ▄▄▄▄" in text


def test_the_largest_figures_fit_eighty_columns():
    _, [engine] = looked(*(engine_text(steps=n, drafted=(n, n)) for n in (1, 2)))
    largest = replace(
        engine, cache_held_bytes=999.4e9, cache_budget_bytes=999.4e9, cache_reserved_bytes=999.4e9,
        prefix_hit_share=1.0, prefix_kept_tokens=1e6, prefix_kept_bytes=999.4e6, drafts_accepted_share=1.0,
        drafts_per_s=1e5,
    )  # fmt: skip
    lines = draw((largest,), 80, 24)
    assert not any("…" in line for line in lines)
    assert "100% of prompt tokens; keeps 1,000,000 (999 MB)" in "\n".join(lines)


def test_a_line_that_is_cut_says_so():
    _, engines = looked(*(engine_text(steps=n) for n in (1, 2)))
    for glyphs, mark in ((UNICODE, "…"), (ASCII, ">")):
        cut = [line for line in draw(engines, 40, 24, glyphs) if line.endswith(mark)]
        assert any(line.startswith("prefix hits") for line in cut)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (999.4, "999 B"), (999.6, "1 kB"), (999_499, "999 kB"), (999_999, "1 MB"), (999.7e6, "1 GB")],
)
def test_bytes_have_three_digits(value, said):
    assert _bytes(value) == said


@pytest.mark.parametrize(("value", "said"), [(0.9994, "999 ms"), (0.9996, "1 s"), (0.0123456, "12.3 ms")])
def test_seconds_have_three_digits(value, said):
    assert _seconds(value) == said


def test_layers_that_find_no_room_are_counted():
    _, engines = looked(*(engine_text(layers=32, experts=40, steps=n) for n in (1, 2)))
    lines = draw(engines, 80, 24)
    shown = sum(line.endswith("▄" * 40) for line in lines)
    assert f"… {32 - shown} more layers: make the terminal larger" in lines
    assert sum(line.endswith("▄" * 40) for line in draw(engines, 80, 60)) == 32


def test_a_terminal_without_unicode_gets_plain_characters():
    _, engines = looked(*(engine_text(steps=n) for n in (1, 2)))
    lines = draw(engines, 80, 24, ASCII)
    assert "\n".join(lines).isascii()
    assert any("  0 4444" in line for line in lines)


def test_what_was_known_stays_while_the_server_does_not_answer():
    _, engines = looked(engine_text())
    lines = draw(engines, 80, 24, fault="reading the metrics of http://x: Connection refused; check that")
    assert lines[1] == "no answer for 7 s, trying again: Connection refused"
    assert any("phixtral (ONNX Runtime)" in line for line in lines)


@contextmanager
def publishing(texts: list[str], port: int = 0):
    """A server that answers with one text after another, the last for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = (texts.pop(0) if len(texts) > 1 else texts[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics", server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_goes_away_and_comes_back_is_followed():
    with publishing([engine_text(steps=100)]) as (url, port):
        watcher = Watcher(url, None, 1.0)
        assert [each.model for each in watcher.look().engines] == ["phixtral"]
    gone = watcher.look()
    assert "Connection refused" in gone.fault
    assert gone.as_json()["engines"] == []
    with publishing([engine_text(steps=3)], port):
        back = watcher.look()
    assert (back.fault, back.restarts, len(back.engines)) == ("", 1, 1)


@pytest.mark.parametrize("text", ["<html>", 'moeship_slots{model="a"} x\n', "moeship_slots{model=\n"])
def test_what_is_no_text_of_metrics_is_one_error(text):
    with publishing([text]) as (url, _), pytest.raises(MetricsUnavailable, match="no text of Prometheus"):
        Watcher(url, None, 1.0).look(patient=False)


def test_once_as_json_is_one_line(capsys):
    texts = [engine_text(steps=100, output=1000), engine_text(steps=110, output=1100, first=(0, 10, 0, 0))]
    with publishing(texts) as (url, _):
        assert main(["top", url, "--once", "--json", "--interval", "0.2"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["up"] is True
    assert found["engines"][0]["first_token_s"]["p50"] == pytest.approx(0.055)
    assert 0 < found["engines"][0]["output_tokens_per_s"] <= 500  # 100 in 0.2 s or more


def test_a_server_that_is_looked_at_once_has_longer_to_answer_than_the_interval(monkeypatch, capsys):
    found = []

    def read(url, tls, timeout_s, api_key=None):
        found.append(timeout_s)
        return parse(engine_text(steps=len(found)), "reading")

    monkeypatch.setattr(live, "read_metrics", read)
    assert main(["top", "http://127.0.0.1:1/metrics", "--once", "--interval", "0.2"]) == 0
    assert "phixtral" in capsys.readouterr().out
    Watcher("http://127.0.0.1:1/metrics", None, 0.2).look()
    assert found == [live.LONGEST_READ_S] * 2 + [1.0]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["http://127.0.0.1:1/metrics", "--once"], 1, "the address of its metrics, which `moeship serve` prints"),
        (["127.0.0.1:8002", "--once"], 2, "found no scheme"),
        (["--interval", "0"], 2, "--interval is 0.0"),
        (["--interval", "nan"], 2, "--interval is nan"),
    ],
)
def test_bad_input_is_one_error(words, status, told, capsys):
    assert main(["top", *words]) == status
    assert told in capsys.readouterr().err


def test_q_ends_it_and_the_terminal_is_as_before(tmp_path):
    own, theirs = pty.openpty()
    with publishing([engine_text(steps=1), engine_text(steps=2)]) as (url, _):
        command = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "top", url, "--interval", "0.2"],
            stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3],
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        shown = bytearray()

        def read():
            while True:
                try:
                    shown.extend(os.read(own, 4096))
                except OSError:  # the other end is closed
                    return

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert wait_until(lambda: b"phixtral" in shown)
        os.write(own, b"q")
        assert command.wait(PATIENCE_S) == 0, command.stderr.read()
        os.close(theirs)
        reader.join(PATIENCE_S)
        command.stderr.close()
    os.close(own)
    assert b"\x1b[?1049h" in shown  # the other screen, and back from it
    assert b"\x1b[?1049l" in shown
