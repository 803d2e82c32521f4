"""Survey of a guest's data at rest on the host, beside the disks' images, and the encryption of the data.

Encryption at host covers all of this data. libvirt encrypts a TPM's state; virt-sse encrypts the temporary
disk. A host cache holds ciphertext because the cache runs below the encryption in QEMU. Data that cannot be
encrypted is rejected if the domain's configuration causes it, and reported if the host or the guest's
firmware does.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.guest_data import DiskEncryption, GuestData
from virt_sse.libvirt.snapshots import SnapshotFiles
from virt_sse.system.host_memory import QemuSettings, plain_swaps

SAVED_MEMORY = "libvirt cannot encrypt a guest's saved memory"
"""Why the file of ``virsh save`` and ``virsh managedsave`` is in plaintext."""
_DUMPS = ("coredump-destroy", "coredump-restart")
_ENCRYPTED_BLOB = 1
"""swtpm ``swtpm_nvstore.c``: ``BLOB_FLAG_ENCRYPTED`` in the flags of a state file's header."""
_FLAGS = slice(4, 6)


class State(enum.Enum):
    """Encryption state of data at rest."""

    ENCRYPTED = "encrypted"
    ABSENT = "absent"
    PLAINTEXT = "plaintext"


@dataclass(frozen=True, slots=True)
class HostData:
    """One kind of a guest's data at rest on the host.

    :ivar name: the kind, e.g. ``tpm`` or ``disk vda``.
    :ivar place: the file or folder; ``None`` without a single file or folder.
    :ivar reason: why the data is in this state.
    :ivar hint: how to avoid plaintext. Encryption at host refuses a VM with plaintext data and a hint.
    :ivar is_tolerated: whether a VM with encryption at host starts nevertheless.
    :ivar is_of_encrypted_disk: whether the data is of an encrypted disk: worth a warning for every VM.
    """

    name: str
    place: str | None
    state: State
    reason: str
    hint: str | None = None
    is_tolerated: bool = False
    is_of_encrypted_disk: bool = False

    @property
    def is_avoidable(self) -> bool:
        """Whether the data is in plaintext, and the hint tells how to change that."""
        return self.state is State.PLAINTEXT and self.hint is not None

    @property
    def is_refused(self) -> bool:
        """Whether a VM with encryption at host does not start because of the data."""
        return self.is_avoidable and not self.is_tolerated


@dataclass(frozen=True, slots=True)
class LibvirtFiles:
    """Paths of libvirt's files with guests' data, as distributions build libvirt.

    :ivar root: the folder used in place of ``/``.
    """

    root: Path

    def managed_save(self, domain: str) -> Path:
        return self.root / "var/lib/libvirt/qemu/save" / f"{domain}.save"

    def tpm(self, vm_id: UUID) -> Path:
        return self.root / "var/lib/libvirt/swtpm" / str(vm_id)

    @property
    def qemu_conf(self) -> Path:
        return self.root / "etc/libvirt/qemu.conf"


def survey(definition: DomainDefinition, files: LibvirtFiles) -> list[HostData]:
    """List all data of a domain at rest on the host.

    :raise InvalidValueError: When the definition is invalid.
    :raise ConfigError: When the host's settings cannot be read.
    """
    settings = QemuSettings.read(files.qemu_conf)
    data = definition.guest_data
    return [
        *disk_data(data),
        tpm_state(definition, files),
        _nvram(data),
        _managed_save(definition.name, files),
        _crash_dumps(data),
        _core_dumps(data, settings),
        *_memory_files(data, settings),
        _swap(data),
        *_files_beside(data),
    ]


