"""What each page shows, derived from the document."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from uuid import UUID

from virt_sse.page.alerts import Alert, alerts
from virt_sse.page.document import DiskPart, DomainPart, EffectPart, Overview, SetPart, UsePart

T = TypeVar("T")

PAGE_SIZE = 50
_ID_LENGTH = 16
_RUNNING = ("running", "paused")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a long list.

    :ivar number: from 1 on.
    """

    items: Sequence[T]
    number: int
    pages: int
    total: int

    @classmethod
    def of(cls, items: Sequence[T], wanted: str | None) -> Page[T]:
        """The page *wanted*, a number as text; the nearest existing page for any other text."""
        pages = max(1, -(-len(items) // PAGE_SIZE))
        digits = wanted if wanted and wanted.isascii() and wanted.isdecimal() and len(wanted) < 8 else "1"
        number = min(max(1, int(digits)), pages)
        return Page(items[(number - 1) * PAGE_SIZE : number * PAGE_SIZE], number, pages, len(items))


@dataclass(slots=True)
class VersionView:
    """A version of a key.

    :ivar deks: number of DEKs under this version.
    :ivar state: ``None`` unless in use by a running domain.
    """

    version: str
    deks: int = 0
    state: str | None = None
    last: UsePart | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """What happens to a domain if a key is disabled.

    :ivar action: the agent's action; ``None`` for a domain that does not run.
    """

    domain: DomainPart
    action: str | None
    grace_seconds: int
    disks: Sequence[DiskPart]


@dataclass(slots=True)
class KeyView:
    """A key, all its versions together.

    :ivar id: in addresses.
    """

    id: str
    key: str
    versions: dict[str, VersionView] = field(default_factory=dict)
    disks: list[DiskPart] = field(default_factory=list)
    sets: list[SetPart] = field(default_factory=list)

    @property
    def provider(self) -> str:
        """Name of the key provider."""
        return self.key.partition(":")[0]

    @property
    def name(self) -> str:
        """The key's name with its provider."""
        return self.key.partition(":")[2]

    @property
    def last(self) -> UsePart | None:
        """The newest use of any version."""
        uses = [version.last for version in self.versions.values() if version.last]
        return max(uses, key=lambda use: use.seq, default=None)

    @property
    def state(self) -> str | None:
        """The state of the versions in use by running domains, if the same; ``None`` if none is."""
        states = {version.state for version in self.versions.values() if version.state}
        return states.pop() if len(states) == 1 else ", ".join(sorted(states)) or None

    @property
    def current(self) -> list[VersionView]:
        """The versions with DEKs under them."""
        return [each for each in self.versions.values() if each.deks]


@dataclass(frozen=True, slots=True)
class DiskUse:
    """A domain with a disk, under a name in the guest."""

    domain: DomainPart
    target: str


class Index:
    """The document, with its parts related to each other."""

    def __init__(self, overview: Overview) -> None:
        self.overview = overview
        self.host = overview.host
        self.alerts: list[Alert] = alerts(overview)
        self.disks = {disk.id: disk for disk in overview.disks}
        self.disks_by_text = {str(disk.id): disk for disk in overview.disks}
        self.domains = {domain.id: domain for domain in overview.domains}
        self.watched = {each.name: each for each in overview.watched}
        self.uses: dict[UUID, list[DiskUse]] = defaultdict(list)
        for domain in overview.domains:
            for use in domain.disks:
                if use.disk_id:
                    self.uses[use.disk_id].append(DiskUse(domain, use.target))
        self._effects: dict[tuple[str, UUID], EffectPart] = {
            (each.key, each.domain_id): each for each in overview.effects
        }
        self.keys = self._keys()
        self.key_ids = {view.key: view.id for view in self.keys.values()}

    def stops(self, key: KeyView) -> list[Stop]:
        """What stops if *key* is disabled: running domains first."""
        disks: dict[UUID, list[DiskPart]] = defaultdict(list)
        for disk in key.disks:
            for use in self.uses.get(disk.id, ()):
                disks[use.domain.id].append(disk)
        found = []
        for domain_id, of_domain in disks.items():
            domain = self.domains[domain_id]
            effect = self._effects.get((key.key, domain_id)) if domain.state in _RUNNING else None
            action, grace = (effect.action, effect.grace_seconds) if effect else (None, 0)
            found.append(Stop(domain, action, grace, of_domain))
        return sorted(found, key=lambda stop: (stop.action is None, stop.domain.name))

    def disks_shown(self, show: str | None) -> list[DiskPart]:
        """The disks of a list: ``copies``, ``unfinished``, ``deleted``, or all other disks."""
        disks = self.overview.disks
        if show == "copies":
            return [disk for disk in disks if disk.kind != "disk"]
        if show == "unfinished":
            return [disk for disk in disks if disk.state not in ("ready", "deleted")]
        return [
            disk for disk in disks if disk.kind == "disk" and (disk.state == "deleted") == (show == "deleted")
        ]

    def uses_of(self, disk: DiskPart) -> list[UsePart]:
        """The newest uses of keys for a disk, newest first."""
        return [use for use in reversed(self.overview.uses) if use.disk == str(disk.id)]

    def counts(self) -> dict[str, int]:
        """The numbers of the first page."""
        domains = self.overview.domains
        return {
            "running": sum(domain.state in _RUNNING for domain in domains),
            "domains": len(domains),
            "disks": len(self.disks_shown(None)),
            "copies": sum(disk.kind != "disk" for disk in self.overview.disks),
            "keys": len(self.keys),
            "alerts": len(self.alerts),
        }

    def _keys(self) -> dict[str, KeyView]:
        views: dict[str, KeyView] = {}

        def view(key: str) -> KeyView:
            if key not in views:
                views[key] = KeyView(hashlib.sha256(key.encode()).hexdigest()[:_ID_LENGTH], key)
            return views[key]

        for disk in self.overview.disks:
            for layer in disk.layers:
                if layer.key is not None:
                    found, version = view(layer.key), layer.version or ""
                    found.versions.setdefault(version, VersionView(version)).deks += 1
                    if not found.disks or found.disks[-1] is not disk:
                        found.disks.append(disk)
        for each in self.overview.sets:
            view(each.key).sets.append(each)
        for state in self.overview.key_states:
            versions = view(state.key).versions
            versions.setdefault(state.version, VersionView(state.version)).state = state.state
        for use in self.overview.last_uses:
            if use.key in views and use.version:
                versions = views[use.key].versions
                versions.setdefault(use.version, VersionView(use.version)).last = use
        return {each.id: each for each in sorted(views.values(), key=lambda each: each.key)}


def middle(text: object, longest: int) -> str:
    """*text*, shortened in the middle to at most *longest* characters."""
    shown = str(text)
    if len(shown) <= longest:
        return shown
    end = (longest - 1) // 2
    return f"{shown[: longest - 1 - end]}…{shown[-end:]}"


def key_name(key: str) -> str:
    """A key in tables: a key vault's URL without provider and scheme; any other key as it is."""
    name = key.partition(":")[2]
    return name.removeprefix("https://") if name.startswith("https://") else key


def size(number: int) -> str:
    """A number of bytes, with a binary unit."""
    value: float = number
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def moment(value: Any) -> str:
    """A time, in UTC to the second."""
    text = value if isinstance(value, str) else value.isoformat()
    return str(text)[:19].replace("T", " ")
