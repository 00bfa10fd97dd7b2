"""Adds models to a repository all together or not at all; links or copies files into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from export.errors import OutputError
from export.files.output import flush_to_disk, refuse_existing, staged_directory


@contextlib.contextmanager
def staged_models(repository: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a folder that holds an empty folder for each model. When the block ends without an error, the models'
    folders move into the repository in the order of `names`. The repository is made if it does not exist. Models that
    are there already stay, and after an error none of the new ones does.

    Raises OutputError if a model with one of the names exists, at the start or before the move, and for an error of the
    disk.
    """
    if not repository.is_dir():
        with staged_directory(repository, "the model repository") as staging:
            _make(staging, names)
            yield staging
        return
    for name in names:
        refuse_existing(repository / name, f"the model {name}")
    what = f"the model {names[-1]}"
    moved: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(prefix=f".{names[-1][:64]}.partial-", dir=repository.resolve()) as temporary:
            staging = Path(temporary)
            _make(staging, names)
            yield staging
            flush_to_disk(staging)
            for name in names:
                refuse_existing(repository / name, f"the model {name}")
                moved.append((staging / name).rename(repository.resolve() / name))
            flush_to_disk(repository, contents=False)
    except BaseException as error:
        for folder in moved:
            shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise OutputError(
            f"writing {what} to {repository}: {error.strerror} ({error.filename or repository})"
        ) from error


def place(source: Path, target: Path, *, copy: bool) -> int:
    """Make a hard link, or a copy if `copy` or if links are refused. Returns the bytes that were copied. Makes the
    folder of `target` if that folder's parent exists."""
    target.parent.mkdir(exist_ok=True)
    if not copy:
        with contextlib.suppress(OSError):
            os.link(source.resolve(), target)
            return 0
    shutil.copyfile(source, target)
    return target.stat().st_size


def _make(staging: Path, names: Sequence[str]) -> None:
    for name in names:
        (staging / name).mkdir()
