"""Errors of building, running and verifying engines, under export's root.

MoeshipError
├── EngineError          an engine directory is missing, damaged, or not for this use
├── SequenceError        token ids that do not fit the engine or its cache
├── LibraryMissing       what was asked needs TensorRT-LLM or a GPU, and everything before that is done (exit status 3)
└── VerificationFailed   the engine differs from the reference by more than its precision allows (exit status 1)
"""

from __future__ import annotations

from export.errors import MoeshipError


class EngineError(MoeshipError):
    """An engine directory is missing, damaged, or not for this use."""


class SequenceError(MoeshipError):
    """Token ids that do not fit the engine or its cache."""


class LibraryMissing(MoeshipError):  # noqa: N818 - it is a state of the machine, not a malfunction
    """The work is done as far as it can be without TensorRT-LLM or a GPU; the message says how to finish it."""

    exit_status = 3


class VerificationFailed(MoeshipError):  # noqa: N818 - it is a verdict, not a malfunction
    """The engine differs from the reference by more than its precision allows."""

    exit_status = 1
