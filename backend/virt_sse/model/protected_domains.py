"""Domains whose definitions the store keeps, so that another host can take over after their host has died."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from uuid import UUID


class Evacuation(enum.Enum):
    """What another host has to do with a protected domain.

    :cvar NOTHING: the domain's host is a member.
    :cvar DEFINE: the domain's host was fenced; the domain did not run there.
    :cvar START: the domain's host was fenced; the domain ran there.
    """

    NOTHING = "nothing"
    DEFINE = "define"
    START = "start"


@dataclass(frozen=True, slots=True)
class ProtectedDomain:
    """A domain in the store.

    :ivar host_id: the host that has the domain.
    :ivar definition: the persistent definition, without passwords.
    :ivar seal: HMAC-SHA256 of definition and autostart; see :mod:`virt_sse.domains.protection`.
    """

    id: UUID
    name: str
    host_id: UUID
    definition: str = field(repr=False)
    is_autostarted: bool
    seal: bytes = field(repr=False)
    evacuation: Evacuation = Evacuation.NOTHING
