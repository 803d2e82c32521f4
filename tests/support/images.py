"""Looks at images from outside, with QEMU's and cryptsetup's own tools and none of our code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from virt_sse.backend import Backend
from virt_sse.model.disks import Disk

FORMATS = ("qcow2", "raw")


def require(*tools: str) -> None:
    """Skip the test unless all *tools* are installed."""
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")


def rewrite_luks_pointer(path: Path, offset: int, length: int) -> None:
    """Let the header of a qcow2 image name another place and length of the LUKS header."""
    start = path.read_bytes()[:65536]
    place = start.index(bytes.fromhex("0537be77 00000010")) + 8
    with path.open("r+b") as file:
        file.seek(place)
        file.write(offset.to_bytes(8, "big") + length.to_bytes(8, "big"))


def passphrase(backend: Backend, disk: Disk) -> bytes:
    """The passphrase of the disk, unwrapped as by the libvirt hook."""
    (entry,) = disk.deks
    provider = backend.host.plugins.key_provider(entry.wrapped.key.provider)
    return provider.unwrap(entry.wrapped, context=disk.context(entry.slot)).passphrase


class KeyedImage:
    """An encrypted image and its passphrase."""

    def __init__(self, path: Path, image_format: str, passphrase: bytes) -> None:
        self.path = path
        self.passphrase = passphrase
        node = "driver=luks," if image_format == "raw" else "driver=qcow2,encrypt.format=luks,encrypt."
        self.options = f"{node}key-secret=key,file.driver=file,file.filename={path}"
        self.secret = f"secret,id=key,data={passphrase.decode()}"

    @classmethod
    def of(cls, backend: Backend, disk: Disk) -> KeyedImage:
        return cls(disk.path, disk.format.value, passphrase(backend, disk))

    def io(self, *commands: str) -> subprocess.CompletedProcess[str]:
        """Run qemu-io commands on the image."""
        arguments = [part for command in commands for part in ("-c", command)]
        return subprocess.run(
            ["qemu-io", "--object", self.secret, *arguments, "--image-opts", self.options],
            capture_output=True,
            text=True,
        )

    def write(self, offset: int, length: int, pattern: int) -> None:
        done = self.io(f"write -P {pattern:#x} {offset} {length}")
        assert done.returncode == 0, done.stderr

    def has(self, offset: int, length: int, pattern: int) -> bool:
        done = self.io(f"read -P {pattern:#x} {offset} {length}")
        return done.returncode == 0 and "failed" not in done.stdout

    def opens(self) -> bool:
        return self.io("read 0 512").returncode == 0

    def size(self) -> int:
        """The virtual size, found with the key."""
        done = subprocess.run(
            ["qemu-img", "info", "--output=json", "--object", self.secret, "--image-opts", self.options],
            capture_output=True,
            check=True,
        )
        return int(json.loads(done.stdout)["virtual-size"])

    def equals(self, other: Path, other_format: str = "raw") -> bool:
        """Whether the decrypted content equals the plaintext image *other*."""
        plain = f"driver={other_format},file.driver=file,file.filename={other}"
        done = subprocess.run(
            ["qemu-img", "compare", "--object", self.secret, "--image-opts", self.options, plain],
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 0

    @contextmanager
    def held(self, *, read_only: bool = False) -> Iterator[None]:
        """While a QEMU process has the image open."""
        arguments = ["qemu-io", *(["-r"] if read_only else []), "--object", self.secret]
        with _process([*arguments, "--image-opts", self.options]) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"length\n")
            process.stdin.flush()
            assert process.stdout.readline()
            yield

    @contextmanager
    def served(self) -> Iterator[Qmp]:
        """Run a qemu-storage-daemon with the image open for writing as node ``disk``."""
        require("qemu-storage-daemon")
        with (
            TemporaryDirectory() as folder,
            _process(
                [
                    "qemu-storage-daemon",
                    "--object",
                    self.secret,
                    "--blockdev",
                    f"node-name=disk,{self.options}",
                ]
                + ["--nbd-server", f"addr.type=unix,addr.path={folder}/nbd"]
                + ["--export", "type=nbd,id=export,node-name=disk,writable=on"]
                + ["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]
            ) as process,
        ):
            yield Qmp(process)


@contextmanager
def _process(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


class Qmp:
    """The monitor of a daemon of QEMU's, on its standard input and output."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert "QMP" in self._read()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        request = json.dumps({"execute": command, "arguments": arguments})
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        while "return" not in (answer := self._read()):
            assert "error" not in answer, answer
        return answer["return"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def info(path: Path) -> dict[str, Any]:
    """The report of ``qemu-img info`` without a key."""
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", path], capture_output=True, check=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def make_plain(path: Path, image_format: str, content: bytes) -> Path:
    """A plaintext image with *content*, whole sectors."""
    raw = path.with_name(f"{path.name}.content")
    raw.write_bytes(content)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", image_format]
    subprocess.run([*convert, raw, path], check=True)
    return path


def luks_volume(disk: Disk, folder: Path) -> Path:
    """The disk's LUKS header and keyslots as a file of its own, as cryptsetup wants them."""
    if disk.format.value == "raw":
        return disk.path
    header = disk.path.read_bytes()
    offset = header.index(b"LUKS\xba\xbe")
    volume = folder / "luks"
    volume.write_bytes(header[offset:] + bytes(1 << 20))
    return volume


def cryptsetup(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    require("cryptsetup")
    return subprocess.run(["cryptsetup", *arguments], input=stdin, capture_output=True)


def files_below(folder: Path) -> list[str]:
    """All files below *folder*, by their relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def contains(paths: Sequence[Path], *needles: bytes) -> list[Path]:
    """Which of the files hold any of *needles*."""
    return [path for path in paths if any(needle in path.read_bytes() for needle in needles)]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def opened_by_openssl(image: Path, passphrase: bytes, first: int, count: int) -> bytes:
    """Sectors of a raw LUKS volume, decrypted by cryptsetup's volume key and OpenSSL as dm-crypt would.

    The tweak of a sector is its number (plain64).
    """
    with TemporaryDirectory() as folder:
        key = Path(folder, "key")
        subprocess.run(
            ["cryptsetup", "luksDump", "--batch-mode", "--key-file", "-", "--dump-volume-key"]
            + ["--volume-key-file", key, image],
            input=passphrase,
            capture_output=True,
            check=True,
        )
        volume_key = key.read_bytes()
    with image.open("rb") as file:
        header = file.read(592)
        file.seek((int.from_bytes(header[104:108], "big") + first) * 512)
        ciphertext = file.read(count * 512)
    content = []
    for number in range(count):
        mode = modes.XTS((first + number).to_bytes(16, "little"))
        decryptor = Cipher(algorithms.AES(volume_key), mode).decryptor()
        content.append(decryptor.update(ciphertext[number * 512 : (number + 1) * 512]))
    return b"".join(content)
