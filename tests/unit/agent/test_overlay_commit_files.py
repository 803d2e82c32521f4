"""Files of an overlay commit: overwritten overlays and records."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from virt_sse.agent.overlay_commit import committable
from virt_sse.agent.overlay_commit_record import Overlay, OverlayCommitRecord
from virt_sse.config import Config
from virt_sse.config.file import PlaintextPolicy
from virt_sse.errors import ConfigError, ImageError
from virt_sse.libvirt.disk_chains import ChainLink, DiskChain
from virt_sse.system.overwrite import overwrite_and_remove
from virt_sse.verification.processes import identity

SECRET = b"what nobody shall read again " * 1000


def known(path: Path) -> tuple[int, int]:
    found = identity(path)
    assert found
    return found


def test_a_removed_overlay_is_overwritten_first(tmp_path: Path) -> None:
    path, other = tmp_path / "overlay", tmp_path / "other-name"
    with path.open("wb") as file:
        file.write(SECRET)
        file.seek(8 << 20)
        file.write(SECRET)
    other.hardlink_to(path)
    blocks = path.stat().st_blocks
    overwrite_and_remove(path, known(path))
    assert not path.exists()
    content = other.read_bytes()
    assert b"nobody" not in content
    assert len(content) == (8 << 20) + len(SECRET)
    assert other.stat().st_blocks == blocks, "holes are left"
    overwrite_and_remove(path, (0, 0))


def test_another_file_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path, link, folder = tmp_path / "overlay", tmp_path / "link", tmp_path / "folder"
    path.write_bytes(SECRET)
    link.symlink_to(path)
    folder.mkdir()
    with pytest.raises(ImageError, match="different file"):
        overwrite_and_remove(path, (1, 2))
    with pytest.raises(ImageError, match="cannot open"):
        overwrite_and_remove(link, known(path))
    with pytest.raises(ImageError, match="cannot open"):
        overwrite_and_remove(folder, known(folder))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="different file"):
        overwrite_and_remove(tmp_path / "fifo", known(tmp_path / "fifo"))
    assert path.read_bytes() == SECRET


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "folds"
    overlays = (Overlay(Path("/a"), (1, 2)), Overlay(Path("/b"), (3, 4)))
    record = OverlayCommitRecord(uuid.uuid4(), "domain", "vda", uuid.uuid4(), "token", overlays)
    assert OverlayCommitRecord.read_all(folder) == []
    record.write(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "nonsense.json").write_text("{}")
    (folder / "torn.json").write_text('{"domain-id"')
    assert OverlayCommitRecord.read_all(folder) == [record]
    record.remove(folder)
    assert OverlayCommitRecord.read_all(folder) == []


def test_overlays_that_can_be_committed() -> None:
    ours = ChainLink("/ours", Path("/ours"), is_file=True, is_encrypted=True, disk_id=uuid.uuid4())
    one, two = (ChainLink(name, Path(name), is_file=True) for name in ("/one", "/two"))
    device = ChainLink("/dev/sdb")
    foreign = ChainLink("/foreign", Path("/foreign"), is_file=True, is_encrypted=True)

    def chain(*links: ChainLink, target: str = "vda") -> DiskChain:
        return DiskChain(target, links=links)

    assert committable(chain(one, ours)) == (one,)
    assert committable(chain(two, one, ours)) == (two, one)
    for not_committable in (
        chain(ours),
        chain(one),
        chain(device, ours),
        chain(foreign, one, ours),
        chain(one, foreign, ours),
        chain(one, ours, target="../vda"),
    ):
        assert committable(not_committable) == ()


def test_the_plaintext_policy_is_configured(tmp_path: Path) -> None:
    assert Config.load(tmp_path).agent.plaintext is PlaintextPolicy.WARN
    path = tmp_path / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('[agent]\nplaintext = "commit"\npoll-seconds = 3\n')
    assert Config.load(tmp_path).agent.plaintext is PlaintextPolicy.COMMIT
    assert Config.load(tmp_path).agent.poll_seconds == 3
    for wrong in ('"ignore"', "1", "[]"):
        path.write_text(f"[agent]\nplaintext = {wrong}\n")
        with pytest.raises(ConfigError, match="'warn', 'pause', 'commit'"):
            Config.load(tmp_path)


def test_the_former_name_of_commit_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('[agent]\nplaintext = "fold"\n')
    assert Config.load(tmp_path).agent.plaintext is PlaintextPolicy.COMMIT
