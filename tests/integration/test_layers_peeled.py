"""Double encryption, proven from outside: QEMU's own tools peel one layer after the other off an image.

With either DEK alone the plaintext is not there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.images import FORMATS, KeyedImage
from virt_sse.backend import Backend
from virt_sse.errors import ToolError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import formatting

M = 1 << 20
MARKER = b"the plaintext, which nobody is to read without both keys. "
CONTENT = (MARKER * (2 * M // len(MARKER) + 1))[: 2 * M]
LUKS, QCOW2 = b"LUKS\xba\xbe", b"QFI\xfb"


@pytest.fixture
def double(backend: Backend) -> Backend:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    backend.sets.create(
        "double",
        provider="platform-managed",
        key="default",
        encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
    )
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
        entry.slot: backend.plugins.key_provider(entry.wrapped.key.provider)
        .unwrap(entry.wrapped, context=disk.context(entry.slot))
        .passphrase
        for entry in disk.deks
    }


@pytest.mark.parametrize(
    ("image_format", "cipher"),
    [
        ("qcow2", None),
        ("raw", None),
        ("qcow2", "serpent-256-xts"),
        ("raw", "twofish-256-xts"),
    ],
)
def test_either_key_alone_is_not_enough(
    double: Backend, root: Path, image_format: str, cipher: str | None
) -> None:
    plain = root / "plain"
    plain.write_bytes(CONTENT)
    try:
        disk = double.import_disk(
            "disk",
            plain,
            source_format="raw",
            image_format=DiskFormat(image_format),
            encryption_set="double",
            infrastructure_cipher=Cipher.parse(cipher) if cipher else None,
        )
    except ToolError as exc:
        pytest.skip(f"QEMU does not have it: {exc}")
    keys = passphrases(double, disk)
    service, infrastructure = keys.pop("service"), keys.pop("infrastructure")
    assert keys == {}
    assert service != infrastructure
    assert not images.contains([disk.path], MARKER)

    # What the file says of itself: one LUKS volume, of the outer layer's cipher.
    content = disk.path.read_bytes()
    assert content.count(LUKS) == 1
    outer = images.info(disk.path)["format-specific"]["data"]
    outer = outer.get("encrypt", outer)
    assert f"{outer['cipher-alg']}-{outer['cipher-mode']}" == (cipher or "aes-256-cbc")

    # The inner key opens nothing of it, nor do both the wrong way round.
    peeled = root / "peeled"
    for wrong in ((service,), (service, infrastructure), (infrastructure, infrastructure)):
        assert "Invalid password" in peel(disk.path, image_format, peeled, *wrong)
        assert not peeled.exists() or not images.contains([peeled], MARKER)

    # The outer key alone: another LUKS volume, of the other cipher, and ciphertext.
    assert peel(disk.path, image_format, peeled, infrastructure) == ""
    within = peeled.read_bytes()
    assert MARKER not in within
    assert within.count(LUKS) == 1
    assert within.startswith(LUKS if image_format == "raw" else QCOW2)
    inner = images.info(peeled)["format-specific"]["data"]
    inner = inner.get("encrypt", inner)
    assert f"{inner['cipher-alg']}-{inner['cipher-mode']}" == "aes-256-xts"
    if image_format == "raw":
        assert len(within) == formatting.header_length(disk.deks[0].cipher) + len(CONTENT)
    assert "Invalid password" in peel(peeled, image_format, root / "nothing", infrastructure)
    assert not KeyedImage(peeled, image_format, infrastructure).opens()

    # Then the inner key, on what the outer one has left: the plaintext.
    assert peel(peeled, image_format, root / "twice", service) == ""
    assert (root / "twice").read_bytes() == CONTENT
    # And both at once, on the file.
    assert peel(disk.path, image_format, root / "both", infrastructure, service) == ""
    assert (root / "both").read_bytes() == CONTENT


@pytest.mark.parametrize("image_format", FORMATS)
def test_both_layers_have_keys_of_their_own(double: Backend, image_format: str) -> None:
    """Nothing is the same in two disks, nor in the two layers of one."""
    disks = [
        double.create_disk(name, M, image_format=DiskFormat(image_format), encryption_set="double")
        for name in ("one", "two")
    ]
    keys = [key for disk in disks for key in passphrases(double, disk).values()]
    assert len(set(keys)) == 4
    one, two = (disk.deks for disk in disks)
    assert [entry.slot for entry in one] == ["service", "infrastructure"]
    assert len({entry.wrapped.ciphertext for entry in (*one, *two)}) == 4
