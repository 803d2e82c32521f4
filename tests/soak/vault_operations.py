"""Changes of a served vault that are killed: the client's process, or the server's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from soak.vault_site import ABSENT, DELETED, VaultSite


@dataclass(frozen=True, slots=True)
class VaultOperation:
    """A command of the vault's administrator.

    :ivar kills_server: whether the server is killed; otherwise the client.
    :ivar prepare: brings the vault into the state before the command.
    :ivar arguments: of ``virt-sse``.
    :ivar state: reads the state that the command changes.
    :ivar after: the state after the command.
    :ivar repeated: the state after the repeated command if different.
    :ivar refusals: parts of messages with which the same command may be refused once it has taken effect.
    """

    name: str
    kills_server: bool
    prepare: Callable[[VaultSite], None]
    arguments: Callable[[VaultSite], list[str]]
    state: Callable[[VaultSite], str]
    after: str
    repeated: str | None = None
    refusals: tuple[str, ...] = ()


def _disabled(site: VaultSite) -> None:
    site.new_key()
    with site.client() as client:
        client.update_key_properties(site.subject.name, enabled=False)


def _deleted(site: VaultSite) -> None:
    site.new_key()
    with site.client() as client:
        client.begin_delete_key(site.subject.name).wait()


def _granted(site: VaultSite) -> None:
    site.new_principal()
    site.cli("vault", "access", "set", site.subject.name, "get", "wrapKey")


def _key(
    verb: str,
    prepare: Callable[[VaultSite], None],
    after: str,
    *,
    repeated: str | None = None,
    refusals: tuple[str, ...] = (),
    options: Callable[[VaultSite], list[str]] = lambda _: [],
) -> list[VaultOperation]:
    return [
        VaultOperation(
            f"vault-key-{verb}-{'server' if kills_server else 'client'}",
            kills_server,
            prepare,
            lambda site: ["key", verb, site.subject.name, *options(site)],
            VaultSite.state,
            after,
            repeated,
            refusals,
        )
        for kills_server in (False, True)
    ]


def _access(
    verb: str, prepare: Callable[[VaultSite], None], after: str, *permissions: str
) -> list[VaultOperation]:
    return [
        VaultOperation(
            f"vault-access-{verb}-{'server' if kills_server else 'client'}",
            kills_server,
            prepare,
            lambda site: ["vault", "access", verb, site.subject.name, *permissions],
            VaultSite.permissions,
            after,
        )
        for kills_server in (False, True)
    ]


VAULT_OPERATIONS: tuple[VaultOperation, ...] = (
    *_key("create", VaultSite.new_subject, "+", repeated="++", options=lambda _: ["--size", "2048"]),
    *_key("import", VaultSite.new_subject, "+", repeated="++", options=lambda site: [str(site.pem)]),
    *_key("rotate", VaultSite.new_key, "+++", repeated="++++"),
    *_key("disable", VaultSite.new_key, "+-"),
    *_key("enable", _disabled, "++"),
    *_key("delete", VaultSite.new_key, DELETED, refusals=("not found", "no key", "deleted")),
    *_key("recover", _deleted, "++", refusals=("not found", "no key", "no deleted key")),
    *_key("purge", _deleted, ABSENT, refusals=("not found", "no key", "no deleted key")),
    *_access("set", VaultSite.new_principal, "get wrapKey", "get", "wrapKey"),
    *_access("remove", _granted, "get", "wrapKey"),
)