def disk_data(data: GuestData) -> Iterator[HostData]:
    """List the disks. Foreign disks are reported, not refused.

    Installation media hold no data of the guest, and the operator is responsible for disks encrypted by
    other means. An overlay without encryption over an encrypted disk is refused: the definition asks for it.

    :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
    """
    for disk in data.disks():
        name, place = f"disk {disk.target}" if disk.target is not None else "disk", disk.where
        is_encrypted = disk.encryption in (DiskEncryption.OURS, DiskEncryption.OTHER)
        if disk.is_transient and is_encrypted:
            yield HostData(
                name,
                place,
                State.PLAINTEXT,
                "for <transient/>, libvirt makes an overlay without encryption for the guest's writes",
                hint="remove <transient/> from the disk, with 'virsh edit DOMAIN'; "
                "'virt-sse snapshot restore' undoes the writes of a guest",
                is_of_encrypted_disk=True,
            )
        elif disk.encryption is DiskEncryption.OVERLAID:
            yield HostData(
                name,
                place,
                State.PLAINTEXT,
                "an overlay without encryption over a disk of virt-sse",
                hint="name the disk itself in the definition, with 'virsh edit DOMAIN'; "
                "'virsh blockcommit DOMAIN TARGET --active --pivot' merges the overlay of a running domain",
                is_of_encrypted_disk=True,
            )
        elif disk.encryption is DiskEncryption.OURS:
            yield HostData(name, place, State.ENCRYPTED, "by virt-sse, including the host cache")
        elif disk.encryption is DiskEncryption.OTHER:
            yield HostData(name, place, State.ENCRYPTED, "not by virt-sse")
        elif disk.is_read_only:
            yield HostData(name, place, State.ABSENT, "the disk is read-only")
        else:
            yield HostData(name, place, State.PLAINTEXT, "not a disk of virt-sse")


def tpm_state(definition: DomainDefinition, files: LibvirtFiles) -> HostData:
    """Describe the state of an emulated TPM.

    The state holds secrets sealed by the guest, e.g. the keys of in-guest encryption. swtpm encrypts the
    state if libvirt's ``<encryption>`` requests encryption at the TPM's first start; swtpm accepts no key for
    existing state in plaintext.
    """
    folder = files.tpm(definition.uuid)
    place = str(folder)
    if definition.has_tpm_state_elsewhere:
        return HostData(
            "tpm",
            None,
            State.PLAINTEXT,
            "<source> sets a custom location of the state, which virt-sse does not inspect",
            hint="remove <source> from the TPM's <backend>, with 'virsh edit'",
        )
    present = _tpm_files(folder)
    encrypted = all(_is_encrypted_tpm(path) for path in present)
    if not definition.has_emulated_tpm and not present:
        return HostData("tpm", None, State.ABSENT, "the VM has no emulated TPM")
    if present and not encrypted:
        return HostData(
            "tpm",
            place,
            State.PLAINTEXT,
            "the state was made without encryption, and cannot be encrypted later",
            hint=f"if the guest does not need the secrets in the TPM, move {folder} away: "
            "the VM then gets a new TPM, with encryption",
        )
    if definition.tpm_secret is None:
        if present:
            return HostData("tpm", place, State.ENCRYPTED, "but the definition does not request encryption")
        return HostData(
            "tpm",
            place,
            State.PLAINTEXT,
            "the definition does not request encryption",
            hint="'virt-sse vm update DOMAIN --encryption-at-host on' adds it to the definition",
        )
    by = "with our DEK" if definition.has_our_tpm_secret else "not by virt-sse"
    return HostData("tpm", place, State.ENCRYPTED, f"by swtpm, {by}")


def has_tpm_state(vm: UUID, files: LibvirtFiles) -> bool:
    """Whether state of the domain's TPM exists. Existing state needs the DEK used to encrypt the state."""
    return bool(_tpm_files(files.tpm(vm)))


