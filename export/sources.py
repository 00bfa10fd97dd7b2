"""The files that a conversion reads: what tells one state of them from another, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from export.checkpoint import INDEX_FILE, Checkpoint
from export.digests import header_bytes
from export.errors import CheckpointError
from export.resume import SourceFile


def source_files(checkpoint: Checkpoint) -> dict[str, SourceFile]:
    """The state of every file that a conversion reads; of a shard the header stands for the whole."""
    found = {}
    small = [checkpoint.folder / "config.json", checkpoint.folder / INDEX_FILE, *checkpoint.tokenizer_files()]
    for path in [*checkpoint.shards, *(path for path in small if path.is_file())]:
        data = header_bytes(path) if path in checkpoint.shards else path.read_bytes()
        facts = path.stat()
        found[path.name] = SourceFile(
            bytes=facts.st_size, modified_ns=facts.st_mtime_ns, sha256=hashlib.sha256(data).hexdigest()
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
