"""Checks that the files which a conversion reads do not change: during the conversion, or before it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from export.checkpoint.digests import Run, shards_read_otherwise
from export.checkpoint.file_table import INDEX_FILE
from export.checkpoint.folder import Checkpoint, file_digest, header_bytes
from export.conversion.parts import PartRecord, read_record
from export.errors import CheckpointError, names
from export.files.reading import is_regular
from export.files.resume import PartialFolder, SourceFile


def source_files(checkpoint: Checkpoint) -> dict[str, SourceFile]:
    """The state of every file that a conversion reads. Of a shard only the header is hashed, of other files all."""
    found = {}
    small = [*checkpoint.settings_files(), *checkpoint.tokenizer_files()]
    small += [] if checkpoint.is_gguf else [checkpoint.folder / INDEX_FILE]
    for path in [*checkpoint.shards, *(path for path in small if is_regular(path))]:
        shard = path in checkpoint.shards
        digest = hashlib.sha256(header_bytes(path)).hexdigest() if shard else file_digest(path)
        facts = path.stat()
        found[path.relative_to(checkpoint.folder).as_posix()] = SourceFile(
            bytes=facts.st_size,
            modified_ns=facts.st_mtime_ns,
            sha256=digest,
            changed_ns=facts.st_ctime_ns,
            inode=facts.st_ino,
            access=(facts.st_mode, facts.st_uid, facts.st_gid, facts.st_nlink),
        )
    return found


def check_resumed(folder: PartialFolder, checkpoint: Checkpoint, what: str) -> None:
    """Raise CheckpointError if an earlier run made its finished parts from other bytes than the shards hold.

    Only shards with a changed inode or time of change are read and hashed: a writer can restore a file's size and
    time of modification.
    """
    moved = [shard for shard in folder.moved if any(shard == path.name for path in checkpoint.shards)]
    records = [record for record in map(read_record, folder.records) if record is not None]
    changed = shards_read_otherwise(checkpoint, _runs(records), moved) if moved else []
    if changed:
        raise CheckpointError(
            f"resuming {what}: {names(changed)} of {checkpoint.folder} changed since the run was interrupted, though "
            "size and time are the same; the parts that were made of it are discarded: build again"
        )


def check_unchanged(
    checkpoint: Checkpoint, before: Mapping[str, SourceFile], records: Sequence[PartRecord] | None = None
) -> None:
    """Raise CheckpointError if a file has changed since the conversion began, when its state was `before`.

    If only mode, user, group or number of links of a file changed, the file is hashed again and compared with the
    digests in `records`. Without `records` such a change is accepted.
    """
    after = source_files(checkpoint)
    changed: list[str] = []
    touched: list[str] = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or replace(new, changed_ns=old.changed_ns, access=old.access) != old:
            changed.append(name)
        elif new.changed_ns != old.changed_ns:
            (changed if new.access == old.access else touched).append(name)
    if touched and records is not None:
        changed += shards_read_otherwise(checkpoint, _runs(records), touched)
    if changed:
        raise CheckpointError(
            f"reading {checkpoint.folder}: {names(changed)} changed while it was read, so the output would mix two "
            "versions of the checkpoint; the output is discarded: build again when nothing writes to the folder"
        )


def _runs(records: Sequence[PartRecord]) -> dict[str, tuple[Run, ...]]:
    return {name: found for record in records for name, found in record.sources.items()}
