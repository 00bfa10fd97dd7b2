"""A library's file is whole or damaged: told from hand-made bytes, with the digest of the install and without."""

from __future__ import annotations

import hashlib
import struct

import pytest

from trt_build.ort.kernels.library_file import found_damage, with_digest


def elf(order="<", kind=2):
    """An ELF file of 64 bits (`kind` 2; 1: 32 bits) with one segment of 10 bytes and two sections, the names last.

    Elf64_Ehdr has 64 bytes, Elf64_Phdr 56 and Elf64_Shdr 64.
    """
    segment, data, sections = 64, 64 + 56, 64 + 56 + 10
    ident = b"\x7fELF" + bytes([kind, 1 if order == "<" else 2, 1]) + bytes(9)
    header = ident + struct.pack(order + "2HI3QI6H", 3, 62, 1, 0, segment, sections, 0, 64, 56, 1, 64, 2, 1)
    program = struct.pack(order + "2I6Q", 1, 5, data, 0, 0, 10, 10, 1)
    names = struct.pack(order + "2I4Q2I2Q", 0, 3, 0, 0, data, 10, 0, 0, 1, 0)
    return header + program + bytes(range(10)) + bytes(64) + names


@pytest.mark.parametrize("library", [b"", b"a library", elf()])
def test_the_digest_of_the_install_tells_every_change(library):
    whole = with_digest(library)
    assert whole.startswith(library)
    assert whole.endswith(hashlib.sha256(library).digest())
    assert found_damage(whole) is None
    if library:
        changed = bytes([library[0] ^ 1]) + whole[1:]
        digest = hashlib.sha256(changed[: len(library)]).hexdigest()[:12]
        assert found_damage(changed) == (
            f"found SHA-256 {digest}…, expected {hashlib.sha256(library).hexdigest()[:12]}… of the install"
        )


@pytest.mark.parametrize("order", ["<", ">"])
def test_without_a_digest_a_cut_end_is_told_by_the_librarys_own_headers(order):
    whole = elf(order)
    assert len(whole) == 258
    assert found_damage(whole) is None
    assert found_damage(whole + b"more") is None
    assert found_damage(whole[:-1]) == "found 257 bytes, expected at least 258"
    assert found_damage(whole[:64]) == "found 64 bytes, expected at least 258"
    assert found_damage(whole[:-64] + bytes(64)) == "its end was overwritten: its table of sections has no names"


def test_a_segment_may_reach_farther_than_the_sections():
    longer = bytearray(elf())
    longer[64 + 32 : 64 + 40] = struct.pack("<Q", 1000)  # p_filesz; the segment begins at byte 120
    assert found_damage(bytes(longer)) == "found 258 bytes, expected at least 1120"
    assert found_damage(bytes(longer) + bytes(1120 - 258)) is None


OTHERS = {
    "no bytes": b"", "another kind": b"MZ" + bytes(80), "no whole header": elf()[:63], "32 bits": elf(kind=1),
    "no order of bytes": b"\x7fELF\x02\x03" + bytes(80),
}  # fmt: skip


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_of_other_files_nothing_can_be_told(content):
    assert found_damage(content) is None
