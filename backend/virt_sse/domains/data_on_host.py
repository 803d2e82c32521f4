"""What of a guest lies on its host at rest, beside its disks' images, and in what state.

Encryption at host is a promise about all of it. libvirt encrypts a TPM's state, and we the temporary disk
and, by where it stands, the host cache. What nobody can encrypt is refused where a configuration would make
it, and told where the host or the guest's firmware does.
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

_DUMPS = ("coredump-destroy", "coredump-restart")
_ENCRYPTED_BLOB = 1
"""swtpm ``swtpm_nvstore.c``: ``BLOB_FLAG_ENCRYPTED`` in the flags of a state file's header."""
_FLAGS = slice(4, 6)


class State(enum.Enum):
    """How it lies there."""

    ENCRYPTED = "encrypted"
    ABSENT = "absent"
    PLAINTEXT = "plaintext"


@dataclass(frozen=True, slots=True)
class AtRest:
    """One thing of a guest on its host.

    :ivar where: the file or folder; ``None`` where there is no single one.
    :ivar reason: why it is in that state.
    :ivar hint: how it would not be there; with it, encryption at host refuses the VM until it is so.
    """

    what: str
    where: str | None
    state: State
    reason: str
    hint: str | None = None

    @property
    def is_refused(self) -> bool:
        return self.state is State.PLAINTEXT and self.hint is not None


@dataclass(frozen=True, slots=True)
class LibvirtFiles:
    """Where libvirt, built as distributions build it, keeps what is at rest.

    :ivar root: the folder that stands for ``/``.
    """

    root: Path

    def managed_save(self, domain: str) -> Path:
        return self.root / "var/lib/libvirt/qemu/save" / f"{domain}.save"

    def tpm(self, vm_id: UUID) -> Path:
        return self.root / "var/lib/libvirt/swtpm" / str(vm_id)

    @property
    def qemu_conf(self) -> Path:
        return self.root / "etc/libvirt/qemu.conf"


def survey(definition: DomainDefinition, files: LibvirtFiles) -> list[AtRest]:
    """All data of a domain at rest on the host.

    :raise InvalidValueError: When the definition is invalid.
    :raise ConfigError: When the host's settings cannot be read.
    """
    settings = QemuSettings.read(files.qemu_conf)
    data = definition.guest_data
    return [
        *_disks(data),
        tpm_state(definition, files),
        _nvram(data),
        _managed_save(definition.name, files),
        _crash_dumps(data),
        _core_dumps(data, settings),
        *_memory_files(data, settings),
        _swap(data),
        *_files_beside(data),
    ]


def _disks(data: GuestData) -> Iterator[AtRest]:
    """Disks that are not ours are told, and not refused: installation media have nothing of the guest on
    them, and a disk that its operator encrypts in some other way is his.
    """
    for disk in data.disks():
        name, where = f"disk {disk.target}" if disk.target is not None else "disk", disk.where
        if disk.encryption is DiskEncryption.OURS:
            yield AtRest(name, where, State.ENCRYPTED, "by virt-sse, and so is what the host caches of it")
        elif disk.encryption is DiskEncryption.OTHER:
            yield AtRest(name, where, State.ENCRYPTED, "not by virt-sse")
        elif disk.is_read_only:
            yield AtRest(name, where, State.ABSENT, "the guest writes nothing to it")
        else:
            yield AtRest(name, where, State.PLAINTEXT, "not a disk of virt-sse")


def tpm_state(definition: DomainDefinition, files: LibvirtFiles) -> AtRest:
    """An emulated TPM holds what the guest has sealed, e.g. the keys to its own disks. swtpm encrypts its
    state when libvirt's ``<encryption>`` asks for it, from the TPM's first start on: it does not take a key
    for state that is in plaintext.
    """
    folder = files.tpm(definition.uuid)
    where = str(folder)
    if definition.has_tpm_state_elsewhere:
        return AtRest(
            "tpm",
            None,
            State.PLAINTEXT,
            "its state is at a place of its own, where nobody looks how it lies",
            hint="take <source> out of the TPM's <backend>, with 'virsh edit'",
        )
    present = _tpm_files(folder)
    encrypted = all(_is_encrypted_tpm(path) for path in present)
    if not definition.has_emulated_tpm and not present:
        return AtRest("tpm", None, State.ABSENT, "the VM has no emulated TPM")
    if present and not encrypted:
        return AtRest(
            "tpm",
            where,
            State.PLAINTEXT,
            "its state was made without encryption, which cannot be added to it",
            hint=f"if the guest can do without what its TPM holds, move {folder} away: "
            "the VM then gets a new TPM, with encryption",
        )
    if definition.tpm_secret is None:
        if present:
            return AtRest("tpm", where, State.ENCRYPTED, "but the definition does not say so")
        return AtRest(
            "tpm",
            where,
            State.PLAINTEXT,
            "the definition asks for no encryption",
            hint="'virt-sse vm update DOMAIN --encryption-at-host on' adds it to the definition",
        )
    by = "with our DEK" if definition.has_our_tpm_secret else "not by virt-sse"
    return AtRest("tpm", where, State.ENCRYPTED, f"by swtpm, {by}")


