"""iothreads of domains: QEMU threads that each serve the disks given to them (libvirt formatdomain).

A disk without an iothread is served by QEMU's main thread, as are the encryption of a raw image and the
requests to an NBD server. Only virtio disks have an iothread of their own.
"""

from __future__ import annotations

import enum
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

from virt_sse.errors import InvalidValueError

_LARGEST = 2**32 - 1


class IothreadChoice(enum.Enum):
    """``NEW``: an iothread for the disk alone. ``AUTO``: see :func:`choose`."""

    NEW = "new"
    AUTO = "auto"


def parse_choice(text: str) -> int | IothreadChoice:
    """Read the number of an iothread, ``new`` or ``auto``.

    :raise InvalidValueError: When *text* is anything else.
    """
    if text in [each.value for each in IothreadChoice]:
        return IothreadChoice(text)
    return parse_number(text)


def parse_number(text: str) -> int:
    """Read the number of an iothread.

    :raise InvalidValueError: When *text* is no number from 1.
    """
    if text.isascii() and text.isdigit() and 1 <= int(text[:20]) <= _LARGEST:
        return int(text)
    raise InvalidValueError(f"invalid iothread {text[:20]!r}", hint="a number from 1")


def iothreads(domain: ET.Element) -> dict[int, int]:
    """The numbers of disks by iothread, of the ``<domain>`` element *domain*."""
    found = [parse_number(each.get("id", "")) for each in domain.iterfind("./iothreadids/iothread")]
    count = domain.findtext("iothreads", "").strip()
    number = 1
    while count and len(found) < parse_number(count):  # libvirt gives the others the lowest free numbers
        if number not in found:
            found.append(number)
        number += 1
    drivers = domain.findall("./devices/disk/driver[@iothread]")
    used = [driver.get("iothread") for driver in drivers]
    return {each: used.count(str(each)) for each in sorted(found)}


def choose(wanted: int | IothreadChoice, present: Sequence[Mapping[int, int]]) -> tuple[int, bool]:
    """Choose the iothread of a new disk.

    ``AUTO`` is an iothread without a disk; else a new iothread, while the host has more processors than the
    domain has iothreads; else the iothread with the fewest disks.

    :param present: numbers of disks by iothread, for each definition of the domain that gets the disk.
    :return: the iothread, and whether it has to be added.
    :raise InvalidValueError: When the iothread *wanted* is missing in a definition.
    """
    common = {
        number: max(each[number] for each in present)
        for number in present[0]
        if all(number in each for each in present)
    }
    if isinstance(wanted, int):
        if wanted not in common:
            known = ", ".join(map(str, common)) or "none"
            raise InvalidValueError(
                f"the domain has no iothread {wanted}", hint=f"'new' adds an iothread; present: {known}"
            )
        return wanted, False
    if wanted is IothreadChoice.AUTO and common:
        idlest = min(common, key=lambda number: common[number])
        if common[idlest] == 0 or len(common) >= (os.cpu_count() or 1):
            return idlest, False
    taken = set().union(*present)
    return next(number for number in range(1, len(taken) + 2) if number not in taken), True
