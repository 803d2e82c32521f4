"""Double encryption, proven from outside: QEMU's own tools peel one layer after the other off an image.

With either DEK alone the plaintext is not there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import images
from support.hosts import initialised_backend
from support.images import FORMATS, KeyedImage
from virt_sse.backend import Backend
from virt_sse.errors import ToolError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import formatting

pytestmark = pytest.mark.slow

M = 1 << 20
MARKER = b"the plaintext, which nobody is to read without both keys. "
CONTENT = (MARKER * (2 * M // len(MARKER) + 1))[: 2 * M]
LUKS, QCOW2 = b"LUKS\xba\xbe", b"QFI\xfb"


def add_double_set(backend: Backend) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    backend.sets.create(
        "double",
        provider="platform-managed",
        key="default",
        encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
    )


@pytest.fixture
def double(backend: Backend) -> Backend:
    add_double_set(backend)
    return backend


@contextlib.contextmanager
def descriptors_of(*passphrases: bytes) -> Iterator[tuple[list[str], list[int]]]:
    """Secret objects ``key0``, ``key1``, each from a pipe; no key on a command line."""
    with contextlib.ExitStack() as stack:
        arguments, opened = [], []
        for number, passphrase in enumerate(passphrases):
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            os.write(writing, passphrase)
            os.close(writing)
            opened.append(reading)
            arguments += ["--object", f"secret,id=key{number},file=/proc/self/fd/{reading}"]
        yield arguments, opened


def node(image_format: str, key: str, file: str) -> str:
    """QEMU's options of a LUKS volume in *image_format* that lies in the node *file*."""
    inner = ",".join(f"file.{option}" for option in file.split(","))
    if image_format == "raw":
        return f"driver=luks,key-secret={key},{inner}"
    return f"driver=qcow2,encrypt.format=luks,encrypt.key-secret={key},{inner}"


def peel(path: Path, image_format: str, target: Path, *passphrases: bytes) -> str:
    """Write what *path* is with those keys, the outermost first, to *target*; what qemu-img complains of."""
    options = f"driver=file,filename={path}"
    for number in range(len(passphrases)):
        options = node(image_format, f"key{number}", options)
    with descriptors_of(*passphrases) as (secrets, opened):
        done = subprocess.run(
            ["qemu-img", "convert", *secrets, "--image-opts", "-O", "raw", options, target],
            pass_fds=opened,
            capture_output=True,
            text=True,
            check=False,
        )
    return done.stderr


def passphrases(backend: Backend, disk: Disk) -> dict[str, bytes]:
    """Of each slot, from its key provider."""
    return {
        entry.slot: backend.host.plugins.key_provider(entry.wrapped.key.provider)
        .unwrap(entry.wrapped, context=disk.context(entry.slot))
        .passphrase
        for entry in disk.deks
    }


@dataclass(frozen=True)
class PeeledDisk:
    """A double disk with :data:`CONTENT`, its two keys, and its image without the outer layer.

    :ivar folder: for files that tests make; shared by all tests of this disk.
    :ivar inner: the image after decryption with the key of slot ``infrastructure``.
    """

    disk: Disk
    outer_cipher: str
    service: bytes
    infrastructure: bytes
    folder: Path
    inner: Path

    @property
    def image_format(self) -> str:
        return self.disk.format.value

    def peel(self, path: Path, target: str, *passphrases: bytes) -> str:
        """Decrypt *path* into the file *target* of the folder: the complaint of qemu-img, or nothing."""
        return peel(path, self.image_format, self.folder / target, *passphrases)


