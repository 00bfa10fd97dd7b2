"""Which Triton may listen where: versions, addresses, and what was accepted."""

from __future__ import annotations

import pytest

from triton_repo.errors import ServerError
from triton_repo.serving.ports import Address
from triton_repo.serving.vulnerabilities import holes_of, refuse_known_holes

CHUNKS, MEMORY, BYPASS = "CVE-2025-23310", "CVE-2025-23319", "CVE-2026-24206"


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("2.51.0", [CHUNKS, MEMORY, BYPASS]),
        ("2.59.0", [CHUNKS, MEMORY, BYPASS]),  # 25.06
        ("2.59.1", [BYPASS]),  # 25.07
        ("2.66.0", [BYPASS]),
        ("2.67.0", []),
        ("2.74.0", []),
        ("2.74.0-rc1", []),
        ("3.0", []),
    ],
)
def test_the_holes_of_a_release_are_those_that_later_ones_mended(version, names):
    assert [hole.names.partition(",")[0] for hole in holes_of(version)] == names


@pytest.mark.parametrize("version", [None, "", "unknown", "r25.07"])
def test_a_version_that_is_none_is_its_own_case(version):
    assert holes_of(version) is None
    with pytest.raises(ServerError, match="does not report its version, so its holes are unknown; use the container"):
        refuse_known_holes(version, Address("0.0.0.0"), accepted=False)
    refuse_known_holes(version, Address("127.0.0.1"), accepted=False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_an_address_that_others_reach_is_refused_unless_that_is_accepted(address, caplog):
    with pytest.raises(ServerError) as caught:
        refuse_known_holes("2.51.0", Address(address), accepted=False)
    assert f"listening on {address} with tritonserver 2.51.0, which has known holes" in str(caught.value)
    assert "nvcr.io/nvidia/tritonserver:26.03-py3" in str(caught.value)
    assert f"{CHUNKS}, CVE-2025-23311, fixed in tritonserver:25.07-py3: an HTTP body in chunks" in str(caught.value)
    refuse_known_holes("2.51.0", Address(address), accepted=True)
    assert CHUNKS in caplog.text
    refuse_known_holes("2.74.0", Address(address), accepted=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1"])
def test_this_machine_alone_is_served_without_a_word(address, caplog):
    refuse_known_holes("2.51.0", Address(address), accepted=False)
    assert not caplog.records
