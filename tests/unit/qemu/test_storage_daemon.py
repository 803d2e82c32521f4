from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support import images
from support.images import FORMATS, KeyedImage
from virt_sse.errors import DiskInUseError, MonitorError
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, image_file, qmp
from virt_sse.qemu.formatting import Volume
from virt_sse.qemu.storage_daemon import StorageDaemon, arguments

M = 1 << 20
DISK = uuid.UUID("5b0f2f5e-6f0c-4d3a-8d9e-0123456789ab")
INNER, OUTER = Dek.generate(), Dek.generate()


@dataclass(frozen=True, slots=True)
class Daemon(StorageDaemon):
    """One that runs, exports at *nbd*, and is *process*."""

    nbd: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-storage-daemon", "qemu-img", "qemu-io", "cryptsetup")


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a name as short as sockets need it."""
    with TemporaryDirectory(prefix="virt-sse-") as name:
        yield Path(name)


@pytest.fixture
def daemon(folder: Path) -> Iterator[Daemon]:
    with listening(folder / "qmp") as monitor, listening(folder / "nbd") as nbd:
        process = subprocess.Popen(arguments(monitor, nbd), pass_fds=[monitor, nbd])
    with process:
        yield Daemon(folder / "qmp", folder / "nbd", process)
        process.kill()


@contextmanager
def listening(path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener.fileno()


def image(folder: Path, image_format: str, *, double: bool = False, size: int = M) -> KeyedImage:
    volumes = [Volume(AES_256_XTS, INNER)] if double else []
    volumes.append(Volume(AES_256_CBC, OUTER))
    formatting.make(folder / "image", DiskFormat(image_format), size, volumes)
    return KeyedImage(folder / "image", image_format, OUTER.passphrase)


def io(daemon: Daemon, command: str, name: object = DISK) -> str:
    """What qemu-io says of a command on what the daemon exports."""
    uri = f"nbd+unix:///{name}?socket={daemon.nbd}"
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", command, uri], capture_output=True, text=True)
    return done.stdout + done.stderr


def everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_export_has_the_content_of_the_volume(daemon: Daemon, folder: Path, image_format: str) -> None:
    keyed = image(folder, image_format)
    keyed.write(0, 4096, 0x11)
    daemon.open_volumes(keyed.path, DiskFormat(image_format), [OUTER], str(DISK))
    assert daemon.sizes() == [M]
    assert "pattern" not in io(daemon, "read -P 0x11 0 4096").lower()
    assert "wrote 4096" in io(daemon, "write -P 0x22 8192 4096")
    assert "export" in io(daemon, "read 0 512", name="other")
    with pytest.raises(DiskInUseError):
        image_file.refuse_if_open(keyed.path)
    nodes, _, _ = daemon.block_graph()
    node = {str(node["node-name"]): node for node in nodes}["volume"]
    assert node["encrypted"]
    assert OUTER.passphrase not in Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes()
    daemon.process.terminate()
    daemon.process.wait()
    assert keyed.has(0, 4096, 0x11)
    assert keyed.has(8192, 4096, 0x22)


def test_the_dek_is_forgotten_once_the_volume_is_open(daemon: Daemon, folder: Path) -> None:
    keyed = image(folder, "raw")
    daemon.open_volumes(keyed.path, DiskFormat.RAW, [OUTER], str(DISK))

    async def objects() -> list[str]:
        async with qmp.connected(daemon.monitor) as monitor:
            return [each["name"] for each in await monitor.execute("qom-list", {"path": "/objects"})]

    assert not [name for name in asyncio.run(objects()) if name.startswith("dek")]


@pytest.mark.parametrize("image_format", FORMATS)
def test_another_dek_serves_nothing_and_is_not_shown(daemon: Daemon, folder: Path, image_format: str) -> None:
    keyed = image(folder, image_format)
    other = Dek.generate()
    with pytest.raises(MonitorError, match="blockdev-add: Invalid password") as failure:
        daemon.open_volumes(keyed.path, DiskFormat(image_format), [other], str(DISK))
    assert other.passphrase.decode() not in everything_said(failure.value)
    assert "export" in io(daemon, "read 0 512")


def test_an_image_that_cannot_be_opened_is_reported(daemon: Daemon, folder: Path) -> None:
    with pytest.raises(MonitorError, match="No such file") as failure:
        daemon.open_volumes(folder / "missing", DiskFormat.RAW, [OUTER], str(DISK))
    assert OUTER.passphrase.decode() not in everything_said(failure.value)


def test_an_image_in_use_is_refused(daemon: Daemon, folder: Path) -> None:
    keyed = image(folder, "qcow2")
    with keyed.held(), pytest.raises(MonitorError, match='Failed to get "write" lock'):
        daemon.open_volumes(keyed.path, DiskFormat.QCOW2, [OUTER], str(DISK))


def test_a_daemon_that_has_ended_is_an_error(daemon: Daemon, folder: Path) -> None:
    keyed = image(folder, "raw")
    daemon.open_volumes(keyed.path, DiskFormat.RAW, [OUTER], str(DISK))
    os.kill(daemon.process.pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, daemon.process.kill)
    killer.start()
    with pytest.raises(MonitorError, match=r"the monitor does not answer|the process ended during"):
        daemon.sizes()
    killer.join()
    daemon.process.wait()
    with pytest.raises(MonitorError, match="the monitor does not answer"):
        daemon.sizes()
    with pytest.raises(MonitorError, match="the monitor does not answer"):
        StorageDaemon(folder / "nowhere").open_volumes(keyed.path, DiskFormat.RAW, [OUTER], str(DISK))


class Guest:
    """A guest's QEMU that has the inner volume open over NBD, as node ``disk``."""

    def __init__(self, folder: Path) -> None:
        self._monitor = folder / "guest-qmp"
        self._said = folder / "guest-said"

    @contextmanager
    def run(self, daemon: Daemon, image_format: str, *, reconnect_seconds: int) -> Iterator[Guest]:
        images.require("qemu-system-x86_64")
        key = DiskFormat(image_format).qemu_key_secret
        options = f"node-name=disk,driver={DiskFormat(image_format).qemu_driver},{key}=dek,"
        options += "encrypt.format=luks," if image_format == "qcow2" else ""
        options += f"file.driver=nbd,file.server.type=unix,file.server.path={daemon.nbd},"
        options += f"file.export={DISK},file.reconnect-delay={reconnect_seconds}"
        command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
        command += ["-object", f"secret,id=dek,data={INNER.passphrase.decode()}", "-blockdev", options]
        with listening(self._monitor) as monitor, self._said.open("wb") as said:
            command += [
                "-chardev",
                f"socket,id=qmp,fd={monitor},server=on,wait=off",
                "-mon",
                "qmp,mode=control",
            ]
            process = subprocess.Popen(command, pass_fds=[monitor], stdout=said, stderr=said)
        with process:
            try:
                yield self
            finally:
                process.kill()

    def io(self, command: str) -> str:
        """What qemu-io within it says of a command."""
        before = len(self._said.read_text())
        self._do("human-monitor-command", {"command-line": f'qemu-io disk "{command}"'})
        return self._said.read_text()[before:]

    def resize(self, size: int) -> None:
        self._do("block_resize", {"node-name": "disk", "size": size})

    def _do(self, command: str, arguments: dict[str, object]) -> None:
        async def do() -> None:
            async with qmp.connected(self._monitor) as monitor:
                await monitor.execute(command, arguments)

        asyncio.run(do())


