"""Downloads a model or adapter from the Hugging Face Hub into the hub's cache, so that an interrupted download goes on.

    folder = download("mlabonne/phixtral-4x2_8", None)       # .../snapshots/<commit>

The layout of the cache, the token and the environment variables are those of the huggingface_hub package (HF_HOME,
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Files that `export.checkpoint.file_table` refuses are not fetched.

huggingface_hub itself begins a file anew after its process has ended, and compares only sizes. So files are fetched
here: with HTTP's ranges into `blobs/<digest>.moeship`, compared with the digest in the hub's listing, and then renamed.
A file that another program left in the cache is compared once; `moeship-checked` in the repository's folder lists what
was compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from export.checkpoint.file_table import DOWNLOAD_EXCEPTIONS, DOWNLOAD_PATTERNS, Fate, rule_of
from export.errors import CheckpointError, MoeshipError, named
from export.files.output import require_space

logger = logging.getLogger(__name__)

_CHECKED_FILE = "moeship-checked"
_CHUNK = 1 << 20
_PAGES = (b"<!doctype html", b"<html")  # how a page begins that a proxy or a login puts in the place of a file


@dataclass(frozen=True, kw_only=True)
class _HubFile:
    """A file of a repository: its path, bytes, and digest (SHA-256, or git's SHA-1 of small files)."""

    path: str
    size: int
    digest: str


def download(name: str, revision: str | None) -> Path:
    """The folder of a hub id in the hub's cache, complete, at `revision` (None: the main branch). Raises
    CheckpointError, which says what the hub answered and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # it tells of every try, and what matters of its errors is told below
    try:
        return _download(name, revision or constants.DEFAULT_REVISION)
    except MoeshipError:
        raise
    except Exception as error:  # of huggingface_hub and of the HTTP library that its version uses
        raise CheckpointError(
            f"opening the checkpoint {named(name)}: there is no such folder here, and it could not be downloaded from "
            f"the hub: {_reason(error, name, revision)}"
        ) from error


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.file_download import repo_folder_name

    try:
        commit, files = _listing(name, revision)
    except Exception as error:
        if not isinstance(error, OfflineModeIsEnabled) and not _is_network_error(error):
            raise
        folder = Path(_cached(name, revision))
        if not isinstance(error, OfflineModeIsEnabled):
            logger.warning("the hub cannot be reached; taking %s of the cache, commit %s", named(name), folder.name)
        return folder
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    storage = cache / repo_folder_name(repo_id=name, repo_type="model")
    blobs = storage / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    checked = _read_checked(storage)
    missing = sum(file.size - _size_of(_partial(blobs, file)) for file in files if not (blobs / file.digest).is_file())
    if missing > 0:
        require_space(blobs / "a file", missing, f"the download of {name}")
        logger.info("downloading %s, %.3f GB of %d files, into %s", name, missing / 1e9, len(files), storage)
    for file in files:
        if file.digest not in checked:
            _fetch(name, commit, file, blobs)
            with (storage / _CHECKED_FILE).open("a", encoding="utf-8") as record:
                record.write(f"{file.digest}\n")
    folder = Path(_linked(name, commit))
    if revision != commit:
        (storage / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (storage / "refs" / revision).write_text(commit, encoding="utf-8")
    return folder


def _listing(name: str, revision: str) -> tuple[str, list[_HubFile]]:
    """The commit of a revision, and the files of it that are taken."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.repo_info(name, revision=revision).sha
    if not _is_digest(commit):  # it becomes the name of a folder
        raise ValueError("the answer names no commit")
    found = []
    for entry in api.list_repo_tree(name, recursive=True, revision=commit):
        rule = rule_of(entry.path)
        if isinstance(entry, RepoFile) and rule is not None and rule.fate is not Fate.REFUSED:
            digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            if not _is_digest(digest):
                raise ValueError(f"the listing has no digest of {entry.path}")
            found.append(_HubFile(path=entry.path, size=int(entry.size), digest=digest))
    if not found:
        raise CheckpointError(
            f"opening the checkpoint {named(name)}: its repository holds no config.json, no safetensors files and no "
            "tokenizer; check that it is a model in transformers' format"
        )
    return commit, found


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) in (40, 64) and set(text) <= set("0123456789abcdef")


