"""The tree of expected errors.

::

    VirtSseError
    ├── ConfigError                  the configuration is unreadable or invalid, or names a missing object
    ├── InvalidValueError            an invalid name, size or option
    ├── PluginError                  a plugin is broken; names the plugin
    ├── PolicyError                  a rule refuses the operation
    ├── EncryptionSetNotFoundError
    ├── EncryptionSetExistsError     the name is taken
    ├── EncryptionSetInUseError      the set contains disks
    ├── ScaleSetNotFoundError
    ├── ScaleSetExistsError          the name is taken
    ├── DiskNotFoundError
    ├── DiskExistsError              the name or the path is taken
    ├── DiskStateError               the disk's state does not allow the operation
    │   └── DiskInUseError           a domain or another command is using the disk
    ├── CopyEndedError               a copy into a new disk has ended without an outcome
    │   ├── CopyCancelledError       on request: the copy is undone
    │   └── CopyInterruptedError     this process stops: another process goes on with the copy
    ├── VmStateError                 the domain's state does not allow the operation
    ├── VerificationError            a domain differs from its specification
    ├── ImageError                   the image file cannot be made, read or written
    │   ├── ImageFormatError         the image is malformed for its format
    │   │   └── OtherFileError       the image refers to another file
    │   └── EnvelopeError            the wrapped DEKs in its header cannot be read
    ├── CephError                    the Ceph cluster does not answer, or refuses
    ├── KeyProviderError
    │   ├── KeyNotFoundError         the provider has no such key or version
    │   ├── KeyDisabledError
    │   ├── KeyDeniedError           the provider refuses this caller
    │   ├── KeyringError             the platform's keyring is missing, damaged or from a different host
    │   ├── KeyOperationUnsupportedError
    │   ├── KeyProviderUnavailableError   no answer: the state of the key is unknown
    │   └── UnwrapError              the wrapped DEK is altered, truncated, or bound to a different disk
    ├── VaultError                   virt-sse's own key vault cannot be made, opened, served or administered
    │   ├── CredentialError          a credential file cannot be read, or is invalid
    │   ├── PrincipalNotFoundError
    │   └── PrincipalExistsError     the name is taken
    ├── AgentError                   the agent cannot serve, or an untrusted process answers in its place
    │   └── AgentUnavailableError    no agent answers
    ├── AuditError                   a key use cannot be recorded, or the audit log is damaged
    ├── CertificateError             a deletion certificate is missing, malformed or altered
    ├── HostNotFoundError            no host has the name or id
    ├── HostFencedError              this host was fenced, and may not use shared disks until a restart
    ├── StoreError                   the store's database cannot be opened, migrated, read or written
    │   ├── StoreUnavailableError    the database server does not answer, or refuses the connection
    │   ├── StoreReadOnlyError       the database accepts no changes: a standby, a read-only file
    │   └── StoreMovedError          the store has moved to another database
    ├── OutputError                  standard output cannot be written: a full disk, a closed descriptor
    ├── StageError                   a process between QEMU and the storage does not start, or has failed
    ├── MonitorError                 a QEMU process refuses a QMP command, or has ended
    │   └── MonitorSilentError       no process answers at a monitor's socket
    ├── LibvirtError
    │   └── LibvirtUnavailableError  no libvirt daemon answers
    │       └── LibvirtSilentError   a libvirt daemon accepts connections and does not answer
    ├── ToolError                    qemu-img, cryptsetup, …: missing or failed
    └── LabError                     the lab cannot be set up
        └── LabUnavailableError      the machine lacks a requirement, named in the message

Library code raises the class that fits the failure and chains the cause; only the edge (CLI, hook) prints. No
message and no attribute of an error ever contains key material.
"""

from __future__ import annotations

import contextlib
import sys


class VirtSseError(Exception):
    """Base of all expected errors.

    :param message: one line, lowercase, without a full stop.
    :param hint: remedy for the user, on a line of the same style.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(VirtSseError):
    """The configuration is unreadable or invalid, or names a missing object."""


class InvalidValueError(VirtSseError):
    """An invalid name, size or option."""


class PluginError(VirtSseError):
    """A plugin cannot be loaded or breaks its contract.

    :param plugin: the name of the plugin's entry point.
    """

    def __init__(self, plugin: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"plugin {plugin!r}: {message}", hint=hint)
        self.plugin = plugin


class PolicyError(VirtSseError):
    """A rule of virt-sse or of a plugin refuses the operation."""


class EncryptionSetNotFoundError(VirtSseError):
    """No disk encryption set has the given name or id."""


class EncryptionSetExistsError(VirtSseError):
    """The name of the disk encryption set is taken."""


class EncryptionSetInUseError(VirtSseError):
    """The disk encryption set contains disks."""


class ScaleSetNotFoundError(VirtSseError):
    """No scale set has the given name."""


class ScaleSetExistsError(VirtSseError):
    """The name of the scale set is taken."""


class DiskNotFoundError(VirtSseError):
    """No disk has the given name or id."""


class DiskExistsError(VirtSseError):
    """The name or the path is taken."""


class DiskStateError(VirtSseError):
    """The disk's state does not allow the operation."""