def test_a_raw_volume_grows_under_a_guest_that_connects_again(daemon: Daemon, folder: Path) -> None:
    image(folder, "raw", double=True)
    daemon.open_volumes(folder / "image", DiskFormat.RAW, [OUTER], str(DISK))
    (before,) = daemon.sizes()
    with Guest(folder).run(daemon, "raw", reconnect_seconds=10) as guest:
        assert "wrote 4096" in guest.io("write -P 0x33 0 4096")
        daemon.grow([before + 3 * M], str(DISK))
        daemon.grow([before + M], str(DISK))  # is smaller by now
        assert daemon.sizes() == [before + 3 * M]
        assert "wrote 4096" in guest.io("write -P 0x44 4096 4096")
        guest.resize(4 * M)
        assert "wrote 4096" in guest.io(f"write -P 0x55 {4 * M - 4096} 4096")
        for pattern, offset in ((0x33, 0), (0x44, 4096), (0x55, 4 * M - 4096)):
            assert "Pattern" not in guest.io(f"read -P {pattern:#x} {offset} 4096")


def test_a_qcow2_volume_has_the_room_already(daemon: Daemon, folder: Path) -> None:
    image(folder, "qcow2", double=True)
    daemon.open_volumes(folder / "image", DiskFormat.QCOW2, [OUTER], str(DISK))
    with Guest(folder).run(daemon, "qcow2", reconnect_seconds=0) as guest:
        guest.resize(8 * M)
        assert "wrote 4096" in guest.io(f"write -P 0x55 {8 * M - 4096} 4096")
        assert "Pattern" not in guest.io(f"read -P 0x55 {8 * M - 4096} 4096")


def test_a_volume_that_cannot_grow_is_exported_again(daemon: Daemon, folder: Path) -> None:
    keyed = image(folder, "raw", double=True)
    daemon.open_volumes(keyed.path, DiskFormat.RAW, [OUTER], str(DISK))
    with pytest.raises(MonitorError, match="block_resize: "):
        daemon.grow([1 << 62], str(DISK))
    assert "read 512/512" in io(daemon, "read 0 512")