def _fetch(name: str, commit: str, file: _HubFile, blobs: Path) -> None:
    """Put a file into the cache under its digest, from what an earlier run left of it on."""
    whole, partial = blobs / file.digest, _partial(blobs, file)
    with _locked(partial) as out:
        if whole.is_file():
            if _digest_of(whole, file) == file.digest:
                return
            whole.unlink()  # another program's; what it was cut from is fetched again
            logger.warning("%s in the hub's cache was damaged and is downloaded again", file.path)
        if out.seek(0, os.SEEK_END) > file.size:
            out.truncate(0)
        start = out.seek(0, os.SEEK_END)
        if start < file.size or file.size == 0:
            _fetch_rest(name, commit, file, out, start)
        out.flush()
        found = _digest_of(partial, file)
        if found != file.digest:
            partial.unlink()
            raise CheckpointError(
                f"downloading {named(file.path)} of {named(name)}: its digest is {found}, the hub lists {file.digest}; "
                "what came was removed: run the command again; if it fails again, look for a proxy that changes files"
            )
        os.fsync(out.fileno())
        partial.rename(whole)


def _fetch_rest(name: str, commit: str, file: _HubFile, out: IO[bytes], start: int) -> None:
    """Append what a file lacks. The token goes to the hub alone, and not to the host that the hub names instead."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import get_hf_file_metadata, http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(name, file.path, revision=commit), build_hf_headers()
    metadata = get_hf_file_metadata(url, headers=headers)
    if metadata.etag is None or metadata.commit_hash is None:
        raise ValueError("the answer for a file names no digest and no commit")
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
    try:
        http_get(metadata.location, out, resume_size=start, headers=headers, expected_size=file.size)
    finally:
        out.flush()
        out.seek(0)
        if out.read(64).lower().lstrip().startswith(_PAGES):
            out.truncate(0)
            raise ValueError("a page came in the place of a file")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """A file that is open for reading and writing, and that no other process fetches meanwhile."""
    file = path.open("a+b")
    fcntl.flock(file, fcntl.LOCK_EX)
    while not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()  # another process renamed the file while this one waited
        file = path.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield file
    finally:
        if _size_of(path) == 0:
            path.unlink(missing_ok=True)
        file.close()


def _partial(blobs: Path, file: _HubFile) -> Path:
    return blobs / f"{file.digest}.moeship"


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest_of(path: Path, file: _HubFile) -> str:
    """The digest that the hub lists: SHA-256, or git's SHA-1 of a blob, which begins with its kind and size."""
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(file.digest) == 40:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read_checked(storage: Path) -> set[str]:
    """The digests of the files in the cache that were compared, and are still there."""
    try:
        lines = (storage / _CHECKED_FILE).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return set()
    return {line for line in lines if _is_digest(line) and (storage / "blobs" / line).is_file()}


def _linked(name: str, commit: str) -> str:
    """The folder of a commit, which links to the files that are in the cache."""
    import huggingface_hub

    return str(
        huggingface_hub.snapshot_download(
            name,
            revision=commit,
            allow_patterns=list(DOWNLOAD_PATTERNS),
            ignore_patterns=list(DOWNLOAD_EXCEPTIONS),
        )
    )


def _cached(name: str, revision: str) -> str:
    import huggingface_hub

    return str(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(DOWNLOAD_PATTERNS),
            ignore_patterns=list(DOWNLOAD_EXCEPTIONS),
        )
    )


def _is_network_error(error: BaseException) -> bool:
    """Whether no answer came. The HTTP libraries of huggingface_hub's versions name these errors alike."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutException"})


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """What went wrong and what to do, without any text of the server's."""
    from huggingface_hub import constants, errors, get_token

    token = "the token that was sent" if get_token() else "no token was found"
    give = f"give a token of an account that may read it, in HF_TOKEN or by `hf auth login` ({token})"
    if get_token():
        give = "the token that was sent (HF_TOKEN, or that of `hf auth login`) may not read it; give another"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated; accept its conditions at {constants.ENDPOINT}/{name}, and {give}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {named(revision or constants.DEFAULT_REVISION)}; check its name"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return f"{constants.ENDPOINT} shows no model of this name; check the name, and if it is private, {give}"
    if isinstance(error, errors.IncompleteSnapshotError):
        return "only a part of it is in the cache, and the hub cannot be reached; run again with a network"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub; download it with a network first"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached; check the network, or download it and pass its folder"
        )
    if status is not None:
        return f"{constants.ENDPOINT} answered with status {status}; try again later. What has come is kept"
    if _is_network_error(error) or "Consistency check failed" in str(error):
        return "the connection broke off; what has come is kept: run the command again, and the download goes on"
    if isinstance(error, ValueError | errors.FileMetadataError):
        return (
            f"{constants.ENDPOINT} gave an answer that is not the hub's, such as the page of a proxy; check "
            "HF_ENDPOINT and the network"
        )
    return f"{named(error)}; check the name and the network, or download it and pass its folder"
