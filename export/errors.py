"""The root of moeship's errors, and those of reading, merging, quantising and exporting.

    MoeshipError                 anything a user can mend; the command line prints it and exits with `exit_status`
    ├── ConfigError              config.json or a YAML says something that moeship does not honour
    ├── CheckpointError          tensors or files of a checkpoint are missing, damaged or of the wrong shape
    ├── MergeError               experts that cannot be merged
    ├── ExportError              a graph that cannot be written as planned
    ├── QuantizationError        a tensor that the asked precision cannot hold
    ├── OutputError              the output cannot be written where it was asked
    └── MissingPackageError      an optional package is needed; the message names the extra that brings it

Every message says what was being done, to which object, what was found against what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class MoeshipError(Exception):
    """Root of every error whose message is meant for the user."""

    exit_status = 2


class ConfigError(MoeshipError):
    """A configuration holds a key or value that is not honoured."""


class CheckpointError(MoeshipError):
    """A checkpoint's tensors or files are missing, damaged or unexpected."""


class MergeError(MoeshipError):
    """Experts that cannot be merged into one checkpoint."""


class ExportError(MoeshipError):
    """A graph that cannot be written as planned."""


class QuantizationError(MoeshipError):
    """A tensor that the asked precision cannot hold."""


class OutputError(MoeshipError):
    """The output cannot be written where it was asked for."""


class MissingPackageError(MoeshipError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs the package {package}; install it with: pip install 'moeship[{extra}]'")


def listing(problems: Sequence[str], most: int = 8) -> str:
    """Several problems as indented lines, the first `most` of them spelled out."""
    lines = [f"\n  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"\n  - and {len(problems) - most} more")
    return "".join(lines)
