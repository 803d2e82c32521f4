"""Content on its way into disks and out of them: import and export."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from virt_sse.disks.lifecycle import Provisioning
from virt_sse.errors import DiskExistsError, ImageError, ImageFormatError
from virt_sse.in_guest.images import in_unencrypted_image
from virt_sse.model.ciphers import Cipher
from virt_sse.model.content import Content
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import Dek
from virt_sse.model.operations import ExportDisk
from virt_sse.plugins import PluginHost
from virt_sse.qemu import img
from virt_sse.system.files import canonical, publish, unnamed_file
from virt_sse.system.progress import Progress


class Transfer:
    """Encrypts what comes in, decrypts what goes out; in neither direction by way of a plaintext file."""

    def __init__(self, plugins: PluginHost, provisioning: Provisioning) -> None:
        self._plugins = plugins
        self._provisioning = provisioning

    def import_image(
        self,
        name: str,
        source: Path,
        path: Path,
        *,
        source_format: str | None,
        with_backing: bool,
        image_format: DiskFormat,
        sku: DiskSku,
        encryption_set: EncryptionSet | None,
        infrastructure_cipher: Cipher | None,
        progress: Progress,
    ) -> Disk:
        """Make a disk with the content of the image *source*, which is encrypted on its way.

        :param source_format: QEMU's name of its format; probed unless given.
        :param with_backing: follow the source to its backing files, data file and extents. Refused unless
            said, because an image can name any file of this host there.
        :raise ImageFormatError: When the source is itself encrypted, or draws on other files.
        :raise DiskInUseError: When a QEMU process is writing to the source.
        :raise VirtSseError: As in :meth:`create`.
        """
        source = canonical(source)
        _check_source(source)
        information = img.info(source, source_format)
        if information.encrypted:
            raise ImageFormatError(
                f"{source} is itself encrypted", hint="a disk of virt-sse is taken over with 'disk adopt'"
            )
        if information.other_files and not with_backing:
            raise ImageFormatError(
                f"{source} draws on another file, {information.other_files[0]}",
                hint="if that is meant to be read, say --with-backing",
            )

        def fill(partial: Path, deks: Sequence[Dek]) -> None:
            img.encrypt_from(source, information.format, partial, image_format, deks, progress)

        return self._provisioning.create(
            name,
            information.virtual_size,
            path,
            image_format=image_format,
            sku=sku,
            encryption_set=encryption_set,
            infrastructure_cipher=infrastructure_cipher,
            fill=fill,
            content=Content(lambda: in_unencrypted_image(source, information.format)),
        )

    def export(self, disk: Disk, destination: Path, *, destination_format: str, progress: Progress) -> None:
        """Write the disk's content, in plaintext, into the new image *destination*, 0600.

        It has no name until it is whole, so that a killed command leaves no plaintext behind.

        :raise DiskExistsError: When *destination* exists.
        :raise DiskInUseError: When a QEMU process has the disk open.
        :raise ImageError: When it cannot be written.
        """
        destination = canonical(destination)
        if os.path.lexists(destination):
            raise DiskExistsError(f"{destination} exists already")
        with self._provisioning.usable(disk) as current:
            self._plugins.validate(ExportDisk(current, destination))
            deks = self._provisioning.unlock(current)
            try:
                with unnamed_file(destination.parent) as descriptor:
                    img.decrypt_to(
                        current.path, current.format, descriptor, destination_format, deks, progress
                    )
                    os.fsync(descriptor)
                    publish(Path(f"/proc/self/fd/{descriptor}"), destination)
            except FileExistsError as exc:
                raise DiskExistsError(f"{destination} exists already") from exc
            except OSError as exc:
                raise ImageError(f"cannot write {destination}: {exc.strerror}") from exc
            except ImageFormatError:
                raise
            except ImageError as exc:
                raise ImageError(f"cannot write {destination}: {exc}") from exc


def _check_source(source: Path) -> None:
    """Refuse what qemu-img would wait for, or never come to an end of.

    :raise ImageError: When *source* is missing, or neither a file nor a block device.
    """
    try:
        mode = source.stat().st_mode
    except OSError as exc:
        raise ImageError(f"cannot read {source}: {exc.strerror}") from exc
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ImageError(f"{source} is neither a file nor a block device")
