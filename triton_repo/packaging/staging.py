"""Models that appear in a repository together, whole, or not at all; and files that are linked into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from export.errors import OutputError
from export.output import flush_to_disk, refuse_existing, staged_directory


@contextlib.contextmanager
def staged_models(repository: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a folder with an empty one for each model; they move into the repository, which is made where it does not
    exist, when the block ends well, the last one last. What is there already stays, and nothing half-written does.

    Raises OutputError where a model of such a name exists, at the start and again before the move, and when the disk
    refuses.
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
    """A hard link, or a copy where one is asked for or links are refused; returns the bytes copied. The folder that
    `target` lies in is made where its parent exists."""
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
