"""How a command ends: errors become one line on stderr and an exit status."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from export.errors import MoeshipError, named

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
READER_GONE = 141  # 128 + SIGPIPE, as shells have it for a program whose reader has gone
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h

logger = logging.getLogger(__name__)


def run_command(run: Callable[[], int]) -> int:
    """The exit status of `run`: its own, that of the MoeshipError it raises, 2 for a file or folder that the system
    refuses and for want of memory, 130 when interrupted, 141 when nobody reads stdout any more, 70 for a fault of
    moeship's own, whose traceback is logged at debug level. What `run` printed is flushed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name from a file may hold what the terminal's code lacks
    try:
        status = run()
        return status if _flushed() else READER_GONE
    except SystemExit:  # argparse's, after a wrong option or its help, which it writes without looking at failures
        if not _flushed() or _reader_gone(sys.stdout):
            raise SystemExit(READER_GONE) from None
        raise
    except MoeshipError as error:
        return _said(f"{type(error).__name__}: {error}", error.exit_status)
    except OSError as error:
        gone = isinstance(error, BrokenPipeError) and any(map(_reader_gone, (sys.stdout, sys.stderr)))
        leave_stdout()
        if gone:
            return READER_GONE
        where = f" ({named(error.filename)})" if error.filename else ""
        return _said(f"{type(error).__name__}: {error.strerror or error}{where}; name another path, or mend it", 2)
    except MemoryError:
        return _said("MemoryError: the machine has not enough memory free for this; see what `moeship plan` says", 2)
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except Exception as error:
        logger.debug("the traceback", exc_info=True)
        return _said(
            f"internal error: {type(error).__name__}: {named(error, 400)}; this is a fault of moeship's own: report it "
            "with the command and what `moeship -v` adds",
            INTERNAL_ERROR,
        )


def leave_stdout() -> None:
    """Let nothing more be written to stdout, what is buffered included, which the interpreter would flush at its end
    and complain of."""
    _leave(sys.stdout)


def _leave(stream: TextIO | None) -> None:
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flushed() -> bool:
    """Whether stdout took what was printed; False where its reader has gone. Raises OSError where the disk is full."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        leave_stdout()
        return False
    return True


def _reader_gone(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe or socket that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(stream.fileno() if stream else -1, 0)
    except (OSError, ValueError):  # none that the system knows
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _said(text: str, status: int) -> int:
    """`status`, after the text was written to stderr, where that is open; what was printed comes before it."""
    try:
        _flushed()
    except OSError:
        leave_stdout()
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):  # None where it was closed before the start
        _leave(sys.stderr)
    return status
