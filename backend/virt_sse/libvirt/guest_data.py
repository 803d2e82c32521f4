"""Settings of a domain that place guest data on the host outside disk images (libvirt formatdomain)."""

from __future__ import annotations

import enum
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from virt_sse.libvirt.disk_element import disks_named, encryption_secrets, target_of

_PERSISTENT_MEMORY = ("nvdimm", "virtio-pmem")


class DiskEncryption(enum.Enum):
    """Encryption of a disk, as far as the definition tells."""

    OURS = enum.auto()
    OTHER = enum.auto()
    NONE = enum.auto()
    OVERLAID = enum.auto()
    """A disk of ours below an image without encryption, which gets the guest's writes."""


@dataclass(frozen=True, slots=True)
class DataDisk:
    """A disk or drive of a domain.

    :ivar target: the name in the guest; ``None`` without a ``<target>``.
    :ivar where: file, device or name of the source.
    :ivar is_read_only: whether the guest cannot write to the disk.
    :ivar is_transient: whether libvirt puts an unencrypted overlay over the disk at each start.
    """

    target: str | None
    where: str | None
    encryption: DiskEncryption
    is_read_only: bool
    is_transient: bool = False


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """A memory device with content in a file.

    :ivar model: libvirt's name, e.g. ``nvdimm``.
    """

    model: str
    path: str


class GuestData:
    """Reads these settings from a domain definition.

    :param domain: the ``<domain>`` element.
    """

    def __init__(self, domain: ET.Element) -> None:
        self._domain = domain

    def disks(self) -> list[DataDisk]:
        """All disks and drives.

        :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
        """
        return [_disk(disk) for disk in self._domain.iterfind("./devices/disk")]

    @property
    def has_uefi(self) -> bool:
        """Whether the domain has UEFI firmware, and with the firmware a file of variables."""
        return (
            self._domain.find("./os/nvram") is not None
            or self._domain.find("./os[@firmware='efi']") is not None
            or self._domain.find("./os/loader[@type='pflash']") is not None
        )

    @property
    def uefi_variables(self) -> str | None:
        """The file of UEFI variables; ``None`` if the definition names none."""
        nvram = self._domain.find("./os/nvram")
        if nvram is None:
            return None
        source = nvram.find("source")
        return source.get("file") if source is not None else (nvram.text or "").strip() or None

    @property
    def on_crash(self) -> str:
        """libvirt's action when the guest's kernel panics; empty for the default."""
        return self._domain.findtext("on_crash", "")

    @property
    def dump_core(self) -> str | None:
        """Whether core dumps of QEMU contain guest memory: ``on`` or ``off``; ``None`` for the default."""
        memory = self._domain.find("memory")
        return memory.get("dumpCore") if memory is not None else None

    @property
    def has_memory_in_file(self) -> bool:
        """Whether the guest's memory is backed by a file of a file system."""
        return self._domain.find("./memoryBacking/source[@type='file']") is not None

    @property
    def has_locked_memory(self) -> bool:
        """Whether the host cannot swap out the guest's memory."""
        return self._domain.find("./memoryBacking/locked") is not None

    def persistent_memory(self) -> list[MemoryDevice]:
        """Memory devices whose content stays in a file."""
        found = []
        for module in self._domain.iterfind("./devices/memory"):
            path, model = module.findtext("source/path"), module.get("model", "")
            if path and model in _PERSISTENT_MEMORY:
                found.append(MemoryDevice(model, path))
        return found

    def console_files(self) -> list[str]:
        """Files with output of the guest's serial ports and consoles, without duplicates."""
        consoles = [
            source.get("path") for source in self._domain.iterfind("./devices/*[@type='file']/source")
        ]
        logs = [log.get("file") for log in self._domain.iterfind("./devices/*/log")]
        return list(dict.fromkeys(path for path in consoles + logs if path))

    def shared_folders(self) -> list[str | None]:
        """Folders of the host that the guest uses; ``None`` for a file system without a folder."""
        return [source.get("dir") for source in self._domain.iterfind("./devices/filesystem/source")]


def _disk(disk: ET.Element) -> DataDisk:
    source = disk.find("source")
    where = source.get("file") or source.get("dev") or source.get("name") if source is not None else None
    if disks_named(disk):
        encryption = DiskEncryption.OURS
    elif encryption_secrets(disk):
        encryption = DiskEncryption.OTHER
    else:
        below = any(disks_named(image) for image in disk.iter("backingStore"))
        encryption = DiskEncryption.OVERLAID if below else DiskEncryption.NONE
    read_only = disk.find("readonly") is not None or disk.get("device") == "cdrom"
    target = target_of(disk) if disk.find("target") is not None else None
    return DataDisk(target, where, encryption, read_only, disk.find("transient") is not None)
