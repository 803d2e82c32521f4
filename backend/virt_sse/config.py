"""Where things lie, and what the site has chosen.

``VIRT_SSE_ROOT`` moves all that would lie in /etc, /var/lib, /var/log and /run under another root.
"""

from __future__ import annotations

import enum
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from virt_sse.agent_client import SOCKET, TIMEOUT_SECONDS
from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.model.ciphers import AES_256_CBC, Cipher
from virt_sse.model.keys import ProviderConfig
from virt_sse.model.operations import Site

_TABLES = {
    "store": {"url"},
    "libvirt": {"uri"},
    "disks": {"directory", "infrastructure-cipher", "io-errors", "reconnect-seconds"},
    "plugins": {"required"},
    "host": {"subscription", "region", "storage-user"},
    "encryption-sets": {"limit", "operator-credential"},
    "policy": {"tables", "enforce"},
    "agent": {"timeout", "poll-seconds", "probe-seconds", "rotation-seconds", "plaintext"},
}


_LONGEST_RECONNECT = 3600


class IoErrors(enum.Enum):
    """What a guest gets when its disk cannot be read or written, e.g. as a process below QEMU is gone."""

    PAUSE = "pause"
    REPORT = "report"


class PlaintextPolicy(enum.Enum):
    """The agent's action on unencrypted images with data of an encrypted disk."""

    WARN = "warn"
    PAUSE = "pause"
    COMMIT = "commit"

    @classmethod
    def _missing_(cls, value: object) -> PlaintextPolicy | None:
        return (
            cls.COMMIT if value == "fold" else None
        )  # the name of this policy in earlier configuration files


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """How the agent works. Times are in seconds.

    :ivar timeout: how long the hook waits for it before it serves an event itself.
    :ivar poll_seconds: between two looks at each key that is in use.
    :ivar probe_seconds: between two unwraps with each, which find what a look does not.
    :ivar rotation_seconds: between two looks for new versions of keys.
    :ivar plaintext: what it does about images without encryption.
    """

    timeout: float = TIMEOUT_SECONDS
    poll_seconds: float = 2.0
    probe_seconds: float = 30.0
    rotation_seconds: float = 60.0
    plaintext: PlaintextPolicy = PlaintextPolicy.WARN


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one host.

    :ivar root: the folder that stands for ``/``.
    :ivar store_url: an SQLAlchemy URL; may hold a password, therefore not in the repr.
    :ivar libvirt_uri: where libvirt answers.
    :ivar disk_directory: where new images go unless a path or a pool is given.
    :ivar subscription: the one that this host's disks belong to; so
    :ivar region: their region.
    :ivar encryption_set_limit: how many disk encryption sets a subscription may have in a region.
    :ivar infrastructure_cipher: of the second layer of double encryption.
    :ivar io_errors: what a guest is to get when its disk cannot be read or written.
    :ivar reconnect_seconds: how long a guest's requests wait for a storage process that died to be back.
    :ivar storage_user: the user, or its number, that storage processes run as; ``None``: see
        :func:`virt_sse.stages.storage_user.storage_user`.
    :ivar operator_credential: what makes and deletes the sets' identities in a key vault.
    :ivar policy_tables: what is supported where, in place of what comes with virt-sse; see ``cloud.toml``
        there.
    :ivar enforce_policy: whether the rules of a cloud, which the tables tell in part, hold here.
    :ivar required_plugins: entry points without which nothing may run, e.g. a site's policy.
    :ivar provider_options: by provider name, its table ``[key-providers.NAME]``.
    """

    root: Path
    store_url: str = field(repr=False)
    libvirt_uri: str
    disk_directory: Path
    operator_credential: Path
    infrastructure_cipher: Cipher = AES_256_CBC
    io_errors: IoErrors = IoErrors.PAUSE
    reconnect_seconds: int = 30
    storage_user: str | None = None
    subscription: str = "default"
    region: str = "default"
    encryption_set_limit: int = 50
    policy_tables: Path | None = None
    enforce_policy: bool = True
    required_plugins: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict, repr=False)
    agent: AgentConfig = AgentConfig()

    @classmethod
    def load(cls, root: Path | None = None) -> Self:
        """Read ``etc/virt-sse/config.toml`` under *root*; all of it is optional.

        :param root: default ``VIRT_SSE_ROOT``, else ``/``.
        :raise ConfigError: When the file cannot be read or holds what is unknown.
        """
        root = root if root is not None else Path(os.environ.get("VIRT_SSE_ROOT") or "/")
        path = root / "etc/virt-sse/config.toml"
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            document = {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"cannot read {path}: {exc}") from exc
        _check(path, document)
        uri = (
            os.environ.get("LIBVIRT_DEFAULT_URI")
            or document.get("libvirt", {}).get("uri")
            or "qemu:///system"
        )
        disks = document.get("disks", {})
        store = document.get("store", {}).get("url") or _sqlite_url(root / "var/lib/virt-sse/store.sqlite")
        return cls(
            root=root,
            store_url=store,
            libvirt_uri=uri,
            disk_directory=Path(disks.get("directory") or root / "var/lib/libvirt/images"),
            infrastructure_cipher=_cipher(path, disks.get("infrastructure-cipher")),
            io_errors=_io_errors(path, disks.get("io-errors")),
            reconnect_seconds=disks.get("reconnect-seconds", 30),
            storage_user=document.get("host", {}).get("storage-user"),
            operator_credential=Path(
                document.get("encryption-sets", {}).get("operator-credential")
                or root / "etc/virt-sse/identity-operator.json"
            ),
            subscription=document.get("host", {}).get("subscription") or "default",
            region=document.get("host", {}).get("region") or "default",
            encryption_set_limit=document.get("encryption-sets", {}).get("limit", 50),
            policy_tables=Path(tables) if (tables := document.get("policy", {}).get("tables")) else None,
            enforce_policy=document.get("policy", {}).get("enforce", True),
            required_plugins=tuple(document.get("plugins", {}).get("required", ())),
            provider_options=document.get("key-providers", {}),
            agent=_agent(document.get("agent", {})),
        )

    @property
    def state_directory(self) -> Path:
        """The store, the keyring and locks; 0700."""
        return self.root / "var/lib/virt-sse"

    @property
    def log_directory(self) -> Path:
        """The audit log; 0700."""
        return self.root / "var/log/virt-sse"

    @property
    def hook_path(self) -> Path:
        """The libvirt qemu hook that ``virt-sse host init`` installs."""
        return self.root / "etc/libvirt/hooks/qemu.d/virt-sse"

    @property
    def agent_socket(self) -> Path:
        """Where the per-host agent answers, if one runs."""
        return self.root / SOCKET

    @property
    def temp_disk_directory(self) -> Path:
        """VMs' temporary disks, each in a folder that only its QEMU may enter. Anybody may pass through this
        one.
        """
        return self.disk_directory / "temporary-disks"

    @property
    def site(self) -> Site:
        """What policies are told of the host."""
        return Site(self.subscription, self.region, self.policy_tables, self.enforce_policy)

    @property
    def stage_directory(self) -> Path:
        """What is known of the processes between QEMU and the storage; 0700."""
        return self.root / "run/virt-sse/stages"

    @property
    def socket_directory(self) -> Path:
        """Their sockets, each in a folder that its two sides alone may enter; this one all may pass."""
        return self.root / "run/virt-sse-disks"

    @property
    def cache_directory(self) -> Path:
        """Host caches, in files without a name; 0700, of the user that storage processes run as."""
        return self.root / "var/cache/virt-sse"

    @property
    def identity_directory(self) -> Path:
        """The credentials of the disk encryption sets' identities; 0700."""
        return self.state_directory / "identities"

    def identity(self, set_id: UUID) -> Path:
        """The credential of the identity of a disk encryption set, if it has one."""
        return self.identity_directory / f"{set_id}.json"

    def key_provider(self, name: str, set_id: UUID | None = None) -> ProviderConfig:
        """What the provider *name* is made from, to act for a disk encryption set or for the host itself."""
        identity = self.identity(set_id) if set_id else None
        return ProviderConfig(self.state_directory / name, self.provider_options.get(name, {}), identity)


