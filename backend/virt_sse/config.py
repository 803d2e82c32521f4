"""The configuration of a host: file locations, and the site's choices in ``config.toml``.

``VIRT_SSE_ROOT`` moves all files in /etc, /var/lib, /var/log, /var/cache and /run under a different root.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self
from uuid import UUID

import msgspec

from virt_sse.agent_client import LONGEST_SECONDS, SOCKET, TIMEOUT_SECONDS
from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.model.ceph import CephCluster
from virt_sse.model.ciphers import AES_256_CBC, Cipher
from virt_sse.model.keys import ProviderConfig
from virt_sse.model.layers import Placement
from virt_sse.model.operations import Site
from virt_sse.system.database_url import has_password, sqlite_url
from virt_sse.system.documents import DocumentError, from_toml
from virt_sse.system.guest_library import GuestLibrary
from virt_sse.system.permissions import loose_permission, readable_permission


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
_STORAGE_UIDS = range(2_100_000_000, 2_100_065_536)
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


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one host.

    :ivar root: the folder used in place of ``/``.
    :ivar store_url: SQLAlchemy URL; may include a password, therefore not in the repr.
    :ivar libvirt_uri: connection URI of libvirt.
    :ivar disk_directory: default folder of new images, unless a path or a pool is given.
    :ivar subscription: subscription of the disks on this host.
    :ivar region: region of the disks on this host.
    :ivar encryption_set_limit: maximum number of disk encryption sets per subscription and region; ``None``
        for the limit of the cloud profile.
    :ivar infrastructure_cipher: cipher of the second layer of double encryption.
    :ivar placement: placement of disks whose encryption set has none, and of disks without a set.
    :ivar io_errors: reaction to failed reads and writes of a guest.
    :ivar reconnect_seconds: how long requests of a guest wait for the restart of a failed storage process.
    :ivar retention_days: how long a deleted disk can be recovered; 0: disks are deleted for good.
    :ivar storage_uids: user ids for storage processes, a different id for each process.
    :ivar storage_user: user name or id of all storage processes; for ``None`` see *storage_uids*.
    :ivar stale_images: reaction to an image that is not the last known image of its disk.
    :ivar operator_credential: credential for creating and deleting the sets' identities in a key vault.
    :ivar policy_profile: the built-in tables of the cloud to follow: ``current``, or named for their date.
    :ivar policy_tables: the site's own tables, in place of the built-in ones.
    :ivar enforce_policy: whether the cloud's rules, in part defined by the policy tables, are enforced.
    :ivar required_plugins: entry points that must be loaded before any operation, e.g. a site's policy.
    :ivar ceph: the Ceph cluster whose RBD images are places of disks; ``None``: none.
    :ivar provider_options: tables ``[key-providers.NAME]`` by provider name, unchecked.
    """

    root: Path
    store_url: str = field(repr=False)
    libvirt_uri: str
    disk_directory: Path
    operator_credential: Path
    infrastructure_cipher: Cipher = AES_256_CBC
    placement: Placement = Placement.GUEST
    io_errors: IoErrors = IoErrors.PAUSE
    reconnect_seconds: int = 30
    retention_days: int = 7
    copies_without_tls: bool = False
    storage_uids: range = _STORAGE_UIDS
    storage_user: str | None = None
    stale_images: StaleImages = StaleImages.REFUSE
    subscription: str = "default"
    region: str = "default"
    encryption_set_limit: int | None = None
    policy_profile: str = "current"
    policy_tables: Path | None = None
    enforce_policy: bool = True
    required_plugins: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict, repr=False)
    agent: AgentConfig = field(default_factory=AgentConfig)
    page: PageConfig = field(default_factory=PageConfig)
    ceph: CephCluster | None = None

    @classmethod
    def load(cls, root: Path | None = None) -> Self:
        """Read ``etc/virt-sse/config.toml`` under *root*. The file and all its options are optional.

        :param root: default ``VIRT_SSE_ROOT``, else ``/``.
        :raise ConfigError: When the file cannot be read, or has an unknown table, unknown option or invalid
            value; or when other users may write the file or its folder.
        """
        root = root if root is not None else Path(os.environ.get("VIRT_SSE_ROOT") or "/")
        path = root / "etc/virt-sse/config.toml"
        try:
            text = _read(path)
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cannot read {path}: {exc}") from exc
        try:
            document = from_toml(text.encode(), _Document)
        except DocumentError as exc:
            raise ConfigError(_problem(path, str(exc))) from exc
        if has_password(document.store.url) and (found := readable_permission(path, path.stat())):
            raise ConfigError(f"{found.problem}, and has a password", hint=found.remedy)
        disks, host, sets, policy = document.disks, document.host, document.encryption_sets, document.policy
        return cls(
            root=root,
            store_url=document.store.url or sqlite_url(root / "var/lib/virt-sse/store.sqlite"),
            libvirt_uri=os.environ.get("LIBVIRT_DEFAULT_URI") or document.libvirt.uri or "qemu:///system",
            disk_directory=Path(disks.directory or root / "var/lib/libvirt/images"),
            infrastructure_cipher=_cipher(path, disks.infrastructure_cipher),
            placement=Placement(disks.placement),
            io_errors=IoErrors(disks.io_errors or "pause"),
            reconnect_seconds=disks.reconnect_seconds,
            retention_days=disks.retention_days,
            storage_uids=_uids(path, host.storage_uids),
            storage_user=host.storage_user,
            stale_images=StaleImages(host.stale_images),
            operator_credential=Path(
                sets.operator_credential or root / "etc/virt-sse/identity-operator.json"
            ),
            subscription=host.subscription or "default",
            region=host.region or "default",
            encryption_set_limit=sets.limit,
            policy_profile=policy.profile or "current",
            policy_tables=Path(policy.tables) if policy.tables else None,
            enforce_policy=policy.enforce,
            required_plugins=document.plugins.required,
            provider_options=document.key_providers,
            agent=document.agent,
            page=document.page,
            ceph=_ceph(path, root, document.ceph),
        )

    @property
    def state_directory(self) -> Path:
        """Folder of the store, the keyring and locks; mode 0700."""
        return self.root / "var/lib/virt-sse"

    @property
    def pending_envelopes(self) -> Path:
        """Folder with marks of disks whose store may be newer than the image, after a kill; mode 0700."""
        return self.state_directory / "pending-envelopes"

    @property
    def signing_key(self) -> Path:
        """The key that signs deletion certificates; made at the first use."""
        return self.state_directory / "certificate.key"

    @property
    def pending_resizes(self) -> Path:
        """Folder with marks of disks whose size in the store may be wrong, after a kill; mode 0700."""
        return self.state_directory / "pending-resizes"

    @property
    def image_states(self) -> Path:
        """Folder of the last known states of this host's images; mode 0700."""
        return self.state_directory / "image-states"

    @property
    def image_paths(self) -> Path:
        """File with the paths of the store's images, for the hook script; mode 0600."""
        return self.state_directory / "image-paths"

    @property
    def log_directory(self) -> Path:
        """Folder of the audit log; mode 0700."""
        return self.root / "var/log/virt-sse"

    @property
    def hook_path(self) -> Path:
        """The libvirt qemu hook, installed by ``virt-sse host init``."""
        return self.root / "etc/libvirt/hooks/qemu.d/virt-sse"

    @property
    def guest_library(self) -> GuestLibrary:
        """The XTS library for guests' QEMU processes; may not be installed."""
        return GuestLibrary.of(self.root, self.state_directory)

    @property
    def agent_socket(self) -> Path:
        """The Unix socket of the host's agent."""
        return self.root / SOCKET

    @property
    def page_socket(self) -> Path:
        """The Unix socket of the page; in a folder for root and the configured group."""
        return self.root / "run/virt-sse-page/page.sock"

    @property
    def page_token(self) -> Path:
        """The token of the page's loopback socket; mode 0600."""
        return self.state_directory / "page-token"

    @property
    def temp_disk_directory(self) -> Path:
        """Folder of VMs' temporary disks; open to all users, with a folder per VM private to its QEMU."""
        return self.disk_directory / "temporary-disks"

    @property
    def site(self) -> Site:
        """The host's location and rules, as passed to policies."""
        return Site(
            self.subscription, self.region, self.policy_tables, self.enforce_policy, self.policy_profile
        )

    @property
    def stage_directory(self) -> Path:
        """Folder of records about the processes between QEMU and the storage; mode 0700."""
        return self.root / "run/virt-sse/stages"

    def qemu_pid_file(self, domain: str) -> Path:
        """libvirt's pid file of a domain's QEMU, which QEMU's process has locked."""
        return self.root / f"run/libvirt/qemu/{domain}.pid"

    def domain_status_file(self, domain: str) -> Path:
        """libvirt's file about the state of an active domain."""
        return self.root / f"run/libvirt/qemu/{domain}.xml"

    @property
    def deferred_start_directory(self) -> Path:
        """Notes about domains to be started once libvirtd answers; mode 0700."""
        return self.root / "run/virt-sse/deferred-starts"

    @property
    def incoming_directory(self) -> Path:
        """Folder of notes about domains that are about to migrate to this host; mode 0700."""
        return self.root / "run/virt-sse/incoming-domains"

    @property
    def paused_domains(self) -> Path:
        """Folder with marks of domains paused for a moment by a command that may be killed; mode 0700."""
        return self.root / "run/virt-sse/paused-domains"

    @property
    def saved_states(self) -> Path:
        """Folder of records about saved states of domains; mode 0700."""
        return self.state_directory / "saved-states"

    @property
    def new_domains(self) -> Path:
        """Folder of records about domains that are being made; mode 0700."""
        return self.state_directory / "new-domains"

    @property
    def memory_directory(self) -> Path:
        """Folder of FIFOs for the memory of domains that are being saved or restored; mode 0700."""
        return self.root / "run/virt-sse/memory"

    @property
    def socket_directory(self) -> Path:
        """Folder of stage sockets; open to all users, with a folder per socket private to its two sides."""
        return self.root / "run/virt-sse-disks"

    @property
    def cache_directory(self) -> Path:
        """Folder of host caches, unnamed files; a folder per disk, private to the user of its cache."""
        return self.root / "var/cache/virt-sse"

    @property
    def identity_directory(self) -> Path:
        """Folder of credentials of the disk encryption sets' identities; mode 0700."""
        return self.state_directory / "identities"

    def identity(self, set_id: UUID) -> Path:
        """Path of the credential of a disk encryption set's identity; may not exist."""
        return self.identity_directory / f"{set_id}.json"

    def key_provider(self, name: str, set_id: UUID | None = None) -> ProviderConfig:
        """Configuration of the provider *name*, for use by a disk encryption set or by the host itself."""
        identity = self.identity(set_id) if set_id else None
        return ProviderConfig(self.state_directory / name, self.provider_options.get(name, {}), identity)


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


