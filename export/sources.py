"""The files that a conversion reads: what tells one state of them from another, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from export.checkpoint import Checkpoint, file_digest
from export.checkpoint_files import INDEX_FILE
from export.errors import CheckpointError
from export.reading import is_regular
from export.resume import SourceFile
from export.safetensors_header import header_bytes


def source_files(checkpoint: Checkpoint) -> dict[str, SourceFile]:
    """The state of every file that a conversion reads; of a shard the header stands for the whole."""
    found = {}
    small = [checkpoint.folder / "config.json", checkpoint.folder / INDEX_FILE, *checkpoint.tokenizer_files()]
    for path in [*checkpoint.shards, *(path for path in small if is_regular(path))]:
        shard = path in checkpoint.shards
        digest = hashlib.sha256(header_bytes(path)).hexdigest() if shard else file_digest(path)
        facts = path.stat()
        found[path.relative_to(checkpoint.folder).as_posix()] = SourceFile(
            bytes=facts.st_size, modified_ns=facts.st_mtime_ns, sha256=digest
        )
    return found


def check_unchanged(checkpoint: Checkpoint, before: Mapping[str, SourceFile]) -> None:
    """Raise CheckpointError where a file is not what it was when the conversion began."""
    after = source_files(checkpoint)
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        raise CheckpointError(
            f"building from {checkpoint.folder}: {', '.join(changed)} changed while it was read, and the engine would "
            "be of two checkpoints; build again when nothing writes to the folder"
        )
