from __future__ import annotations

import ctypes
import grp
import pwd
import subprocess
import uuid

import pytest

from virt_sse.errors import ConfigError, StageError
from virt_sse.libvirt.users import User
from virt_sse.stages import storage_user as module
from virt_sse.stages.storage_user import own_users, storage_user

UIDS = range(2_100_001_000, 2_100_001_004)
DISK = uuid.UUID(int=len(UIDS) * 1000 + 1)


def test_a_user_is_found_by_number_or_name() -> None:
    assert storage_user("4711") == User(4711, 4711)
    nobody = pwd.getpwnam("nobody")
    assert storage_user("nobody") == User(nobody.pw_uid, nobody.pw_gid)


@pytest.mark.parametrize(
    "label",
    ["+" + "9" * 5000 + ":+1", f"+1:+{2**32 - 1}", "+4294967296:+1", "\ud800", "+\u0661:+\u0661"]
    + ["0", "root", "root:", ":0", "no-such-user:0"],
)
def test_a_label_without_valid_ids_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match="not as a user and group"):
        User.parse(label)


def test_labels_are_read_as_libvirt_reads_them() -> None:
    """By the function of libvirt's own library."""
    try:
        theirs = ctypes.CDLL("libvirt.so.0").virParseOwnershipIds
    except (OSError, AttributeError):
        pytest.skip("libvirt's library has no virParseOwnershipIds")
    nobody = pwd.getpwnam("nobody")
    group = grp.getgrgid(nobody.pw_gid).gr_name
    owners = ("0", "+0", "root", "+root", "nobody", f"{nobody.pw_uid}", f"+{nobody.pw_uid}", "007", "", "x")
    for label in (
        f"{owner}{end}" for owner in owners for end in ("", ":", ":0", ":+0", ":root", f":{group}")
    ):
        uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
        known = theirs(label.encode(), ctypes.byref(uid), ctypes.byref(gid)) == 0
        try:
            ours = User.parse(label)
        except ConfigError:
            ours = None
        assert ours == (User(uid.value, gid.value) if known else None), label


@pytest.mark.parametrize("root", ["0", "00", "root"])
def test_a_storage_user_is_never_root(root: str) -> None:
    with pytest.raises(ConfigError, match="must not be root"):
        storage_user(root)


@pytest.mark.parametrize(
    "nobody", ["", "no-such-user", "-1", "١٢", "9" * 5000, str(2**32 - 1), "\udcff", "a\0b"]
)
def test_an_unknown_storage_user_is_refused(nobody: str) -> None:
    with pytest.raises(ConfigError, match="no user"):
        storage_user(nobody)


def test_each_process_has_a_user_and_the_disk_a_group() -> None:
    assert own_users(UIDS, DISK, ["cache", "storage"], []) == {
        "storage": User(UIDS[1], UIDS[1]),
        "cache": User(UIDS[2], UIDS[1]),
    }


def test_a_taken_id_is_passed_over_and_the_search_begins_anew_at_the_end() -> None:
    assert own_users(UIDS, DISK, ["storage"], {UIDS[1], UIDS[2], UIDS[3]}) == {
        "storage": User(UIDS[0], UIDS[0])
    }


def test_too_few_free_ids_are_reported() -> None:
    with pytest.raises(StageError, match=f"too few free user ids in {UIDS[0]}-{UIDS[-1]}") as failure:
        own_users(UIDS, DISK, ["cache", "storage"], set(UIDS[1:]))
    assert "widen the range" in str(failure.value.hint)


def test_the_id_of_a_running_process_is_not_free(as_root: None) -> None:
    with subprocess.Popen(["sleep", "60"], user=UIDS[1], group=UIDS[1]) as process:
        assert own_users(UIDS, DISK, ["storage"], [])["storage"].uid == UIDS[2]
        process.kill()
        process.wait()
    assert own_users(UIDS, DISK, ["storage"], [])["storage"].uid == UIDS[1]


def test_ids_outside_of_the_user_namespace_are_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid_map = tmp_path_factory.mktemp("proc") / "uid_map"
    monkeypatch.setattr(module, "_UID_MAP", uid_map)
    uid_map.write_text(f"         0     100000      65536\n{UIDS[0]} 900000 {len(UIDS)}\n")
    assert own_users(UIDS, DISK, ["storage"], [])
    uid_map.write_text(f"         0     100000      65536\n{UIDS[0]} 900000 {len(UIDS) - 1}\n")
    with pytest.raises(ConfigError, match="the user namespace has no user ids"):
        own_users(UIDS, DISK, ["storage"], [])
