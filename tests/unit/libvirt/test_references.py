from __future__ import annotations

import uuid

import pytest

from virt_sse.libvirt.references import parse_usage, secret_uuid, usage

DISK = uuid.UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")


def test_a_usage_is_read_back() -> None:
    assert usage(DISK, "service") == "virt-sse:6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1:service"
    assert parse_usage(usage(DISK, "service")) == (DISK, "service")


@pytest.mark.parametrize("text", ["", "ceph", "virt-ss", "my virt-sse:", " virt-sse:x:y"])
def test_a_usage_of_others_is_ignored(text: str) -> None:
    assert parse_usage(text) is None


@pytest.mark.parametrize(
    "text",
    ["virt-sse:", "virt-sse::", "virt-sse:x", "virt-sse:x:service", f"virt-sse:{DISK}", f"virt-sse:{DISK}:"],
)
def test_an_invalid_usage_of_ours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_usage(text)


def test_a_secret_has_one_uuid() -> None:
    """Written down: libvirt holds secrets by it while virt-sse is upgraded."""
    assert str(secret_uuid(DISK, "service")) == "69106d25-ef42-5863-b373-251e35d3cb14"
    assert secret_uuid(DISK, "host") != secret_uuid(DISK, "service") != secret_uuid(uuid.uuid4(), "service")