def _sqlite_url(path: Path) -> str:
    """SQLAlchemy's URL of an SQLite file; ``?`` and ``%`` have a meaning in it."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def _cipher(path: Path, text: str | None) -> Cipher:
    try:
        return Cipher.parse(text) if text else AES_256_CBC
    except InvalidValueError as exc:
        raise ConfigError(f"{path}: 'infrastructure-cipher' in [disks]: {exc}", hint=exc.hint) from exc


def _io_errors(path: Path, text: str | None) -> IoErrors:
    try:
        return IoErrors(text) if text else IoErrors.PAUSE
    except ValueError as exc:
        known = ", ".join(repr(each.value) for each in IoErrors)
        raise ConfigError(f"{path}: 'io-errors' in [disks] must be one of {known}") from exc


def _agent(table: Mapping[str, Any]) -> AgentConfig:
    seconds = {name.replace("-", "_"): float(value) for name, value in table.items() if name != "plaintext"}
    return AgentConfig(plaintext=PlaintextPolicy(table.get("plaintext", "warn")), **seconds)


def _check(path: Path, document: Mapping[str, object]) -> None:
    """Refuse what is misspelt: an option that is silently ignored is a policy that does not hold."""
    for table, content in document.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {table!r} must be a table")
        if table == "key-providers":
            if not all(isinstance(options, dict) for options in content.values()):
                raise ConfigError(f"{path}: [key-providers] holds one table per provider")
            continue
        if table not in _TABLES:
            raise ConfigError(f"{path}: unknown table [{table}]")
        unknown = sorted(set(content) - _TABLES[table])
        if unknown:
            raise ConfigError(f"{path}: unknown option {unknown[0]!r} in [{table}]")
        for option, value in content.items():
            if option == "required":
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise ConfigError(f"{path}: 'required' in [plugins] must be a list of names")
            elif option == "enforce":
                if not isinstance(value, bool):
                    raise ConfigError(f"{path}: 'enforce' in [policy] must be true or false")
            elif option == "limit":
                if type(value) is not int or value < 0:
                    raise ConfigError(f"{path}: 'limit' in [{table}] must be a number")
            elif option == "reconnect-seconds":
                if type(value) is not int or not 0 < value <= _LONGEST_RECONNECT:
                    raise ConfigError(
                        f"{path}: {option!r} in [disks] must be seconds, from 1 to {_LONGEST_RECONNECT}"
                    )
            elif option == "plaintext":
                try:
                    PlaintextPolicy(value)
                except ValueError as exc:
                    known = ", ".join(repr(policy.value) for policy in PlaintextPolicy)
                    raise ConfigError(f"{path}: 'plaintext' in [agent] must be one of {known}") from exc
            elif table == "agent":
                if type(value) not in (int, float) or not 0 < value < math.inf:
                    raise ConfigError(f"{path}: {option!r} in [agent] must be a number of seconds above 0")
            elif not isinstance(value, str):
                raise ConfigError(f"{path}: {option!r} in [{table}] must be a string")