def has_tpm_state(vm: UUID, files: LibvirtFiles) -> bool:
    """Whether there is a TPM's state of that domain, which needs the DEK that it was encrypted with."""
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


def _nvram(data: GuestData) -> AtRest:
    """UEFI's variables. libvirt has no encryption for them. They hold the boot order and the public keys of
    Secure Boot, nothing that was on the guest's disks or in its memory: told, and not refused.
    """
    if not data.has_uefi:
        return AtRest("nvram", None, State.ABSENT, "the VM has no UEFI")
    return AtRest("nvram", data.uefi_variables, State.PLAINTEXT, "libvirt cannot encrypt UEFI variables")


def _managed_save(name: str, files: LibvirtFiles) -> AtRest:
    """``virsh managedsave`` writes the guest's memory into a file. libvirt has no encryption for it, and no
    way to forbid it: what is there is refused, and must not be started from.
    """
    path = files.managed_save(name)
    if not path.exists():
        return AtRest("managed-save", None, State.ABSENT, "there is no saved state")
    return AtRest(
        "managed-save",
        str(path),
        State.PLAINTEXT,
        "libvirt cannot encrypt a guest's saved memory",
        hint=f"'virsh managedsave-remove {name}' discards it, as pulling the plug would have",
    )


def _crash_dumps(data: GuestData) -> AtRest:
    """``<on_crash>coredump-…`` makes libvirt write the guest's memory into a file when the guest's kernel
    panics.
    """
    action = data.on_crash
    if action not in _DUMPS:
        return AtRest("crash-dump", None, State.ABSENT, f"on_crash is {action or 'destroy'}")
    return AtRest(
        "crash-dump",
        None,
        State.PLAINTEXT,
        f"on_crash is {action}, and libvirt cannot encrypt what it dumps",
        hint="set <on_crash> to destroy or restart, with 'virsh edit'",
    )


def _core_dumps(data: GuestData, settings: QemuSettings) -> AtRest:
    """A core dump of QEMU holds the guest's memory, if libvirt lets it. With ``dumpCore='off'`` it does not.

    It does hold the volume keys of disks. Whether QEMU may dump core is the host's to say (``max_core``).
    """
    if data.dump_core == "off" or (data.dump_core is None and not settings.dump_guest_core):
        return AtRest("core-dump", None, State.ABSENT, "QEMU's core dumps are without the guest's memory")
    by = "dumpCore is on" if data.dump_core == "on" else "dump_guest_core is set in qemu.conf"
    return AtRest(
        "core-dump",
        None,
        State.PLAINTEXT,
        f"{by}: a core dump of QEMU holds the guest's memory",
        hint="set <memory dumpCore='off'>, with 'virsh edit'",
    )


def _memory_files(data: GuestData, settings: QemuSettings) -> Iterator[AtRest]:
    """Memory in a file of a file system is on a disk as the kernel sees fit. Huge pages and memfd are not."""
    if data.has_memory_in_file:
        yield AtRest(
            "memory",
            settings.memory_directory,
            State.PLAINTEXT,
            "the guest's memory is in a file",
            hint="set <memoryBacking><source type='memfd'/>, with 'virsh edit'",
        )
    for device in data.persistent_memory():
        yield AtRest(
            "memory",
            device.path,
            State.PLAINTEXT,
            f"the content of its {device.model} device is in a file that nobody encrypts",
            hint=f"take the {device.model} device out, with 'virsh edit'",
        )


def _swap(data: GuestData) -> AtRest:
    """What the kernel swaps out of a guest's memory is the host's to encrypt; with ``<locked/>`` there is
    none. Told, and not refused: it says nothing of this VM, and a host may swap only what is not a guest.
    """
    if data.has_locked_memory:
        return AtRest("swap", None, State.ABSENT, "the guest's memory is locked")
    plain = plain_swaps()
    if plain:
        return AtRest(
            "swap",
            " ".join(plain),
            State.PLAINTEXT,
            "the host swaps without encryption, and memoryBacking is not locked",
        )
    return AtRest("swap", None, State.ABSENT, "the host does not swap to where it would lie in plaintext")


def _files_beside(data: GuestData) -> Iterator[AtRest]:
    """What the guest says on a serial port, and folders of the host that it uses: an operator wants it so."""
    for path in data.console_files():
        yield AtRest("console", path, State.PLAINTEXT, "what the guest says there is in a file")
    for folder in data.shared_folders():
        yield AtRest("filesystem", folder, State.PLAINTEXT, "the guest shares it with the host")


def memory_snapshot(snapshot: SnapshotFiles) -> AtRest | None:
    """The guest's memory in a snapshot; ``None`` for a snapshot of disks alone."""
    if not snapshot.memory:
        return None
    reason = "libvirt cannot encrypt the memory in a snapshot"
    return AtRest("memory-snapshot", snapshot.memory, State.PLAINTEXT, reason)
