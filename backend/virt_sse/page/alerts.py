"""Alerts: findings that need an administrator's attention."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from virt_sse.page.document import DomainDiskPart, DomainPart, Overview

_STALE_POLLS = 10
_STALE_SECONDS = 60.0
_UNUSABLE = ("disabled", "deleted", "denied")


class Level(enum.Enum):
    """Urgency of an alert; the most urgent first."""

    CRITICAL = "critical"
    WARNING = "warning"
    NOTICE = "notice"


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert.

    :ivar subject: the domain, key or part of the host.
    :ivar remedy: a command, or advice.
    """

    level: Level
    title: str
    subject: str
    text: str
    remedy: str | None = None


def alerts(overview: Overview) -> list[Alert]:
    """All alerts, the most urgent first."""
    found = [*_of_host(overview), *_of_domains(overview), *_of_keys(overview), *_unprotected(overview)]
    found += [
        Alert(Level.WARNING, "Set-up fault", each.part, each.problem, each.remedy) for each in overview.faults
    ]
    order = list(Level)
    return sorted(found, key=lambda each: order.index(each.level))


def _of_host(overview: Overview) -> Iterator[Alert]:
    host = overview.host
    if not host.libvirt_connected:
        text = "libvirt does not answer: domains are not watched"
        yield Alert(Level.CRITICAL, "libvirt lost", host.libvirt, text)
    elif host.last_look:
        age = overview.time - datetime.fromisoformat(host.last_look)
        if age > timedelta(seconds=max(_STALE_SECONDS, _STALE_POLLS * host.poll_seconds)):
            text = f"the agent last saw the domains {int(age.total_seconds())} s ago"
            yield Alert(Level.CRITICAL, "Watch stalled", host.name, text)


def _of_domains(overview: Overview) -> Iterator[Alert]:
    for domain in overview.watched:
        if domain.revoked:
            yield Alert(Level.CRITICAL, "Key revoked", domain.name, domain.revoked)
        for link in domain.plaintext:
            remedy = "virsh blockcommit or blockjob --abort, then remove the image; see the operator's guide"
            yield Alert(Level.CRITICAL, "Plaintext image", domain.name, link, remedy)
        if domain.paused and not domain.revoked and not domain.plaintext:
            yield Alert(Level.WARNING, "Paused", domain.name, "the agent has paused the domain")


def _of_keys(overview: Overview) -> Iterator[Alert]:
    for each in overview.key_states:
        subject = f"{each.key}:{each.version}"
        if each.state in _UNUSABLE:
            text = f"the key of running domains is {each.state}"
            yield Alert(Level.CRITICAL, f"Key {each.state}", subject, text)
        elif each.state != "enabled":
            text = "the key's provider does not answer: domains keep running, and no domain can start"
            yield Alert(Level.WARNING, "Key provider silent", subject, text)


def _unprotected(overview: Overview) -> Iterator[Alert]:
    for domain in overview.domains:
        plain = [f"{disk.target} ({disk.place})" for disk in domain.disks if is_unprotected(disk)]
        if plain:
            level = Level.WARNING if _is_ours(domain) else Level.NOTICE
            yield Alert(
                level,
                "Unprotected disk" if len(plain) == 1 else "Unprotected disks",
                domain.name,
                ", ".join(plain),
                "virt-sse vm encrypt encrypts disks in place",
            )


def is_unprotected(disk: DomainDiskPart) -> bool:
    """Whether a guest writes to a disk without encryption."""
    return not disk.is_encrypted and not disk.read_only


def _is_ours(domain: DomainPart) -> bool:
    return domain.encryption_at_host or any(disk.disk_id for disk in domain.disks)