@pytest.fixture(
    scope="module",
    params=[("qcow2", None), ("raw", None), ("qcow2", "serpent-256-xts"), ("raw", "twofish-256-xts")],
    ids=lambda each: "-".join(filter(None, each)),
)
def peeled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PeeledDisk:
    image_format, cipher = request.param
    folder = tmp_path_factory.mktemp("peeled")
    plain = folder / "plain"
    plain.write_bytes(CONTENT)
    with initialised_backend(folder / "root") as backend:
        add_double_set(backend)
        try:
            disk = backend.transfer.import_image(
                NewDisk(
                    name="disk",
                    format=DiskFormat(image_format),
                    encryption_set="double",
                    infrastructure_cipher=Cipher.parse(cipher) if cipher else None,
                ),
                plain,
                source_format="raw",
            )
        except ToolError as exc:
            pytest.skip(f"QEMU does not have it: {exc}")
        keys = passphrases(backend, disk)
    service, infrastructure = keys.pop("service"), keys.pop("infrastructure")
    assert keys == {}
    inner = folder / "inner"
    assert peel(disk.path, image_format, inner, infrastructure) == ""
    return PeeledDisk(disk, cipher or "aes-256-cbc", service, infrastructure, folder, inner)


def cipher_of(image: Path) -> str:
    """The cipher of the LUKS header that qemu-img finds without a key."""
    data = images.info(image)["format-specific"]["data"]
    data = data.get("encrypt", data)
    return f"{data['cipher-alg']}-{data['cipher-mode']}"


def test_the_file_shows_the_outer_layer_alone(peeled: PeeledDisk) -> None:
    assert peeled.service != peeled.infrastructure
    assert not images.contains([peeled.disk.path], MARKER)
    assert peeled.disk.path.read_bytes().count(LUKS) == 1
    assert cipher_of(peeled.disk.path) == peeled.outer_cipher


def test_without_the_outer_key_nothing_opens(peeled: PeeledDisk) -> None:
    service, infrastructure = peeled.service, peeled.infrastructure
    for wrong in ((service,), (service, infrastructure), (infrastructure, infrastructure)):
        assert "Invalid password" in peeled.peel(peeled.disk.path, "wrong", *wrong)
        wrongly = peeled.folder / "wrong"
        assert not wrongly.exists() or not images.contains([wrongly], MARKER)


def test_the_outer_key_alone_gives_another_luks_volume(peeled: PeeledDisk) -> None:
    within = peeled.inner.read_bytes()
    assert MARKER not in within
    assert within.count(LUKS) == 1
    assert within.startswith(LUKS if peeled.image_format == "raw" else QCOW2)
    assert cipher_of(peeled.inner) == "aes-256-xts"
    if peeled.image_format == "raw":
        assert len(within) == formatting.header_length(peeled.disk.deks[0].cipher) + len(CONTENT)
    assert "Invalid password" in peeled.peel(peeled.inner, "nothing", peeled.infrastructure)
    assert not KeyedImage(peeled.inner, peeled.image_format, peeled.infrastructure).opens()


def test_both_keys_give_the_plaintext_at_once_or_one_after_the_other(peeled: PeeledDisk) -> None:
    assert peeled.peel(peeled.inner, "twice", peeled.service) == ""
    assert (peeled.folder / "twice").read_bytes() == CONTENT
    assert peeled.peel(peeled.disk.path, "both", peeled.infrastructure, peeled.service) == ""
    assert (peeled.folder / "both").read_bytes() == CONTENT


@pytest.mark.parametrize("image_format", FORMATS)
def test_both_layers_have_keys_of_their_own(double: Backend, image_format: str) -> None:
    """Nothing is the same in two disks, nor in the two layers of one."""
    disks = [
        double.disks.create(
            NewDisk(name=name, size=M, format=DiskFormat(image_format), encryption_set="double")
        )
        for name in ("one", "two")
    ]
    keys = [key for disk in disks for key in passphrases(double, disk).values()]
    assert len(set(keys)) == 4
    one, two = (disk.deks for disk in disks)
    assert [entry.slot for entry in one] == ["service", "infrastructure"]
    assert len({entry.wrapped.ciphertext for entry in (*one, *two)}) == 4
