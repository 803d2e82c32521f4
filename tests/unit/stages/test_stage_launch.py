"""What a stage's program is, once it runs: nobody who could do harm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.processes import open_files
from support.stage_programs import SLEEP, say, status, wait_end
from support.waiting import wait_until
from virt_sse.errors import DiskInUseError, StageError
from virt_sse.libvirt.users import User
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, image_file, img
from virt_sse.qemu.formatting import Volume
from virt_sse.stages.locked_process import Command, LockedProcess


@pytest.fixture
def process(folder: Path) -> Iterator[LockedProcess]:
    process = LockedProcess(folder / "cache")
    yield process
    process.stop()


def test_a_stage_process_has_given_up_root(process: LockedProcess, user: User) -> None:
    process.start(SLEEP, user)
    pid = process.pid()
    assert pid
    wait_until(lambda: status(pid)["Name"] == "sleep", "the program runs")
    is_now = status(pid)
    assert is_now["Uid"].split() == [str(user.uid)] * 4
    assert is_now["Gid"].split() == [str(user.gid)] * 4
    assert is_now["Groups"] == ""
    assert is_now["NoNewPrivs"] == "1"
    assert {is_now[name] for name in ("CapPrm", "CapEff", "CapAmb")} == {"0000000000000000"}
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    assert next(line.split()[4:6] for line in limits if line.startswith("Max core")) == ["0", "0"]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_a_stage_process_inherits_only_given_descriptors(
    process: LockedProcess, folder: Path, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "of the caller's")
    given, other = os.pipe()
    os.set_inheritable(other, True)
    try:
        process.start(Command(["sleep", "60"], [given], environment={"TMPDIR": "/there"}), user)
    finally:
        os.close(given)
        os.close(other)
    pid = process.pid()
    assert pid
    wait_until(
        lambda: (status(pid)["Name"], status(pid)["State"][0]) == ("sleep", "S"), "its libraries are loaded"
    )
    environment = dict(
        entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")[:-1]
    )
    assert environment == {"PATH": os.environ["PATH"], "LC_ALL": "C", "TMPDIR": "/there"}
    found = open_files(pid)
    assert found.pop(given).name.startswith("pipe:")
    assert found.pop(0) == Path("/dev/null")
    assert found.pop(1) == found.pop(2) == folder / "cache.log"
    assert list(found.values()) == [folder / "cache.lock"]


def test_a_stage_process_outlives_its_starter(process: LockedProcess, user: User) -> None:
    """nbdkit asks to be ended together with its parent, PR_SET_PDEATHSIG."""
    process.start(say("echo $PPID; exec sleep 60"), user)
    pid = process.pid()
    assert pid
    wait_until(lambda: status(pid)["Name"] == "sleep", "the program runs")
    assert status(pid)["PPid"] == process.log


def test_a_stage_process_makes_private_files(process: LockedProcess, user: User) -> None:
    process.start(say("umask"), user)
    assert wait_end(process) == "0077"


def test_a_listening_socket_is_its_descriptor_3(process: LockedProcess, folder: Path, user: User) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        process.start(
            Command(
                ["sh", "-c", "echo $LISTEN_FDS $(($LISTEN_PID - $$)); exec readlink /proc/$$/fd/3"],
                listening=listener.fileno(),
            ),
            user,
        )
        assert wait_end(process) == f"1 0 socket:[{os.fstat(listener.fileno()).st_ino}]"


@pytest.mark.parametrize("taken", ["lock", "image"])
def test_an_open_descriptor_3_is_kept(process: LockedProcess, folder: Path, user: User, taken: str) -> None:
    (folder / "image").touch()
    script = (
        "import os, socket\n"
        "from pathlib import Path\n"
        "from virt_sse.libvirt.users import User\n"
        "from virt_sse.stages.locked_process import Command, LockedProcess\n"
        f"folder = Path({str(folder)!r})\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(str(folder / 'socket'))\n"
        "listener.listen()\n"
        "listening = os.dup2(listener.detach(), 50)\n"
        "os.closerange(3, 50)\n"
        f"image = os.open(folder / 'image', os.O_RDWR) if {taken == 'image'} else None\n"
        "command = Command(['sleep', '60'], listening=listening)\n"
        f"LockedProcess(folder / 'cache').start(command, User({user.uid}, {user.gid}), image=image)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    pid = process.pid()
    assert pid
    wait_until(lambda: status(pid)["Name"] == "sleep", "the program runs")
    found = open_files(pid)
    assert found[3].name.startswith("socket:")
    assert folder / "cache.lock" in found.values()
    if taken == "image":
        with pytest.raises(DiskInUseError):
            image_file.refuse_if_open(folder / "image")


class TestImageLock:
    """QEMU and its tools keep away from an image that a program which is none of theirs writes to."""

    @pytest.fixture
    def image(self, folder: Path) -> images.KeyedImage:
        dek = Dek.generate()
        formatting.make(folder / "image", DiskFormat.QCOW2, 1 << 20, [Volume(AES_256_XTS, dek)])
        return images.KeyedImage(folder / "image", "qcow2", dek.passphrase)

    def test_qemu_sees_an_image_held_by_a_stage_as_in_use(
        self, process: LockedProcess, image: images.KeyedImage, user: User
    ) -> None:
        with image_file.opened(image.path, os.O_RDWR) as descriptor:
            process.start(SLEEP, user, image=descriptor)
        for _ in range(2):  # to have asked takes no lock away
            with pytest.raises(DiskInUseError, match="in use by"):
                img.info(image.path)
            with pytest.raises(DiskInUseError):
                image_file.refuse_if_open(image.path)
        assert 'Failed to get "write" lock' in image.io("write 0 512").stderr
        assert img.info(image.path, shared=True).encrypted
        process.stop()
        assert image.opens()
        image_file.refuse_if_open(image.path)

    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_stage_does_not_start_on_an_image_that_qemu_has_open(
        self, process: LockedProcess, image: images.KeyedImage, user: User, read_only: bool
    ) -> None:
        with image.held(read_only=read_only), image_file.opened(image.path, os.O_RDWR) as descriptor:
            with pytest.raises(StageError, match="the image is in use by a running domain"):
                process.start(SLEEP, user, image=descriptor)
            assert process.pid() is None
