"""The names that plugins import: the stable surface of virt-sse.

Plugins import from this module. They may also import :mod:`virt_sse.pkcs11` (for PKCS#11 tokens) and
:mod:`virt_sse.vault_client` (for vaults). The functions of a plugin's commands may import
:mod:`virt_sse.cli.output` and :mod:`virt_sse.cli.session`. All other modules may change in any version.
"""

from __future__ import annotations

from virt_sse.errors import (
    ConfigError,
    InvalidValueError,
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderError,
    KeyProviderUnavailableError,
    KeyringError,
    PolicyError,
    UnwrapError,
    VirtSseError,
)
from virt_sse.hookspecs import RegisterEncryptionLayer, RegisterKeyProvider, hookimpl
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.cloud import CloudProfile, DriverOptions, size_version
from virt_sse.model.content import Content, EncryptionKind, Finding, described
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskSku, DiskState
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.events import KeyAction, KeyEvent, current_correlation
from virt_sse.model.keys import (
    Dek,
    DekContext,
    KeyId,
    KeyProvider,
    KeyRef,
    KeyState,
    ProviderConfig,
    WrappedDek,
)
from virt_sse.model.layers import (
    DekSpec,
    EncryptionLayer,
    EncryptionType,
    GuestNode,
    HostCache,
    HostCaching,
    HostLayer,
    LayerChoice,
    LayerPlan,
    Placement,
    StorageNode,
)
from virt_sse.model.operations import (
    AttachDisk,
    CreateDisk,
    CreateEncryptionSet,
    DeleteDisk,
    ExportDisk,
    MoveDisk,
    Operation,
    ResizeDisk,
    Site,
    StartVm,
    UnlockDisk,
    UpdateVm,
)
from virt_sse.model.vms import VmProperties
from virt_sse.system.documents import DocumentError, from_json, from_toml
from virt_sse.system.files import PRIVATE_FILE, PRIVATE_FOLDER, private_folder, sync_folder, write_private

__all__ = [
    "AES_256_XTS",
    "PLATFORM_KEY",
    "PRIVATE_FILE",
    "PRIVATE_FOLDER",
    "AttachDisk",
    "Cipher",
    "CloudProfile",
    "ConfigError",
    "Content",
    "CreateDisk",
    "CreateEncryptionSet",
    "Dek",
    "DekContext",
    "DekSpec",
    "DeleteDisk",
    "Disk",
    "DiskFormat",
    "DiskKind",
    "DiskSku",
    "DiskState",
    "DocumentError",
    "DriverOptions",
    "EncryptionKind",
    "EncryptionLayer",
    "EncryptionSet",
    "EncryptionType",
    "ExportDisk",
    "Finding",
    "GuestNode",
    "HostCache",
    "HostCaching",
    "HostLayer",
    "InvalidValueError",
    "KeyAction",
    "KeyDeniedError",
    "KeyDisabledError",
    "KeyEvent",
    "KeyId",
    "KeyNotFoundError",
    "KeyOperationUnsupportedError",
    "KeyProvider",
    "KeyProviderError",
    "KeyProviderUnavailableError",
    "KeyRef",
    "KeyState",
    "KeyringError",
    "LayerChoice",
    "LayerPlan",
    "MoveDisk",
    "Operation",
    "Placement",
    "PolicyError",
    "ProviderConfig",
    "RegisterEncryptionLayer",
    "RegisterKeyProvider",
    "ResizeDisk",
    "RevocationAction",
    "Site",
    "StartVm",
    "StorageNode",
    "UnlockDisk",
    "UnwrapError",
    "UpdateVm",
    "VirtSseError",
    "VmProperties",
    "WrappedDek",
    "current_correlation",
    "described",
    "from_json",
    "from_toml",
    "hookimpl",
    "private_folder",
    "size_version",
    "sync_folder",
    "write_private",
]
