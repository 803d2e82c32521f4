"""The configuration file ``config.toml``: its tables, and the checks of their values."""

from __future__ import annotations

import enum
import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from virt_sse.agent_client import LONGEST_SECONDS, TIMEOUT_SECONDS
from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.model.ceph import CephCluster
from virt_sse.model.ciphers import AES_256_CBC, Cipher
from virt_sse.model.layers import Placement
from virt_sse.system.documents import DocumentError, from_toml
from virt_sse.system.permissions import loose_permission


class IoErrors(enum.Enum):
    """Reaction to a failed read or write of a guest, e.g. while a process below QEMU is gone."""

    PAUSE = "pause"
    REPORT = "report"


class StaleImages(enum.Enum):
    """Reaction to an image that is older than the last known, or was not sealed by this host."""

    REFUSE = "refuse"
    WARN = "warn"


class PlaintextPolicy(enum.Enum):
    """Reaction of the agent to an unencrypted image that receives data of an encrypted disk."""

    WARN = "warn"
    PAUSE = "pause"
    COMMIT = "commit"

    @classmethod
    def _missing_(cls, value: object) -> PlaintextPolicy | None:
        """Accept the policy's former name."""
        return cls.COMMIT if value == "fold" else None


def _one_of(kind: type[enum.Enum]) -> str:
    return "one of " + ", ".join(repr(each.value) for each in kind)


_LONGEST_RECONNECT = 3600
_LONGEST_RETENTION = 3650
_PAGE_ADDRESS = r"^(127\.0\.0\.1|\[::1\]):[1-9][0-9]{0,4}\Z"
_UIDS = re.compile(r"(\d{1,10})-(\d{1,10})", re.ASCII)
STORAGE_UIDS = range(2_100_000_000, 2_100_065_536)
"""Outside of the ranges of distributions, of systemd (DynamicUser, nspawn), of subuid(5) and of SSSD."""
_MONITOR = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:]{2,45}\])(?::([1-9][0-9]{0,4}))?")
_MONITOR_PORT = 3300
_CEPH_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_UNKNOWN = re.compile(r"object contains unknown field `(.*)`")
_STRING = msgspec.Meta(description="a string")
_Seconds = Annotated[
    float,
    msgspec.Meta(
        gt=0, lt=LONGEST_SECONDS, description=f"a number of seconds above 0, below {LONGEST_SECONDS:.0f}"
    ),
]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of the file. The description of an option's type, default "a string", is for error messages."""


class AgentConfig(_Table, frozen=True):
    """Options of the agent. Times are in seconds.

    :ivar timeout: how long the hook waits for the agent before it serves an event itself.
    :ivar poll_seconds: interval between polls of the state of each key in use.
    :ivar probe_seconds: interval between test unwraps with each key, to detect denials that polls do not.
    :ivar rotation_seconds: interval between checks for new key versions.
    :ivar plaintext: reaction to unencrypted images.
    """

    timeout: _Seconds = TIMEOUT_SECONDS
    poll_seconds: _Seconds = 2.0
    probe_seconds: _Seconds = 30.0
    rotation_seconds: _Seconds = 60.0
    plaintext: Annotated[PlaintextPolicy, msgspec.Meta(description=_one_of(PlaintextPolicy))] = (
        PlaintextPolicy.WARN
    )


