"""The definition of a libvirt domain, parsed once and handed on (libvirt formatdomain)."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from functools import cached_property
from html import unescape
from typing import Self
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt import disk_chains, disk_element, iothreads, qemu_environment
from virt_sse.libvirt.disk_chains import BackupJob, DiskChain
from virt_sse.libvirt.disk_element import DomainDisk, drop_malformed_names
from virt_sse.libvirt.disk_places import DiskPlace, disk_place
from virt_sse.libvirt.guest_data import GuestData
from virt_sse.libvirt.migration_token import read_token
from virt_sse.libvirt.qemu_environment import LoadedCode
from virt_sse.libvirt.secret_name import PREFIX, SecretName
from virt_sse.libvirt.users import User
from virt_sse.libvirt.vm_metadata import Stated, read_metadata
from virt_sse.libvirt.xml import parse_with_prefixes
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import temp_disk_id


class DomainDefinition:
    """An immutable domain definition.

    :meth:`parse` rejects documents that are not domain XML. The properties read their part of the definition
    on first use and raise :class:`InvalidValueError` if this part is invalid. A domain with, for example,
    invalid metadata can therefore still be listed. :class:`~virt_sse.libvirt.domain_edit.DomainEdit` makes
    changed copies.

    :ivar unreadable: what :meth:`salvage` left out.
    """

    def __init__(
        self, xml: str, root: ET.Element, prefixes: Mapping[str, str], unreadable: tuple[str, ...] = ()
    ) -> None:
        self._xml = xml
        self._root = root
        self._prefixes = prefixes
        self.unreadable = unreadable

    @classmethod
    def parse(cls, xml: str) -> Self:
        """Parse domain XML.

        :raise InvalidValueError: When *xml* is malformed, has a DTD, exceeds a limit, or is another document.
        """
        root, prefixes = parse_with_prefixes(xml, kind="domain XML")
        if root.tag != "domain":
            raise InvalidValueError(f"invalid domain XML: a <{root.tag[:40]}> element instead of <domain>")
        return cls(xml, root, prefixes)

    @classmethod
    def salvage(cls, xml: str) -> Self:
        """Read as much of domain XML as can be read; raises no error.

        For work that must not fail open: the watch of a running domain's keys, and the end of a domain.
        Malformed references to disks of ours are left out. Of a text that is not domain XML, or exceeds a
        limit, only the name, the UUID and the names of disks are found.
        """
        problems = []
        try:
            root, prefixes = parse_with_prefixes(xml, kind="domain XML")
            if root.tag != "domain":
                raise InvalidValueError("invalid domain XML: another element instead of <domain>")
        except (InvalidValueError, RecursionError) as exc:
            problems.append(str(exc))
            root, prefixes = _rebuilt(xml), {}
        problems += drop_malformed_names(root)
        backend = emulated_tpm(root)
        encryption = backend.find("encryption") if backend is not None else None
        if backend is not None and encryption is not None:
            try:
                UUID(encryption.get("secret", ""))
            except ValueError:
                backend.remove(encryption)
                problems.append("the secret of the TPM")
        return cls(xml, root, prefixes, tuple(problems))

    def __repr__(self) -> str:
        return f"DomainDefinition(name={self.name!r})"  # the XML may hold passwords

    def to_xml(self) -> str:
        """The definition as text; of a parsed definition, the very text that was parsed."""
        return self._xml

    def copy_tree(self) -> tuple[ET.Element, Mapping[str, str]]:
        """A copy of the element tree, and the namespace URIs by prefix."""
        return copy.deepcopy(self._root), self._prefixes

    @property
    def name(self) -> str:
        """The domain's name; empty if the definition has none."""
        return self._root.findtext("name", "")

    @cached_property
    def uuid(self) -> UUID:
        """The domain's UUID.

        :raise InvalidValueError: When the definition has no valid UUID.
        """
        text = self._root.findtext("uuid", "")
        try:
            return UUID(text)
        except ValueError as exc:
            raise InvalidValueError(f"invalid domain XML: no valid UUID, but {text[:40]!r}") from exc

    @property
    def mentions_us(self) -> bool:
        """Whether the text has our prefix, as with secrets of ours or VM metadata. Raises no error."""
        return PREFIX in self._xml

    @cached_property
    def our_disks(self) -> tuple[DomainDisk, ...]:
        """All uses of our disks, including backing files and mirrors, without temporary disks.

        :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
        """
        return tuple(use for use in self._uses if use.slot != TEMP_SLOT)

    @cached_property
    def temp_disks(self) -> tuple[DomainDisk, ...]:
        """All uses of temporary disks. Valid definitions have at most one, of the domain itself.

        :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
        """
        return tuple(use for use in self._uses if use.slot == TEMP_SLOT)

    @cached_property
    def _uses(self) -> tuple[DomainDisk, ...]:
        disks = self._root.iterfind("./devices/disk")
        return tuple(use for disk in disks for use in disk_element.uses_of(disk))

    @cached_property
    def vm_secrets(self) -> tuple[SecretName, ...]:
        """Names of the secrets of the VM itself: of its temporary disk and its TPM.

        A temporary disk or TPM secret of another VM, as in a copied definition, is not included.

        :raise InvalidValueError: When the definition has no valid UUID, or names a malformed secret.
        """
        found = []
        own = temp_disk_id(self.uuid)
        if any(use.disk_id == own for use in self.temp_disks):
            found.append(SecretName(own, TEMP_SLOT))
        if self.has_our_tpm_secret:
            found.append(SecretName(self.uuid, TPM_SLOT))
        return tuple(found)

    @property
    def secrets(self) -> frozenset[SecretName]:
        """Names of all secrets of ours that the domain needs.

        :raise InvalidValueError: As for :attr:`our_disks` and :attr:`vm_secrets`.
        """
        of_disks = (use.secret for use in self.our_disks if use.secret)
        return frozenset((*of_disks, *self.vm_secrets))

    def disk_places(self) -> list[DiskPlace]:
        """Locations of the data of all disks, ours or not; without drives and temporary disks.

        :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
        """
        places = [disk_place(disk) for disk in self._root.iterfind("./devices/disk")]
        return [place for place in places if place is not None]

    def disk_chains(self, backup: BackupJob | None = None) -> list[DiskChain]:
        """Image chains of all disks with a medium, including CD drives.

        :param backup: a running backup of the domain.
        :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
        """
        return disk_chains.disk_chains(self._root, backup)

    def has_connected_channel(self, name: str) -> bool:
        """Whether a program in the guest has opened the channel of this name, e.g. the guest agent's."""
        targets = self._root.iterfind("./devices/channel/target[@state='connected']")
        return any(target.get("name") == name for target in targets)

    def free_target(self, bus: DiskBus = DiskBus.VIRTIO) -> str:
        """The first name of a bus, e.g. from ``vda`` to ``vdz``, without a disk.

        :raise InvalidValueError: When all names are in use.
        """
        return disk_element.free_target(self._root, bus)

    def iothreads(self) -> Mapping[int, int]:
        """The numbers of disks by iothread.

        :raise InvalidValueError: When a number is malformed.
        """
        return iothreads.iothreads(self._root)

    @property
    def qemu_user(self) -> User | None:
        """User and group of the QEMU process, once libvirt has begun to start the domain (``<seclabel>``).

        :raise ConfigError: When the label is malformed.
        """
        for label in self._root.iterfind("./seclabel[@model='dac']/label"):
            return User.parse(label.text or "")
        return None

    @cached_property
    def loaded_code(self) -> tuple[LoadedCode, ...]:
        """The libraries that variables of the definition make QEMU load."""
        return qemu_environment.loaded_code(qemu_environment.variables(self._root))

    @cached_property
    def stated(self) -> Stated | None:
        """The properties of the VM in the metadata; ``None`` without metadata of ours.

        :raise InvalidValueError: When the metadata is invalid.
        """
        return read_metadata(self._root)

    @property
    def has_encryption_at_host(self) -> bool:
        """Whether the metadata says that the VM has encryption at host.

        :raise InvalidValueError: When the metadata is invalid.
        """
        return self.stated is not None and self.stated.properties.encryption_at_host

    @property
    def migration_token(self) -> UUID | None:
        """The token of the domain's last migration (:mod:`~virt_sse.libvirt.migration_token`), if any."""
        return read_token(self._root)

    @property
    def has_emulated_tpm(self) -> bool:
        """Whether the domain has an emulated TPM."""
        return emulated_tpm(self._root) is not None

    @property
    def has_tpm_state_elsewhere(self) -> bool:
        """Whether the definition names a location of its own for the state of the emulated TPM."""
        backend = emulated_tpm(self._root)
        return backend is not None and backend.find("source") is not None

    @property
    def tpm_secret(self) -> UUID | None:
        """UUID of the libvirt secret, ours or not, that encrypts the state of the emulated TPM.

        :raise InvalidValueError: When the UUID is malformed.
        """
        backend = emulated_tpm(self._root)
        encryption = backend.find("encryption") if backend is not None else None
        try:
            return UUID(encryption.get("secret", "")) if encryption is not None else None
        except ValueError as exc:
            raise InvalidValueError(f"the domain's TPM names an unknown secret: {exc}") from exc

    @property
    def has_our_tpm_secret(self) -> bool:
        """Whether a DEK of ours encrypts the state of the emulated TPM.

        :raise InvalidValueError: When the definition has no valid UUID, or the secret's UUID is malformed.
        """
        secret = self.tpm_secret
        return secret is not None and secret == SecretName(self.uuid, TPM_SLOT).uuid

    @property
    def guest_data(self) -> GuestData:
        """Settings that decide which guest data lies on the host outside disk images."""
        return GuestData(self._root)


def _rebuilt(xml: str) -> ET.Element:
    """A ``<domain>`` with the name, the UUID and the disks of ours in *xml*, found without a parser."""
    root = ET.Element("domain")
    for tag in ("name", "uuid"):
        if match := re.search(rf"<{tag}>([^<]{{1,255}})</{tag}>", xml):
            ET.SubElement(root, tag).text = unescape(match[1])
    devices = ET.SubElement(root, "devices")
    for match in re.finditer(rf"\busage=(['\"])({re.escape(PREFIX)}[^'\"<]{{0,200}})\1", xml):
        encryption = ET.SubElement(ET.SubElement(devices, "disk"), "encryption")
        ET.SubElement(encryption, "secret", usage=unescape(match[2]))
    for match in re.finditer(rf"\bname=(['\"])({re.escape(PREFIX)}[^'\"<]{{0,200}})\1", xml):
        ET.SubElement(ET.SubElement(devices, "disk"), "source", protocol="nbd", name=unescape(match[2]))
    return root


def emulated_tpm(domain: ET.Element) -> ET.Element | None:
    """The ``<backend>`` of the emulated TPM in the ``<domain>`` element *domain*."""
    return domain.find("./devices/tpm/backend[@type='emulator']")
