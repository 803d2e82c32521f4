"""As whom QEMU runs (libvirt formatcaps, formatdomain: the DAC security model)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Self

from virt_sse.errors import ConfigError

_LABEL = re.compile(r"\+?(\d+):\+?(\d+)")


@dataclass(frozen=True, slots=True)
class User:
    """By number, as files and processes are owned."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, label: str) -> Self:
        """Read a label such as ``+64055:+108``.

        :raise ConfigError: When it is none.
        """
        match = _LABEL.fullmatch(label)
        if not match:
            raise ConfigError(f"libvirt runs QEMU as {label[:40]!r}, which is no user and group by number")
        return cls(int(match[1]), int(match[2]))


ROOT = User(0, 0)


def default_qemu_user(capabilities: str) -> User:
    """Whom QEMU runs as unless a domain says otherwise, from libvirt's *capabilities*.

    :raise ConfigError: When they do not say.
    """
    root = ET.fromstring(capabilities)  # noqa: S314 -- from libvirtd, which is trusted
    for model in root.iterfind("./host/secmodel"):
        if model.findtext("model") == "dac":
            for label in model.iterfind("baselabel"):
                return User.parse(label.text or "")
    raise ConfigError("libvirt does not say as whom it runs QEMU: its DAC security model is off")