class PageConfig(_Table, frozen=True):
    """Options of the page.

    :ivar listen: address on loopback, ``HOST:PORT``, beside the Unix socket.
    :ivar group: name of the group whose members may connect to the Unix socket, beside root.
    """

    listen: Annotated[
        Annotated[str, msgspec.Meta(pattern=_PAGE_ADDRESS)] | None,
        msgspec.Meta(description="127.0.0.1:PORT or [::1]:PORT: loopback only"),
    ] = None
    group: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of :attr:`listen`, which must be set."""
        host, _, port = (self.listen or "").rpartition(":")
        return host.strip("[]"), int(port)


def parse_cipher(path: Path, text: str) -> Cipher:
    """The cipher *text*; empty: the default.

    :raise ConfigError: When *text* is invalid.
    """
    try:
        return Cipher.parse(text) if text else AES_256_CBC
    except InvalidValueError as exc:
        raise ConfigError(f"{path}: 'infrastructure-cipher' in [disks]: {exc}", hint=exc.hint) from exc


def parse_uids(path: Path, text: str) -> range:
    """The user ids of *text*, ``FIRST-LAST``; without root and ``(uid_t) -1``.

    :raise ConfigError: When *text* is invalid.
    """
    if not text:
        return STORAGE_UIDS
    match = _UIDS.fullmatch(text)
    if not match or not 0 < int(match[1]) <= int(match[2]) < 2**32 - 1:
        raise ConfigError(
            f"{path}: 'storage-uids' in [host] must be FIRST-LAST, from 1 to {2**32 - 2}, not {text[:80]!r}"
        )
    return range(int(match[1]), int(match[2]) + 1)


def parse_cluster(path: Path, root: Path, table: _Ceph) -> CephCluster | None:
    """The Ceph cluster of the table ``[ceph]``, if any.

    :raise ConfigError: When the table is invalid.
    """
    if not table.monitors:
        return None
    monitors = [_MONITOR.fullmatch(monitor) for monitor in table.monitors]
    found = [(match[1].strip("[]"), int(match[2] or _MONITOR_PORT)) for match in monitors if match]
    if len(found) < len(monitors) or not _CEPH_USER.fullmatch(table.user):
        raise ConfigError(
            f"{path}: 'monitors' in [ceph] must be a list of HOST or HOST:PORT,"
            " and 'user' a CephX user without 'client.'"
        )
    return CephCluster(
        tuple(found), table.user, Path(table.keyring or root / f"etc/ceph/ceph.client.{table.user}.keyring")
    )


class _Store(_Table, frozen=True):
    url: str = ""


class _Libvirt(_Table, frozen=True):
    uri: str = ""
    copies_without_tls: Annotated[bool, msgspec.Meta(description="true or false")] = False


class _Disks(_Table, frozen=True):
    directory: str = ""
    infrastructure_cipher: str = ""
    placement: Annotated[Literal["guest", "storage"], msgspec.Meta(description=_one_of(Placement))] = "guest"
    io_errors: Annotated[Literal["pause", "report", ""], msgspec.Meta(description=_one_of(IoErrors))] = ""
    reconnect_seconds: Annotated[
        int,
        msgspec.Meta(ge=1, le=_LONGEST_RECONNECT, description=f"seconds, from 1 to {_LONGEST_RECONNECT}"),
    ] = 30
    retention_days: Annotated[
        int, msgspec.Meta(ge=0, le=_LONGEST_RETENTION, description=f"days, from 0 to {_LONGEST_RETENTION}")
    ] = 7


class _Plugins(_Table, frozen=True):
    required: Annotated[tuple[str, ...], msgspec.Meta(description="a list of names")] = ()


class _Host(_Table, frozen=True):
    subscription: str = ""
    region: str = ""
    storage_uids: str = ""
    storage_user: str | None = None
    stale_images: Annotated[Literal["refuse", "warn"], msgspec.Meta(description=_one_of(StaleImages))] = (
        "refuse"
    )


class _EncryptionSets(_Table, frozen=True):
    limit: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None, msgspec.Meta(description="a number, 0 or more")
    ] = None
    operator_credential: str = ""


class _Policy(_Table, frozen=True):
    profile: str = ""
    tables: str = ""
    enforce: Annotated[bool, msgspec.Meta(description="true or false")] = True


class _Ceph(_Table, frozen=True):
    monitors: Annotated[tuple[str, ...], msgspec.Meta(description="a list of HOST or HOST:PORT")] = ()
    user: str = "virt-sse"
    keyring: str = ""


class Document(_Table, frozen=True):
    """The file. A misspelt option is an error, because a policy that is silently ignored does not hold."""

    store: _Store = _Store()
    libvirt: _Libvirt = _Libvirt()
    disks: _Disks = _Disks()
    plugins: _Plugins = _Plugins()
    host: _Host = _Host()
    encryption_sets: _EncryptionSets = _EncryptionSets()
    policy: _Policy = _Policy()
    agent: AgentConfig = AgentConfig()
    page: PageConfig = PageConfig()
    ceph: _Ceph = _Ceph()
    key_providers: dict[str, dict[str, object]] = {}

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file; a missing file is an empty one.

        :raise ConfigError: When the file cannot be read, or has an unknown table, unknown option or invalid
            value; or when other users may write the file or its folder.
        """
        try:
            text = _read(path)
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cannot read {path}: {exc}") from exc
        try:
            return from_toml(text.encode(), cls)
        except DocumentError as exc:
            raise ConfigError(_problem(path, str(exc))) from exc


def _problem(path: Path, message: str) -> str:
    """Translate the message of a :exc:`DocumentError` to the terms of TOML."""
    problem, _, place = message.partition(" - at `$.")
    table, _, option = place.removesuffix("`").partition(".")
    if unknown := _UNKNOWN.fullmatch(problem):
        what = f"option {unknown[1]!r} in [{table}]" if place else f"table [{unknown[1]}]"
        return f"{path}: unknown {what}"
    if not place:
        return f"cannot read {path}: {problem}"
    where = f"{option.partition('[')[0]!r} in [{table}]" if option else repr(table)
    if description := options().get((table, option.partition("[")[0])):
        return f"{path}: {where} must be {description}"
    if not problem.startswith("expected "):
        return f"{path}: {where}: {problem}"
    if table.startswith("key-providers"):
        return f"{path}: [key-providers] must be a table with one table per provider"
    return f"{path}: {where} must be a table"


def options() -> dict[tuple[str, str], str]:
    """The description of each option's type, by table and option."""
    found = {}
    for table in msgspec.structs.fields(Document):
        if isinstance(table.type, type) and issubclass(table.type, _Table):
            for option in msgspec.structs.fields(table.type):
                (meta,) = getattr(option.type, "__metadata__", (_STRING,))
                found[table.encode_name, option.encode_name] = str(meta.description)
    return found


def _read(path: Path) -> str:
    """The content of the configuration file.

    The file names programs, plugins and places that root's commands use: whoever writes it is root.

    :raise ConfigError: When other users may write the file, or replace the file in its folder.
    """
    with path.open("rb") as file:
        for place, status in ((path, os.fstat(file.fileno())), (path.parent, path.parent.stat())):
            if found := loose_permission(place, status):
                raise ConfigError(found.problem, hint=found.remedy)
        return file.read().decode("utf-8")
