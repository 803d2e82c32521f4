"""Import and export: content on its way into disks and out of disks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.stored_images import usable
from virt_sse.errors import DiskExistsError, ImageError, ImageFormatError, OtherFileError
from virt_sse.in_guest.images import in_unencrypted_image
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.host import Host
from virt_sse.model.content import Content
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.keys import Dek
from virt_sse.model.operations import ExportDisk
from virt_sse.qemu import conversion, image_file, img
from virt_sse.system.files import canonical, complete_file
from virt_sse.system.progress import Progress, silent


class Transfer:
    """Encrypts imported content, and decrypts exported content, without a plaintext file."""

    def __init__(self, host: Host, disks: Disks) -> None:
        self._store = host.store
        self._host = host
        self._plugins = host.plugins
        self._keys = host.keys
        self._freshness = host.freshness
        self._disks = disks

    def import_image(
        self,
        new: NewDisk,
        source: Path,
        *,
        source_format: str | None = None,
        with_backing: bool = False,
        progress: Progress = silent,
    ) -> Disk:
        """Create a disk with the content of the image *source*, encrypted in transit.

        :param new: the disk; its size is the source's.
        :param source_format: QEMU's name of the source's format; probed unless given.
        :param with_backing: read the backing files, data file and extents named by the source. Refused by
            default, because an image can name any file of this host.
        :raise ImageFormatError: When the source is itself encrypted, or refers to other files.
        :raise DiskInUseError: When a QEMU process writes to the source.
        :raise VirtSseError: As in :meth:`Disks.create`.
        """
        source = canonical(source)
        with contextlib.ExitStack() as stack:
            descriptor = stack.enter_context(image_file.held(source))
            files = stack.enter_context(img.with_other_files(source, source_format)) if with_backing else None
            try:
                information = img.info(source, source_format, descriptor=descriptor, others=files or ())
            except OtherFileError as exc:
                raise _refers_to(source, exc.name) from exc
            if information.encrypted:
                raise ImageFormatError(
                    f"{source} is itself encrypted", hint="'disk adopt' takes over a disk of virt-sse"
                )
            if information.other_files and not with_backing:
                raise _refers_to(source, information.other_files[0])

            def fill(partial: Path, deks: Sequence[Dek]) -> None:
                conversion.encrypt_from(
                    source,
                    information.format,
                    partial,
                    new.format,
                    deks,
                    progress,
                    descriptor=descriptor,
                    others=files,
                )

            return self._disks.create(
                dataclasses.replace(new, size=information.virtual_size),
                fill=fill,
                content=Content(
                    lambda: in_unencrypted_image(
                        source, information.format, descriptor=descriptor, others=files
                    )
                ),
            )

    def export(
        self, name: str, destination: Path, *, destination_format: str = "qcow2", progress: Progress = silent
    ) -> None:
        """Write a disk's content, in plaintext, to the new image *destination*, 0600.

        The image gets its name once complete, so a killed command leaves no plaintext behind. Without
        ``O_TMPFILE``, e.g. on NFS, a killed command leaves a hidden file, which the next export to
        *destination* removes.

        :raise DiskExistsError: When *destination* exists.
        :raise DiskInUseError: When a QEMU process has the disk open.
        :raise ImageError: When *destination* cannot be written.
        """
        destination = canonical(destination)
        disk = self._store.get(name)
        if os.path.lexists(destination):
            raise DiskExistsError(f"{destination} exists already")
        with usable(self._host, disk) as current:
            self._plugins.validate(ExportDisk(current, destination))
            deks, base = self._keys.unwrap_all(current), unlocked_base(self._host, current)
            try:
                with complete_file(destination) as descriptor:
                    conversion.decrypt_to(
                        current.path,
                        current.format,
                        descriptor,
                        destination_format,
                        deks,
                        progress,
                        base=base,
                    )
            except FileExistsError as exc:
                raise DiskExistsError(f"{destination} exists already") from exc
            except OSError as exc:
                raise ImageError(f"cannot write {destination}: {exc.strerror}") from exc
            except ImageFormatError:
                raise
            except ImageError as exc:
                raise ImageError(f"cannot write {destination}: {exc}") from exc


def _refers_to(source: Path, other: str) -> ImageFormatError:
    return ImageFormatError(
        f"{source} refers to another file, {other}", hint="pass --with-backing to read the other file, too"
    )
