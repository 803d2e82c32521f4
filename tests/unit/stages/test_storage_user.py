from __future__ import annotations

import pwd

import pytest

from virt_sse.errors import ConfigError
from virt_sse.libvirt.users import User
from virt_sse.stages.storage_user import DEFAULT_STORAGE_USER, storage_user

QEMU = User(64055, 108)


def test_a_user_is_found_by_number_or_name() -> None:
    assert storage_user("4711", QEMU) == User(4711, 4711)
    nobody = pwd.getpwnam("nobody")
    assert storage_user("nobody", QEMU) == User(nobody.pw_uid, nobody.pw_gid)


def test_without_a_storage_user_qemus_user_is_taken() -> None:
    try:
        entry = pwd.getpwnam(DEFAULT_STORAGE_USER)
    except KeyError:
        assert storage_user(None, QEMU) == QEMU
    else:
        assert storage_user(None, QEMU) == User(entry.pw_uid, entry.pw_gid)


@pytest.mark.parametrize(
    "label", ["+" + "9" * 5000 + ":+1", f"+1:+{2**32 - 1}", "+4294967296:+1", "\ud800", "+\u0661:+\u0661"]
)
def test_a_label_without_valid_ids_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match="not as a numeric user"):
        User.parse(label)


@pytest.mark.parametrize("root", ["0", "00", "root"])
def test_a_storage_user_is_never_root(root: str) -> None:
    with pytest.raises(ConfigError, match="must not be root"):
        storage_user(root, QEMU)


@pytest.mark.parametrize(
    "nobody", ["", "no-such-user", "-1", "١٢", "9" * 5000, str(2**32 - 1), "\udcff", "a\0b"]
)
def test_an_unknown_storage_user_is_refused(nobody: str) -> None:
    with pytest.raises(ConfigError, match="no user"):
        storage_user(nobody, QEMU)