class DiskInUseError(DiskStateError):
    """A domain, or another command at this moment, is using the disk."""


class CopyEndedError(VirtSseError):
    """A copy into a new disk has ended in this process without an outcome."""


class CopyCancelledError(CopyEndedError):
    """The copy is undone on request; the source is as before."""


class CopyInterruptedError(CopyEndedError):
    """This process stops, and another process goes on with the copy."""


class VmStateError(VirtSseError):
    """The domain's state does not allow the operation: running, saved, or in use by another command."""


class VerificationError(VirtSseError):
    """A running or defined domain differs from its specification."""


class ImageError(VirtSseError):
    """The image file cannot be made, read or written."""


class ImageFormatError(ImageError):
    """The image is malformed for its format, or lacks a LUKS header."""


class OtherFileError(ImageFormatError):
    """An image cannot be read without another file, e.g. an external data file or an extent.

    :ivar name: the other file, as named by the image.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the image refers to another file, {name}")
        self.name = name


class EnvelopeError(ImageError):
    """The wrapped DEKs in an image's header cannot be read."""


class StaleImageError(ImageError):
    """The image is older than the last known, or was not sealed by this host."""


class HostKeyError(VirtSseError):
    """The host key, or the record of an image's last known state, cannot be read or written."""


class CephError(VirtSseError):
    """The Ceph cluster does not answer, or refuses: the state of its images is unknown."""


class KeyProviderError(VirtSseError):
    """A key provider refused or failed."""


class KeyNotFoundError(KeyProviderError):
    """The provider has no such key or version (any more)."""


class KeyDisabledError(KeyProviderError):
    """The key exists and is disabled."""


class KeyDeniedError(KeyProviderError):
    """The provider refuses this caller."""


class KeyringError(KeyProviderError):
    """The platform's keyring is missing, damaged, or from a different host."""


class KeyOperationUnsupportedError(KeyProviderError):
    """The provider does not support the operation."""


class KeyProviderUnavailableError(KeyProviderError):
    """The provider does not answer; the state of the key is unknown."""


class UnwrapError(KeyProviderError):
    """A wrapped DEK is altered, truncated, or bound to a different disk or layer."""


class VaultError(VirtSseError):
    """virt-sse's own key vault cannot be made, opened, served or administered."""


class CredentialError(VaultError):
    """A credential file cannot be read or written, is accessible to other users, or is invalid."""


class PrincipalNotFoundError(VaultError):
    """The vault has no such principal, or hides the principal from this caller."""


class PrincipalExistsError(VaultError):
    """The vault already has a principal with the given name."""


class AgentError(VirtSseError):
    """The agent cannot serve, or an untrusted process answers in its place."""


class AgentUnavailableError(AgentError):
    """No agent answers on this host, or not in time."""


class AuditError(VirtSseError):
    """A key use cannot be recorded and is therefore refused, or the audit log is unreadable or damaged."""


class CertificateError(VirtSseError):
    """A deletion certificate is missing, malformed, altered, or signed with another key."""


class HostNotFoundError(VirtSseError):
    """No host, or more than one host, has the given name or id."""


class HostFencedError(VirtSseError):
    """This host was fenced: other hosts may use its disks. The machine must be restarted."""


class StoreError(VirtSseError):
    """The store cannot be opened, migrated, read or written."""


class StoreUnavailableError(StoreError):
    """The database server does not answer, refuses the connection, or has closed the connection."""


class StoreReadOnlyError(StoreError):
    """The database accepts no changes: a standby server, a read-only primary, a read-only file."""


class StoreMovedError(StoreError):
    """The store has moved to another database."""


class OutputError(VirtSseError):
    """Standard output cannot be written: a full disk, or a closed descriptor."""


class StageError(VirtSseError):
    """A process between a guest's QEMU and the storage cannot be started, or has failed."""


class MonitorError(VirtSseError):
    """A QEMU process refuses a QMP command, or has ended."""


class MonitorSilentError(MonitorError):
    """No QEMU process answers at the monitor's socket, or the process ends before its greeting."""


class LibvirtError(VirtSseError):
    """A libvirt call failed."""


class LibvirtUnavailableError(LibvirtError):
    """No libvirt daemon answers at the configured URI."""


class LibvirtSilentError(LibvirtUnavailableError):
    """libvirt accepts connections and does not answer."""


class ToolError(VirtSseError):
    """An external tool is missing or failed."""


class LabError(VirtSseError):
    """The lab cannot be set up, or a guest failed."""


class LabUnavailableError(LabError):
    """The machine lacks a requirement of the lab, named in the message."""


def printable(text: str) -> str:
    """*text* with control characters and lone surrogates escaped: images and servers wrote a part of it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report(error: VirtSseError) -> None:
    """Print *error* and its hint, if any, to standard error. For use by the edge only."""
    with contextlib.suppress(OSError):  # no other place is left to report to
        print(f"virt-sse: error: {printable(str(error))}", file=sys.stderr)  # noqa: T201 -- this is the edge
        if error.hint:
            print(f"virt-sse: hint: {printable(error.hint)}", file=sys.stderr)  # noqa: T201 -- likewise
