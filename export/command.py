"""How a command ends: errors become one line on stderr and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from export.errors import MoeshipError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run_command(run: Callable[[], int]) -> int:
    """The exit status of `run`: its own, that of the MoeshipError it raises, 2 for a file or folder that the system
    refuses, 130 when interrupted."""
    try:
        return run()
    except MoeshipError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_status
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"{type(error).__name__}: {error.strerror or error}{where}; name another path, or mend it\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
