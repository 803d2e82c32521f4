"""The agent's Prometheus metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from virt_sse.errors import VirtSseError
from virt_sse.hookspecs import hookimpl
from virt_sse.model.events import KeyAction, KeyEvent
from virt_sse.model.keys import KeyState

_PREFIX = "virt_sse_agent"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The agent's metrics; a plugin that observes key events. Thread-safe."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._shown: frozenset[tuple[str, str, KeyState]] = frozenset()
        self.libvirt_connected = Gauge(
            f"{_PREFIX}_libvirt_connected", "Whether libvirt answers.", registry=registry
        )
        self.domains = Gauge(f"{_PREFIX}_domains", "Running domains with encrypted disks.", registry=registry)
        self.revoked_domains = Gauge(
            f"{_PREFIX}_revoked_domains",
            "Running domains with a revoked key.",
            registry=registry,
        )
        self.spared_domains = Gauge(
            f"{_PREFIX}_spared_domains",
            "Running domains with a revoked key, spared because of the set's action or the disk's SKU.",
            registry=registry,
        )
        self.unreadable = Gauge(
            f"{_PREFIX}_unreadable_parts",
            "Parts of running domains, and libvirt secrets, that cannot be read and were skipped.",
            registry=registry,
        )
        self.keys_watched = Gauge(
            f"{_PREFIX}_keys_watched",
            "Key versions in use by disks of running domains.",
            registry=registry,
        )
        self._key_state = Gauge(
            f"{_PREFIX}_key_state",
            "1 for the key's last known state.",
            ["key", "encryption_set", "state"],
            registry=registry,
        )
        self.last_watch = Gauge(
            f"{_PREFIX}_last_watch_timestamp_seconds",
            "Time of the last complete check of libvirt's domains and their keys.",
            registry=registry,
        )
        self.actions = Counter(
            f"{_PREFIX}_domain_actions",
            "Actions on domains.",
            ["action"],
            registry=registry,
        )
        self.failed_actions = Counter(
            f"{_PREFIX}_domain_action_failures", "Failed actions on domains.", ["action"], registry=registry
        )
        self.plaintext_links = Gauge(
            f"{_PREFIX}_plaintext_links",
            "Unencrypted images with data of encrypted disks.",
            registry=registry,
        )
        self.plaintext_links_found = Counter(
            f"{_PREFIX}_plaintext_links_found",
            "Unencrypted images found, by their relation to the disk.",
            ["kind"],
            registry=registry,
        )
        self.unseen_copies = Counter(
            f"{_PREFIX}_unseen_copies",
            "Copies and backups of encrypted disks that ended before their targets were seen.",
            ["kind"],
            registry=registry,
        )
        self.plaintext_beside = Gauge(
            f"{_PREFIX}_plaintext_beside",
            "Unencrypted files named as an image with a suffix.",
            registry=registry,
        )
        self.missing_images = Gauge(f"{_PREFIX}_missing_images", "Disks without an image.", registry=registry)
        self.deleted_disks = Gauge(
            f"{_PREFIX}_deleted_disks", "Deleted disks that can be recovered.", registry=registry
        )
        self.overdue_purges = Gauge(
            f"{_PREFIX}_overdue_purges", "Deleted disks that could not be purged when due.", registry=registry
        )
        self.rewrapped = Counter(
            f"{_PREFIX}_rewrapped_disks", "Disks rewrapped to a new key version.", registry=registry
        )
        self._uses = Counter(f"{_PREFIX}_key_uses", "Uses of keys.", ["action", "result"], registry=registry)
        self._unwrap_seconds = Histogram(
            f"{_PREFIX}_unwrap_seconds", "Duration of unwraps.", buckets=_SECONDS, registry=registry
        )
        self._hook_seconds = Histogram(
            f"{_PREFIX}_hook_seconds",
            "Duration of libvirt hook events.",
            ["event"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._hooks = Counter(
            f"{_PREFIX}_hooks", "Libvirt hook events.", ["event", "result"], registry=registry
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)

    def show_keys(self, states: Collection[tuple[str, str, KeyState]]) -> None:
        """Replace the keys shown.

        :param states: key with version, id of the encryption set or an empty string, and state.
        """
        if (now := frozenset(states)) == self._shown:
            return
        self._shown = now
        self.keys_watched.set(len(states))
        self._key_state.clear()
        for key, encryption_set, state in states:
            for each in KeyState:
                self._key_state.labels(key, encryption_set, each.value).set(each is state)

    @contextlib.contextmanager
    def hook(self, event: str) -> Iterator[None]:
        """Measure a hook event, served in the context."""
        began, result = time.monotonic(), "failed"
        try:
            yield
            result = "served"
        except VirtSseError:
            result = "refused"
            raise
        finally:
            self._hook_seconds.labels(event).observe(time.monotonic() - began)
            self._hooks.labels(event, result).inc()

    @hookimpl
    def virt_sse_key_event(self, event: KeyEvent) -> None:
        self._uses.labels(event.action.value, "refused" if event.error else "allowed").inc()
        if event.action is KeyAction.UNWRAP:
            self._unwrap_seconds.observe(event.seconds)
