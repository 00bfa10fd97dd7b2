"""Whether the file of the kernels library is whole, told from its bytes before the system loads it.

The system's loader maps a library and trusts its headers. A file that was cut, or that holds zeros in place of its end,
ends the process by a signal (SIGBUS, SIGSEGV), so Python cannot report it. The install therefore appends SHA-256 of the
library to the file; the loader ignores bytes behind those that the headers name. Reading and hashing the 590 kB takes
less than 1 ms on one core of a Xeon, so every load checks the digest. A process that tries the load would take longer.

A file without the appended digest, such as one that a packager stripped, is compared with its own ELF headers. They
show a cut or overwritten end, but not a change elsewhere.

setup.py runs this file by its path, so it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import struct

_MARK = b"\nmoeship sha256: "
_DIGEST_BYTES = 32
_MAGIC, _CLASS_64 = b"\x7fELF", 2
_ORDERS = {1: "<", 2: ">"}  # value of e_ident[EI_DATA] -> byte order
_STRING_TABLE = 3  # SHT_STRTAB


def with_digest(library: bytes) -> bytes:
    """The bytes of a library with their SHA-256 appended."""
    return library + _MARK + hashlib.sha256(library).digest()


def found_damage(content: bytes) -> str | None:
    """What shows that the bytes of a library file are damaged; None if they are whole, or nothing can be told."""
    end = len(content) - _DIGEST_BYTES
    start = end - len(_MARK)
    if start < 0 or content[start:end] != _MARK:
        return _cut_end(content)
    found, expected = hashlib.sha256(content[:start]).hexdigest(), content[end:].hex()
    return None if found == expected else f"found SHA-256 {found[:12]}…, expected {expected[:12]}… of the install"


def _cut_end(content: bytes) -> str | None:
    """What a 64-bit ELF file lacks of the bytes that its own headers name; None if it has them or is another file.

    Source of offsets and sizes: the ELF-64 object file format, Elf64_Ehdr, Elf64_Phdr and Elf64_Shdr.
    """
    if len(content) < 64 or content[:4] != _MAGIC or content[4] != _CLASS_64 or content[5] not in _ORDERS:
        return None
    order = _ORDERS[content[5]]
    segments, sections = struct.unpack_from(order + "QQ", content, 32)
    segment_bytes, num_segments, section_bytes, num_sections, names = struct.unpack_from(order + "5H", content, 54)
    needed = max(segments + num_segments * segment_bytes, sections + num_sections * section_bytes)
    for index in range(num_segments):
        header = segments + index * segment_bytes
        if header + 56 <= len(content):
            offset, _, _, size = struct.unpack_from(order + "4Q", content, header + 8)
            needed = max(needed, offset + size)
    if needed > len(content):
        return f"found {len(content)} bytes, expected at least {needed}"
    if num_sections:  # the table of sections is the last thing that a linker writes
        kind = sections + names * section_bytes + 4
        if kind + 4 > len(content) or struct.unpack_from(order + "I", content, kind) != (_STRING_TABLE,):
            return "its end was overwritten: its table of sections has no names"
    return None
