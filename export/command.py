"""Runs a command: an error becomes one line on stderr and an exit status."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from export.blas import choose_blas_kernels
from export.errors import MoeshipError, named

INTERRUPTED = 130  # 128 + SIGINT, the status that shells report after Ctrl-C
READER_GONE = 141  # 128 + SIGPIPE, the status that shells report when the reader of a pipe has closed it
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h

logger = logging.getLogger(__name__)


def run_command(run: Callable[[], int]) -> int:
    """Call `run`, print its error if it raises one, flush stdout and return the exit status. Where `run` imports numpy
    first, numpy multiplies by the kernels of `choose_blas_kernels`.

    The status is what `run` returns; `exit_status` of a MoeshipError; 2 for an OSError and a MemoryError; 130 when
    interrupted; 141 when the reader of stdout has closed it; 70 for any other exception, which is a bug of moeship
    and whose traceback is logged at debug level.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may hold characters the terminal's encoding lacks
    choose_blas_kernels()
    try:
        status = run()
        return status if _flushed() else READER_GONE
    except SystemExit:  # raised by argparse after a wrong option or --help; argparse ignores errors of writing
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
        return _said(
            f"{type(error).__name__}: {error.strerror or error}{where}; remove the cause, or name another path", 2
        )
    except MemoryError:
        return _said(
            "MemoryError: this machine has not enough free memory; `moeship plan` says how much a build takes", 2
        )
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except Exception as error:
        logger.debug("the traceback", exc_info=True)
        return _said(
            f"internal error: {type(error).__name__}: {named(error, 400)}; this is a bug in moeship: report it with "
            "the command and the output of `moeship -v`",
            INTERNAL_ERROR,
        )


def leave_stdout() -> None:
    """Discard everything that stdout still buffers or is given later. Otherwise the interpreter would flush the
    buffer at its end, fail and print an error."""
    _leave(sys.stdout)


def _leave(stream: TextIO | None) -> None:
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flushed() -> bool:
    """Flush stdout; returns False if its reader has closed it. Raises OSError if the disk is full."""
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
    except (OSError, ValueError):  # the stream has no file descriptor, or a closed one
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _said(text: str, status: int) -> int:
    """Flush stdout, write the text to stderr if that is open, and return `status`."""
    try:
        _flushed()
    except OSError:
        leave_stdout()
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):  # sys.stderr is None if it was closed before Python started
        _leave(sys.stderr)
    return status
