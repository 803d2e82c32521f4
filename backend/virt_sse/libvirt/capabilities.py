"""libvirt's description of its host (libvirt formatcaps)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Self
from uuid import UUID

import libvirt

from virt_sse.errors import ConfigError, LibvirtError
from virt_sse.libvirt.users import User
from virt_sse.libvirt.xml import parse_xml


class HostCapabilities:
    """The capabilities of a libvirt host."""

    def __init__(self, root: ET.Element) -> None:
        self._root = root

    @classmethod
    def parse(cls, xml: str) -> Self:
        """Read capabilities XML.

        :raise InvalidValueError: When *xml* is malformed.
        """
        return cls(parse_xml(xml, kind="capabilities XML"))

    @classmethod
    def of(cls, connection: libvirt.virConnect) -> Self:
        """Ask libvirt for the capabilities.

        :raise libvirt.libvirtError: When libvirt fails.
        """
        return cls.parse(connection.getCapabilities())

    @property
    def host_id(self) -> UUID:
        """The host's UUID, unique among hosts and stable across restarts.

        :raise LibvirtError: When the host has no UUID.
        """
        text = self._root.findtext("./host/uuid", "")
        try:
            return UUID(text)
        except ValueError as exc:
            raise LibvirtError(f"libvirt's host has no valid UUID, but {text[:40]!r}") from exc

    @property
    def qemu_user(self) -> User:
        """User and group of QEMU processes, unless a domain definition names others (DAC security model).

        :raise ConfigError: When the capabilities name no user.
        """
        for model in self._root.iterfind("./host/secmodel"):
            if model.findtext("model") == "dac":
                for label in model.iterfind("baselabel"):
                    return User.parse(label.text or "")
        raise ConfigError("libvirt reports no user of QEMU processes: its DAC security model is off")