def _tpm_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tpm*/*.permall"))


def _is_encrypted_tpm(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            flags = file.read(_FLAGS.stop)[_FLAGS]
    except OSError:
        return False
    return bool(int.from_bytes(flags, "big") & _ENCRYPTED_BLOB)


def _nvram(data: GuestData) -> HostData:
    """Describe the UEFI variables, which libvirt cannot encrypt.

    Reported, not refused: the variables hold the boot order and the public keys of Secure Boot, but no data
    from the guest's disks or memory.
    """
    if not data.has_uefi:
        return HostData("nvram", None, State.ABSENT, "the VM has no UEFI")
    return HostData("nvram", data.uefi_variables, State.PLAINTEXT, "libvirt cannot encrypt UEFI variables")


def _managed_save(name: str, files: LibvirtFiles) -> HostData:
    """Describe the file with the guest's memory written by ``virsh managedsave``.

    libvirt can neither encrypt nor forbid a saved state. The VM starts from the state, as after ``virsh
    save``: libvirt then removes the file. A refusal would leave the file, or cost the state.
    """
    path = files.managed_save(name)
    if not path.exists():
        return HostData("managed-save", None, State.ABSENT, "no saved state exists")
    return HostData(
        "managed-save",
        str(path),
        State.PLAINTEXT,
        SAVED_MEMORY,
        hint=f"'virsh start {name}' resumes the guest and removes the file; "
        f"'virt-sse vm save {name} FILE' then saves the state encrypted",
        is_tolerated=True,
    )


def saved_state(path: Path) -> HostData:
    """Describe the file of ``virt-sse vm save`` that continues a domain."""
    return HostData(
        "saved-state",
        str(path),
        State.ENCRYPTED,
        f"'virt-sse vm restore {path}' resumes the guest; another start makes the file useless",
    )


def _crash_dumps(data: GuestData) -> HostData:
    """Describe crash dumps of the guest.

    With ``<on_crash>coredump-…``, libvirt writes the guest's memory into a file when the guest's kernel
    panics.
    """
    action = data.on_crash
    if action not in _DUMPS:
        return HostData("crash-dump", None, State.ABSENT, f"on_crash is {action or 'destroy'}")
    return HostData(
        "crash-dump",
        None,
        State.PLAINTEXT,
        f"on_crash is {action}, and libvirt cannot encrypt the dump",
        hint="set <on_crash> to destroy or restart, with 'virsh edit'",
    )


def _core_dumps(data: GuestData, settings: QemuSettings) -> HostData:
    """Describe core dumps of QEMU. A dump excludes the guest's memory with ``dumpCore='off'``.

    Each dump contains the volume keys of disks. The host's ``max_core`` setting decides whether QEMU may dump
    core.
    """
    if data.dump_core == "off" or (data.dump_core is None and not settings.dump_guest_core):
        return HostData("core-dump", None, State.ABSENT, "QEMU's core dumps exclude the guest's memory")
    by = "dumpCore is on" if data.dump_core == "on" else "dump_guest_core is set in qemu.conf"
    return HostData(
        "core-dump",
        None,
        State.PLAINTEXT,
        f"{by}: a core dump of QEMU holds the guest's memory",
        hint="set <memory dumpCore='off'>, with 'virsh edit'",
    )


def _memory_files(data: GuestData, settings: QemuSettings) -> Iterator[HostData]:
    """List guest memory backed by files.

    The kernel may write memory in a file of a file system to disk. Huge pages and memfd have no file on disk.
    """
    if data.has_memory_in_file:
        yield HostData(
            "memory",
            settings.memory_directory,
            State.PLAINTEXT,
            "the guest's memory is in a file",
            hint="set <memoryBacking><source type='memfd'/>, with 'virsh edit'",
        )
    for device in data.persistent_memory():
        yield HostData(
            "memory",
            device.path,
            State.PLAINTEXT,
            f"the content of the {device.model} device is in an unencrypted file",
            hint=f"remove the {device.model} device, with 'virsh edit'",
        )


def _swap(data: GuestData) -> HostData:
    """Describe swapping of the guest's memory, which ``<locked/>`` prevents.

    Plaintext swap is reported, not refused. Encrypting swap is the host's task. Plaintext swap proves nothing
    about this VM: the host may swap only memory of other processes.
    """
    if data.has_locked_memory:
        return HostData("swap", None, State.ABSENT, "the guest's memory is locked")
    plain = plain_swaps()
    if plain:
        return HostData(
            "swap",
            " ".join(plain),
            State.PLAINTEXT,
            "the host swaps without encryption, and memoryBacking is not locked",
        )
    return HostData("swap", None, State.ABSENT, "the host has no swap in plaintext")


def _files_beside(data: GuestData) -> Iterator[HostData]:
    """List files with serial console output, and shared folders. The operator configures both on purpose."""
    for path in data.console_files():
        yield HostData("console", path, State.PLAINTEXT, "the console output is written to a file")
    for folder in data.shared_folders():
        yield HostData("filesystem", folder, State.PLAINTEXT, "the guest shares the folder with the host")


def memory_snapshot(snapshot: SnapshotFiles) -> HostData | None:
    """Describe the guest's memory in a snapshot; ``None`` for a snapshot without memory."""
    if not snapshot.memory:
        return None
    reason = "libvirt cannot encrypt the memory in a snapshot"
    return HostData("memory-snapshot", snapshot.memory, State.PLAINTEXT, reason)
