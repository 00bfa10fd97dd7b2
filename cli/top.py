"""Watch a server live: streams, queue, tokens a second, waits, cache, drafts, expert load, refusals.

It reads the metrics that the server publishes, at the address that `moeship serve` prints as "metrics". It shows what
the server has and says what it lacks. A server that goes away is waited for. q ends it, n shows the next engine.

--once prints one frame and ends; its percentiles count since the server's start. --json prints an object a line.
Exit status: 0 done, 1 with --once where the server does not answer, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cli.key_flags import add_key_arguments, read_api_key
from cli.tls_flags import add_tls_arguments, read_client_tls
from export.command import READER_GONE, leave_stdout

if TYPE_CHECKING:
    from rich.console import Console

    from clients.top.live import Look, Watcher
    from clients.top.screen import Screen

LEAST_INTERVAL_S = 0.2
KEY_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8002/metrics", help="address of the metrics (default: %(default)s)"
    )
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default %(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of frames")
    add_key_arguments(parser.add_argument_group("key", "for metrics behind a server that wants one"))
    add_tls_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show frames until q or Ctrl-C. Raises ConfigError, AddressInvalid, and with --once MetricsUnavailable."""
    from rich.console import Console

    from clients.top.live import Watcher
    from clients.top.screen import ASCII, UNICODE, Screen
    from export.errors import ConfigError

    if not LEAST_INTERVAL_S <= arguments.interval < math.inf:
        raise ConfigError(f"watching a server: --interval is {arguments.interval}, expected {LEAST_INTERVAL_S} or more")
    watcher = Watcher(
        arguments.url, read_client_tls(arguments), arguments.interval, since_start=arguments.once,
        api_key=read_api_key(arguments, [arguments.url]),
    )  # fmt: skip
    console = Console(highlight=False)
    screen = Screen(ASCII if console.options.ascii_only else UNICODE)
    try:
        if arguments.once:
            watcher.look(patient=False)
            time.sleep(arguments.interval)
            _print(console, screen, watcher.look(patient=False), as_json=arguments.json)
        elif arguments.json or not console.is_terminal:
            for look in _looks(watcher, arguments.interval):
                _print(console, screen, look, as_json=arguments.json)
        else:
            _show(console, screen, watcher)
    except BrokenPipeError:
        leave_stdout()
        return READER_GONE
    return 0


def _looks(watcher: Watcher, interval_s: float) -> Iterator[Look]:
    while True:
        yield watcher.look()
        time.sleep(interval_s)


def _print(console: Console, screen: Screen, look: Look, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(look.as_json()), flush=True)
    else:
        console.print(screen.draw(look, console.width, max(console.height, 60)), soft_wrap=True)
        sys.stdout.flush()


def _show(console: Console, screen: Screen, watcher: Watcher) -> None:
    """Draw on the whole terminal until q. The server is asked in a thread, so that keys never wait for it."""
    from rich.live import Live

    found, stops = watcher.follow()
    look: Look | None = None
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while (key := pressed()) != "q":
                if key == "n":
                    screen.next_engine()
                try:
                    new = found.get_nowait()
                except queue.Empty:
                    if look is None or not key:
                        continue
                    new = look
                if isinstance(new, Exception):
                    raise new
                look = new
                live.update(screen.draw(look, console.width, console.height, _keys_of(look)), refresh=True)
        finally:
            stops.set()


def _keys_of(look: Look) -> str:
    return "q quit, n next engine" if len(look.engines) > 1 else "q quit"


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """A function that waits a moment for a key and returns it, "" if none came. The terminal shows no keys meanwhile,
    and Ctrl-C stays an interrupt."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)

    def pressed() -> str:
        ready, _, _ = select.select([sys.stdin], [], [], KEY_INTERVAL_S)
        return os.read(sys.stdin.fileno(), 1).decode("ascii", "replace") if ready else ""

    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _no_key() -> str:
    time.sleep(KEY_INTERVAL_S)
    return ""
