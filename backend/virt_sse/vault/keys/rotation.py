"""Rotation policies: storage and execution.

https://learn.microsoft.com/azure/key-vault/keys/how-to-configure-key-rotation: ``Rotate`` is due a time after
the newest version was made, or a time before it expires; ``expiryTime`` is the lifetime of a rotated version.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from virt_sse.vault.keys.durations import seconds_of
from virt_sse.vault.keys.records import KeyVersion
from virt_sse.vault.keys.service import KeyService
from virt_sse.vault.keys.store import KeyStore
from virt_sse.vault.properties import LAST_MOMENT, integer, string, table
from virt_sse.vault.refusals import Refusal, bad_parameter, conflict, forbidden

_DAY = 86400
SHORTEST_ROTATION = 7 * _DAY
_SHORTEST_LIFE = 4 * SHORTEST_ROTATION
_LONGEST = 100 * 365 * _DAY
_NOTIFY = {"trigger": {"timeBeforeExpiry": "P30D"}, "action": {"type": "Notify"}}


@dataclass(frozen=True, slots=True)
class RotationPolicy:
    """A rotation policy. Times are in seconds.

    :ivar expiry: the lifetime of a new version.
    :ivar after_create: rotate at this age of the newest version.
    :ivar before_expiry: rotate this long before the newest version expires.
    :ivar document: the policy as given, with its ISO 8601 durations.
    """

    expiry: int | None
    after_create: int | None
    before_expiry: int | None
    document: Mapping[str, object]

    def due(self, newest: KeyVersion, now: float) -> bool:
        """Check whether rotation is due; never for a disabled key, whose new version would be usable."""
        if not newest.attributes.enabled:
            return False
        if self.after_create is not None and newest.created + self.after_create <= now:
            return True
        expires = newest.attributes.expires
        return self.before_expiry is not None and expires is not None and expires - self.before_expiry <= now


class RotationPolicies:
    """Rotates keys, on request and when their policies demand.

    :param shortest: the shortest interval in a policy, in seconds; default Azure's 7 days.
    """

    def __init__(
        self,
        store: KeyStore,
        keys: KeyService,
        *,
        shortest: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._keys = keys
        self._shortest = SHORTEST_ROTATION if shortest is None else shortest
        self._clock = clock

    def rotate(self, name: str) -> KeyVersion:
        """Make a new version now.

        :raise Refusal: When there is no such key, or the key is disabled: its new version would be usable.
        """

        def expiry(newest: KeyVersion, policy: str | None) -> int | None:
            if not newest.attributes.enabled:
                raise forbidden("Operation rotate is not allowed on a disabled key.", "KeyDisabled")
            return self._expiry(policy)

        return self._keys.rotate(name, expiry)

    def rotate_due(self, name: str) -> KeyVersion:
        """Make a new version if a rotation is due.

        :raise Refusal: When there is no such key, or a concurrent change has made the rotation undue.
        """

        def expiry(newest: KeyVersion, policy: str | None) -> int | None:
            if policy is None or not self._parse(json.loads(policy)).due(newest, self._clock()):
                raise conflict(f"A rotation of key {name} is no longer due.")
            return self._expiry(policy)

        return self._keys.rotate(name, expiry)

    def policy(self, name: str) -> dict[str, object]:
        """Return the policy of a key, by default Azure's default policy.

        :raise Refusal: When there is no such key.
        """
        stored = self._store.policy(self._keys.named(name))
        return json.loads(stored) if stored else {"lifetimeActions": [_NOTIFY], "attributes": {}}

    def set_policy(self, name: str, document: Mapping[str, object]) -> dict[str, object]:
        """Set the policy of a key.

        :raise Refusal: When the policy is invalid, or there is no such key.
        """
        policy = self._parse(document)
        self._check_durations(policy)
        now = int(self._clock())
        attributes: dict[str, object] = {"created": now, "updated": now}
        expiry = table(document, "attributes").get("expiryTime")
        if expiry is not None:
            attributes["expiryTime"] = expiry
        kept = {"lifetimeActions": policy.document["lifetimeActions"], "attributes": attributes}

        def changed(before: str | None) -> str:
            if before:
                attributes["created"] = integer(table(json.loads(before), "attributes"), "created", now)
            return json.dumps(kept)

        self._store.set_policy(self._keys.named(name), changed)
        return kept

    def due(self) -> list[str]:
        """List the names of the keys due for rotation."""
        now = self._clock()
        policies = {name: self._parse(json.loads(stored)) for name, stored in self._store.policies().items()}
        due = []
        for name, policy in policies.items():
            with contextlib.suppress(Refusal):  # deleted meanwhile
                if policy.due(self._store.get(name), now):
                    due.append(name)
        return due

    def _expiry(self, policy: str | None) -> int | None:
        """Compute the expiry of a version made now, in seconds since 1970."""
        lifetime = self._parse(json.loads(policy)).expiry if policy else None
        return None if lifetime is None else min(int(self._clock()) + lifetime, LAST_MOMENT)

    def _parse(self, document: Mapping[str, object]) -> RotationPolicy:
        expiry = _seconds(table(document, "attributes"), "expiryTime")
        actions = document.get("lifetimeActions") or []
        if not isinstance(actions, list) or not all(isinstance(action, dict) for action in actions):
            raise bad_parameter("Property lifetimeActions must be a list of objects.")
        found: dict[str, tuple[int | None, int | None]] = {}
        kept = []
        for action in actions:
            kind = string(table(action, "action"), "type").lower()
            trigger = table(action, "trigger")
            after, before = _seconds(trigger, "timeAfterCreate"), _seconds(trigger, "timeBeforeExpiry")
            if kind not in ("rotate", "notify") or kind in found:
                raise bad_parameter("A policy has at most one action Rotate and one action Notify.")
            if (after is None) is (before is None):
                raise bad_parameter("A trigger has either timeAfterCreate or timeBeforeExpiry.")
            found[kind] = (after, before)
            name = "timeBeforeExpiry" if after is None else "timeAfterCreate"
            kept.append({"trigger": {name: trigger[name]}, "action": {"type": kind.capitalize()}})
        after, before = found.get("rotate", (None, None))
        if before is not None and expiry is None:
            raise bad_parameter("Rotating before expiry needs an expiryTime.")
        return RotationPolicy(expiry, after, before, {"lifetimeActions": kept or [_NOTIFY]})

    def _check_durations(self, policy: RotationPolicy) -> None:
        """Refuse intervals too short for the key's users to follow, and times that clients cannot show."""
        life = min(_SHORTEST_LIFE, 4 * self._shortest)
        if policy.expiry is not None and policy.expiry < life:
            raise bad_parameter(f"Property expiryTime must be at least {life} seconds.")
        if any(each is not None and each > _LONGEST for each in (policy.expiry, policy.after_create)):
            raise bad_parameter("A duration in a rotation policy is at most 100 years.")
        for interval in (policy.after_create, policy.before_expiry):
            if interval is not None and interval < self._shortest:
                raise bad_parameter(f"Keys are rotated at intervals of at least {self._shortest} seconds.")
        if policy.expiry is not None:
            last = (
                policy.after_create if policy.before_expiry is None else policy.expiry - policy.before_expiry
            )
            if last is not None and not self._shortest <= last <= policy.expiry:
                raise bad_parameter("The key would expire before its rotation, or be rotated again too soon.")


def _seconds(document: Mapping[str, object], field: str) -> int | None:
    return None if document.get(field) is None else seconds_of(string(document, field))