def _cipher(path: Path, text: str) -> Cipher:
    try:
        return Cipher.parse(text) if text else AES_256_CBC
    except InvalidValueError as exc:
        raise ConfigError(f"{path}: 'infrastructure-cipher' in [disks]: {exc}", hint=exc.hint) from exc


def _uids(path: Path, text: str) -> range:
    """The user ids of *text*, ``FIRST-LAST``; without root and ``(uid_t) -1``."""
    if not text:
        return _STORAGE_UIDS
    match = _UIDS.fullmatch(text)
    if not match or not 0 < int(match[1]) <= int(match[2]) < 2**32 - 1:
        raise ConfigError(
            f"{path}: 'storage-uids' in [host] must be FIRST-LAST, from 1 to {2**32 - 2}, not {text[:80]!r}"
        )
    return range(int(match[1]), int(match[2]) + 1)


def _ceph(path: Path, root: Path, table: _Ceph) -> CephCluster | None:
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


class _Document(_Table, frozen=True):
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
    for table in msgspec.structs.fields(_Document):
        if isinstance(table.type, type) and issubclass(table.type, _Table):
            for option in msgspec.structs.fields(table.type):
                (meta,) = getattr(option.type, "__metadata__", (_STRING,))
                found[table.encode_name, option.encode_name] = str(meta.description)
    return found
