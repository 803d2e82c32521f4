"""Enforces key revocations on running domains, and lifts the enforcement once the keys are usable again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from uuid import UUID

from virt_sse.agent import enforcement
from virt_sse.agent.inventory import RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.errors import LibvirtError, VirtSseError
from virt_sse.model.disks import Disk, DiskSku
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.plugins import PluginHost
from virt_sse.stages import Stages

_log = logging.getLogger(__name__)

PLATFORM_ACTION, PLATFORM_GRACE_SECONDS = RevocationAction.SHUTDOWN, 60
"""For disks without an encryption set: the defaults of a set."""

_RANK = (
    RevocationAction.NONE,
    RevocationAction.PAUSE,
    RevocationAction.SHUTDOWN,
    RevocationAction.DESTROY,
)
_THREADS = 16
_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RevokedDisk:
    """A disk of a running domain with a revoked key, and the reason."""

    disk: Disk
    encryption_set: EncryptionSet | None
    reason: str


@dataclass(frozen=True, slots=True)
class Enforcement:
    """The enforcement for a domain; ``SHUTDOWN`` has a grace time above 0."""

    action: RevocationAction
    grace_seconds: int = 0


@dataclass(frozen=True, slots=True)
class DomainKeyStatus:
    """Status of a running domain's keys. Neither revoked nor clear is possible: a vault does not answer.

    :ivar revoked: disks with a revoked key.
    :ivar is_clear: whether all keys are known to be usable.
    :ivar has_secrets: whether libvirt has a DEK of the domain.
    """

    domain: RunningDomain
    revoked: tuple[RevokedDisk, ...] = ()
    is_clear: bool = False
    has_secrets: bool = False


def spared_skus(plugins: PluginHost) -> frozenset[DiskSku]:
    """The SKUs of disks whose domains keep running after a revocation; none if the rules are unreadable."""
    try:
        return plugins.cloud_profile().spared_skus
    except VirtSseError as exc:
        _log.warning("a revocation spares no disk: %s", exc)
        return frozenset()


def strictest_enforcement(
    revoked: Sequence[RevokedDisk], spared: Collection[DiskSku] = frozenset()
) -> Enforcement:
    """The strictest enforcement demanded by the sets of these disks, at least one, of a domain.

    :param spared: SKUs of disks that demand nothing.
    """
    return max(
        (_disk_enforcement(each, spared) for each in revoked),
        key=lambda each: (_RANK.index(each.action), -each.grace_seconds),
    )


def _disk_enforcement(revoked: RevokedDisk, spared: Collection[DiskSku]) -> Enforcement:
    if revoked.disk.sku in spared:
        return Enforcement(RevocationAction.NONE)
    action, grace = PLATFORM_ACTION, PLATFORM_GRACE_SECONDS
    if revoked.encryption_set:
        action, grace = revoked.encryption_set.revocation, revoked.encryption_set.grace_seconds
    if action is not RevocationAction.SHUTDOWN:
        return Enforcement(action)
    return Enforcement(action, grace) if grace else Enforcement(RevocationAction.DESTROY)


@dataclass(slots=True)
class _RevokedDomain:
    """A domain with a revoked key, from detection until the domain or the revocation ends."""

    domain: RunningDomain
    since: float
    enforcement: Enforcement
    reason: str
    is_requested: bool = False


@dataclass(slots=True)
class _Job:
    """An action on a domain; a domain has at most one at a time."""

    future: Future[None]
    not_before: float = field(default=0.0)


class Revocation:
    """Enforces revocations, and repeats failed actions until the domain is in the required state.

    Keeps its state in memory only: after a restart of the agent, a domain's grace time starts again.

    :param done: called, in any thread, after each successful action.
    :param spared: SKUs of disks whose domains keep running, by the cloud profile.
    """

    def __init__(
        self,
        uri: str,
        stages: Stages,
        metrics: Metrics,
        done: Callable[[], None],
        spared: Collection[DiskSku] = frozenset(),
    ) -> None:
        self._uri = uri
        self._stages = stages
        self._metrics = metrics
        self._done = done
        self._spared = spared
        self._cases: dict[tuple[UUID, int], _RevokedDomain] = {}
        self._jobs: dict[tuple[UUID, int], _Job] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="domain")

    def apply(self, statuses: Sequence[DomainKeyStatus]) -> float | None:
        """Start the actions that are due.

        :param statuses: of all running domains with a virt-sse disk.
        :return: when the first grace time ends, in ``time.monotonic()``.
        """
        present = {(each.domain.uuid, each.domain.run) for each in statuses}
        for key in self._cases.keys() - present:
            self._end(self._cases.pop(key))
        for key in self._jobs.keys() - present:
            del self._jobs[key]
        for each in statuses:
            if each.revoked:
                self._enforce(each)
            elif each.is_clear:
                self._lift(each.domain)
        cases = self._cases.values()
        self._metrics.revoked_domains.set(len(cases))
        self._metrics.spared_domains.set(sum(c.enforcement.action is RevocationAction.NONE for c in cases))
        waiting = [c for c in cases if c.enforcement.action is RevocationAction.SHUTDOWN]
        return min((c.since + c.enforcement.grace_seconds for c in waiting), default=None)

    def reason(self, domain: RunningDomain) -> str | None:
        """Why the domain counts as revoked, and its secrets are not restored; ``None`` if not revoked."""
        case = self._cases.get((domain.uuid, domain.run))
        return case.reason if case else None

    def stop(self) -> None:
        """Start no more actions, and wait for actions under way."""
        self._pool.shutdown(cancel_futures=True)

    def _enforce(self, status: DomainKeyStatus) -> None:
        domain, now = status.domain, time.monotonic()
        key, wanted = (domain.uuid, domain.run), strictest_enforcement(status.revoked, self._spared)
        if (case := self._cases.get(key)) is None:
            case = self._cases[key] = _RevokedDomain(domain, now, wanted, status.revoked[0].reason)
            self._report(status, wanted)
        case.enforcement = wanted
        expired = wanted.action is RevocationAction.SHUTDOWN and now >= case.since + wanted.grace_seconds
        if wanted.action is RevocationAction.DESTROY or expired:
            self._do("destroy", domain, self._destroy)
        elif wanted.action is RevocationAction.SHUTDOWN and not case.is_requested:
            case.is_requested = self._do("shutdown", domain, enforcement.request_shutdown)
        elif wanted.action is RevocationAction.PAUSE and domain.runs:
            self._do("pause", domain, enforcement.pause)
        elif status.has_secrets:
            self._do("drop-secrets", domain, enforcement.drop_secrets)

    def _destroy(self, uri: str, domain: RunningDomain) -> bool:
        """End the domain. If libvirt cannot, end the domain's stage processes: with them goes its data.

        :raise LibvirtError: When libvirt refuses, or does not answer.
        """
        try:
            return enforcement.destroy(uri, domain)
        except LibvirtError:
            self._stages.stop_domain(domain.uuid)
            raise

    def _lift(self, domain: RunningDomain) -> None:
        if self._cases.pop((domain.uuid, domain.run), None):
            _log.info("domain-restored", extra=fields({"domain": domain.name}))
        if domain.paused_for_key:
            self._do("resume", domain, enforcement.resume)

    def _do(self, action: str, domain: RunningDomain, function: Callable[[str, RunningDomain], bool]) -> bool:
        """Call *function* in a worker thread, unless an action is under way or recent; whether started."""
        key, now = (domain.uuid, domain.run), time.monotonic()
        job = self._jobs.get(key)
        if job and (not job.future.done() or now < job.not_before):
            return False
        future = self._pool.submit(self._work, action, domain, function)
        self._jobs[key] = _Job(future, now + _AGAIN_SECONDS)
        return True

    def _work(
        self, action: str, domain: RunningDomain, function: Callable[[str, RunningDomain], bool]
    ) -> None:
        details = {"domain": domain.name, "action": action}
        try:
            done = function(self._uri, domain)
        except VirtSseError as exc:
            self._metrics.failed_actions.labels(action).inc()
            _log.warning("domain-action-failed", extra=fields(details | {"reason": str(exc)}))
            case = self._cases.get((domain.uuid, domain.run))
            if case and action == "shutdown":
                case.is_requested = False
            return
        if done:
            self._metrics.actions.labels(action).inc()
            _log.warning("domain-action", extra=fields(details))
        self._done()

    def _report(self, status: DomainKeyStatus, wanted: Enforcement) -> None:
        details = {
            "domain": status.domain.name,
            "action": wanted.action.value,
            "grace-seconds": wanted.grace_seconds,
            "disks": [each.disk.name for each in status.revoked],
            "reason": status.revoked[0].reason,
        }
        if any(each.disk.sku in self._spared for each in status.revoked):
            details["spared"] = "runs on, and cannot be started again"
        _log.warning("domain-revoked", extra=fields(details))

    def _end(self, case: _RevokedDomain) -> None:
        seconds = round(time.monotonic() - case.since, 3)
        details = {
            "domain": case.domain.name,
            "action": case.enforcement.action.value,
            "after-seconds": seconds,
        }
        _log.warning("domain-ended", extra=fields(details))
