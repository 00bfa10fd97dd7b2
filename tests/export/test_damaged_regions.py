"""Regions of a file that are held to their digests."""

import hashlib

from export.conversion.parts import Region, damaged_regions

CONTENT = bytes(range(200))


def region(offset, num_bytes):
    digest = hashlib.sha256(CONTENT[offset : offset + num_bytes]).hexdigest()
    return Region(name=f"region {offset}", offset=offset, bytes=num_bytes, sha256=digest)


def test_what_a_changed_byte_and_an_end_that_is_lost_damage_is_told_by_its_place(tmp_path):
    path, regions = tmp_path / "data", [region(0, 64), region(64, 64), region(128, 72)]
    path.write_bytes(CONTENT)
    assert damaged_regions(path, regions) == []
    path.write_bytes(CONTENT[:70] + b"\0" + CONTENT[71:-1])
    changed, cut = damaged_regions(path, regions)
    found = hashlib.sha256(CONTENT[64:70] + b"\0" + CONTENT[71:128]).hexdigest()
    assert changed == f"region 64 (bytes 64 to 128): found SHA-256 {found[:12]}…, expected {regions[1].sha256[:12]}…"
    assert cut == f"region 128 (bytes 128 to 200): found SHA-256 nothing…, expected {regions[2].sha256[:12]}…"
    path.unlink()
    assert [problem.partition(" (")[0] for problem in damaged_regions(path, regions)] == [
        "region 0", "region 64", "region 128",
    ]  # fmt: skip
