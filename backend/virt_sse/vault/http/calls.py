"""A request, once it is known who sent it, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from virt_sse.vault.http import wire
from virt_sse.vault.identity.principals import Principal
from virt_sse.vault.vault import Vault


@dataclass(frozen=True, slots=True)
class Call:
    """:ivar path: the path's variable parts, e.g. ``name`` and ``version``.
    :ivar body: may hold what is to be wrapped, so it does not print.
    """

    vault: Vault
    principal: Principal
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The key's name, or the principal's, in the path."""
        return self.path.get("name", "")

    @property
    def version(self) -> str:
        """The key's version in the path; empty means the newest."""
        return self.path.get("version", "")

    @property
    def bundles(self) -> wire.Bundles:
        """Writes keys as Azure's JSON."""
        return wire.Bundles(self.vault.settings)

    def document(self) -> dict[str, object]:
        """The body.

        :raise Refusal: When it is not a JSON object.
        """
        return wire.parse(self.body)


@dataclass(frozen=True, slots=True)
class Reply:
    """:ivar body: may hold what was unwrapped, so it does not print.
    :ivar version: the key's version that was used, for the audit log.
    :ivar subject: what it was about, for the audit log, if the path does not say.
    """

    body: Mapping[str, object] | None = field(repr=False)
    status: int = 200
    version: str | None = None
    subject: str | None = None


Handler = Callable[[Call], Reply]
"""Synchronous; may raise :class:`~virt_sse.vault.refusals.Refusal`."""
