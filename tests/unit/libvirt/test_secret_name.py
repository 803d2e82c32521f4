from __future__ import annotations

import uuid

import pytest

from virt_sse.libvirt.secret_name import SecretName

DISK = uuid.UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")


def test_a_usage_is_read_back() -> None:
    assert SecretName(DISK, "service").usage == "virt-sse:6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1:service"
    assert SecretName.parse(SecretName(DISK, "service").usage) == SecretName(DISK, "service")


@pytest.mark.parametrize("text", ["", "ceph", "virt-ss", "my virt-sse:", " virt-sse:x:y"])
def test_a_usage_of_others_is_ignored(text: str) -> None:
    assert SecretName.parse(text) is None


@pytest.mark.parametrize(
    "text",
    ["virt-sse:", "virt-sse::", "virt-sse:x", "virt-sse:x:service", f"virt-sse:{DISK}", f"virt-sse:{DISK}:"],
)
def test_an_invalid_usage_of_ours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        SecretName.parse(text)


def test_a_secret_has_one_uuid() -> None:
    """Written down: libvirt holds secrets by it while virt-sse is upgraded."""
    assert str(SecretName(DISK, "service").uuid) == "69106d25-ef42-5863-b373-251e35d3cb14"
    names = SecretName(DISK, "host"), SecretName(DISK, "service"), SecretName(uuid.uuid4(), "service")
    assert len({name.uuid for name in names}) == len(names)
