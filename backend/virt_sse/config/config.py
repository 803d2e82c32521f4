"""The configuration of a host: file locations, and the site's choices in ``config.toml``.

``VIRT_SSE_ROOT`` moves all files in /etc, /var/lib, /var/log, /var/cache and /run under a different root.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from uuid import UUID

from virt_sse.agent_client import SOCKET
from virt_sse.config.file import (
    STORAGE_UIDS,
    AgentConfig,
    Document,
    IoErrors,
    PageConfig,
    StaleImages,
    parse_cipher,
    parse_cluster,
    parse_uids,
)
from virt_sse.errors import ConfigError
from virt_sse.model.ceph import CephCluster
from virt_sse.model.ciphers import AES_256_CBC, Cipher
from virt_sse.model.keys import ProviderConfig
from virt_sse.model.layers import Placement
from virt_sse.model.operations import Site
from virt_sse.system.database_url import has_password, sqlite_url
from virt_sse.system.guest_library import GuestLibrary
from virt_sse.system.permissions import readable_permission


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
    :ivar copies_without_tls: whether other hosts may send the contents of disks in plaintext.
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
    storage_uids: range = STORAGE_UIDS
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
        document = Document.read(path)
        if has_password(document.store.url) and (found := readable_permission(path, path.stat())):
            raise ConfigError(f"{found.problem}, and has a password", hint=found.remedy)
        disks, host, sets, policy = document.disks, document.host, document.encryption_sets, document.policy
        return cls(
            root=root,
            store_url=document.store.url or sqlite_url(root / "var/lib/virt-sse/store.sqlite"),
            libvirt_uri=os.environ.get("LIBVIRT_DEFAULT_URI") or document.libvirt.uri or "qemu:///system",
            disk_directory=Path(disks.directory or root / "var/lib/libvirt/images"),
            infrastructure_cipher=parse_cipher(path, disks.infrastructure_cipher),
            placement=Placement(disks.placement),
            io_errors=IoErrors(disks.io_errors or "pause"),
            copies_without_tls=document.libvirt.copies_without_tls,
            reconnect_seconds=disks.reconnect_seconds,
            retention_days=disks.retention_days,
            storage_uids=parse_uids(path, host.storage_uids),
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
            ceph=parse_cluster(path, root, document.ceph),
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
