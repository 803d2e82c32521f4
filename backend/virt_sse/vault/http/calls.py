"""The parameters and results of handlers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from virt_sse.vault.http import wire
from virt_sse.vault.identity.principals import Principal
from virt_sse.vault.vault import Vault


@dataclass(frozen=True, slots=True)
class Call:
    """An authenticated request.

    :ivar path: the path's variable parts, e.g. ``name`` and ``version``.
    :ivar body: may contain a key to wrap, therefore not in the repr.
    """

    vault: Vault
    principal: Principal
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the key or principal in the path."""
        return self.path.get("name", "")

    @property
    def version(self) -> str:
        """The key's version in the path; empty for the newest version."""
        return self.path.get("version", "")

    @property
    def bundles(self) -> wire.Bundles:
        """The encoder of keys as Azure's JSON."""
        return wire.Bundles(self.vault.settings)

    def document(self) -> dict[str, object]:
        """Decode the body.

        :raise Refusal: When the body is not a JSON object.
        """
        return wire.parse(self.body)


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a handler.

    :ivar body: may contain an unwrapped key, therefore not in the repr.
    :ivar version: the key version used, for the audit log.
    :ivar subject: the object of the request, for the audit log, unless the path names the object.
    """

    body: Mapping[str, object] | None = field(repr=False)
    status: int = 200
    version: str | None = None
    subject: str | None = None


Handler = Callable[[Call], Reply]
"""Synchronous; may raise :class:`~virt_sse.vault.refusals.Refusal`."""
