"""The manifest beside the image of a restore point: what the image is, its checksum, and an authentication.

The checksum covers the image except bytes 592 to 4095 of the LUKS header, where the envelope and its seals
are: a key rotation rewrites these. The authentication is under a key derived from the DEK: only who can
unwrap the DEK can write a valid manifest.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from virt_sse.errors import ImageError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.model.seal import derived
from virt_sse.qemu import image_file
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import write_new

_PURPOSE = b"virt-sse backup manifest v1"
_ENVELOPE_AREA = (592, 4096)
_AT_ONCE = 4 << 20
_MOST_BYTES = 64 << 10

_Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, msgspec.Meta(ge=0)]


class BackupManifest(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename="kebab",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """A manifest; the order of the fields is their order in the file.

    Version 2 is that of an incremental restore point: with the fields about the restore point below.

    :ivar restore_point, disk: UUIDs of the restore point and of its source.
    :ivar size: bytes that a guest sees.
    :ivar image_bytes: length of the image file.
    :ivar sha256: checksum of the image.
    :ivar mac: HMAC-SHA256 of the manifest without this field.
    :ivar base: UUID of the restore point below.
    :ivar base_image: name of its image, in the same folder.
    :ivar base_sha256: checksum of its image.
    """

    version: Literal[1, 2]
    restore_point: str
    disk: str
    name: str
    created: str
    size: _Size
    image: str
    image_format: DiskFormat
    image_bytes: _Size
    sha256: _Hex
    mac: _Hex
    base: str | None = None
    base_image: str | None = None
    base_sha256: _Hex | None = None

    def authentication(self, dek: Dek) -> str:
        """The value of :attr:`mac` under the DEK of the first layer, in hexadecimal."""
        content = msgspec.json.encode(msgspec.structs.replace(self, mac=""))
        return hmac.digest(derived(dek.material, _PURPOSE), content, "sha256").hex()


def remove(disk: Disk) -> None:
    """Remove the manifest of a restore point, if any; does nothing for any other kind.

    :raise ImageError: When the manifest cannot be removed.
    """
    path = beside(disk.path)
    if disk.kind is not DiskKind.RESTORE_POINT or not os.path.lexists(path):
        return
    try:
        is_own = _read(path).restore_point == str(disk.id)
    except ImageError:
        return  # of another restore point, or damaged: worthless without the image
    if is_own:
        try:
            path.unlink()
        except OSError as exc:
            raise ImageError(f"cannot remove {path}: {exc.strerror}") from exc


def beside(image: Path) -> Path:
    """The path of the manifest beside the image of a restore point."""
    return image.with_name(f"{image.name}.json")


def chain(image: Path) -> list[Path]:
    """The images of a restore point and of those below, by their manifests; nothing is authenticated.

    :raise ImageError: When a manifest or an image is missing, a manifest is invalid, or the chain is a loop.
    """
    found: list[Path] = []
    while True:
        if image in found:
            raise ImageError(f"the restore points below {found[0]} form a loop, at {image}")
        found.append(image)
        manifest = _read(beside(image))
        if manifest.base is None:
            return found
        name = manifest.base_image or ""
        if os.sep in name or name in ("", ".", ".."):
            raise ImageError(f"the manifest {beside(image)} names an invalid file, {name[:80]!r}")
        if not os.path.lexists(image.with_name(name)):
            raise ImageError(f"{image.with_name(name)}, which {image.name} is based on, is missing")
        image = image.with_name(name)


def write(disk: Disk, image: Path, dek: Dek, *, base: BackupManifest | None = None) -> None:
    """Write the manifest of a restore point, mode 0600.

    :param image: the complete image, which need not have its name yet.
    :param base: of the restore point below.
    :raise FileExistsError: When the manifest exists.
    :raise ImageError: When the image cannot be read.
    :raise OSError: When the manifest cannot be written.
    """
    with image_file.opened(image) as descriptor:
        made = BackupManifest(
            version=2 if base else 1,
            restore_point=str(disk.id),
            disk=str(disk.source_id),
            name=disk.name,
            created=disk.created.isoformat(),
            size=disk.size,
            image=disk.path.name,
            image_format=disk.format,
            image_bytes=os.fstat(descriptor).st_size,
            sha256=_checksum(descriptor, disk.format),
            mac="",
            base=base.restore_point if base else None,
            base_image=base.image if base else None,
            base_sha256=base.sha256 if base else None,
        )
    made = msgspec.structs.replace(made, mac=made.authentication(dek))
    write_new(beside(disk.path), msgspec.json.format(msgspec.json.encode(made)) + b"\n")


def read(disk: Disk, dek: Dek) -> BackupManifest:
    """Read the manifest of a restore point, and authenticate it.

    :param dek: the DEK of the first layer.
    :raise ImageError: When the manifest is missing or invalid, or that of another restore point.
    """
    path = beside(disk.path)
    found = _read(path)
    if not hmac.compare_digest(found.mac, found.authentication(dek)):
        raise ImageError(f"the manifest {path} was not written by a host with the key of {disk.name!r}")
    if (found.restore_point, found.image_format) != (str(disk.id), disk.format):
        raise ImageError(f"the manifest {path} is that of another restore point than {disk.name!r}")
    if found.base != (str(disk.base_id) if disk.base_id else None):
        raise ImageError(
            f"the manifest {path} and the envelope of the image name different restore points below"
        )
    return found


def verify(disk: Disk, dek: Dek, *, above: BackupManifest | None = None) -> BackupManifest:
    """Check the image of a restore point against its manifest, and against the manifest *above* based on it.

    :param dek: the DEK of the first layer.
    :raise ImageError: When a manifest is missing or invalid, or the image differs.
    """
    found = read(disk, dek)
    if above and (above.base, above.base_sha256) != (found.restore_point, found.sha256):
        raise ImageError(f"{disk.path} is not the image that restore point {above.name!r} is based on")
    with image_file.opened(disk.path) as descriptor:
        length = os.fstat(descriptor).st_size
        if length != found.image_bytes:
            raise ImageError(
                f"{disk.path} has {length} bytes, and not {found.image_bytes} as in its manifest"
            )
        if _checksum(descriptor, disk.format) != found.sha256:
            raise ImageError(f"{disk.path} is damaged: its checksum differs from the manifest's")
    return found


def _read(path: Path) -> BackupManifest:
    """Read a manifest; not authenticated.

    :raise ImageError: When the manifest is missing or invalid.
    """
    try:
        with image_file.opened(path) as descriptor:
            return from_json(os.pread(descriptor, _MOST_BYTES, 0), BackupManifest)
    except DocumentError as exc:
        raise ImageError(f"the manifest {path} is invalid: {exc}") from exc


def _checksum(descriptor: int, image_format: DiskFormat) -> str:
    """SHA-256 of the open image, with zeros in place of the envelope and its seals, in hexadecimal."""
    luks_offset, _ = image_file.luks_area(descriptor, image_format)
    begin, end = (luks_offset + offset for offset in _ENVELOPE_AREA)
    digest = hashlib.sha256()
    position = 0
    while content := bytearray(os.pread(descriptor, _AT_ONCE, position)):
        first, last = max(begin - position, 0), min(end - position, len(content))
        if first < last:
            content[first:last] = bytes(last - first)
        digest.update(content)
        position += len(content)
    return digest.hexdigest()
