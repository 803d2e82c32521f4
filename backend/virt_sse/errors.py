"""Every error that virt-sse raises for what is expected to go wrong.

::

    VirtSseError
    ├── ConfigError                  the configuration cannot be read, or names what is not there
    ├── InvalidValueError            a name, size or option that makes no sense
    ├── PluginError                  a plugin is broken; names its culprit
    ├── PolicyError                  a rule refuses the operation
    ├── EncryptionSetNotFoundError
    ├── EncryptionSetExistsError     the name is taken
    ├── EncryptionSetInUseError      disks are in it
    ├── DiskNotFoundError
    ├── DiskExistsError              the name or the path is taken
    ├── DiskStateError               the disk is in a state that does not allow this
    │   └── DiskInUseError           a domain or another command is using it
    ├── VmStateError                 the domain is in a state that does not allow this
    ├── VerificationError            what runs is not what was asked for
    ├── ImageError                   the image file cannot be made, read or written
    │   ├── ImageFormatError         it is not what its format says
    │   └── EnvelopeError            the wrapped DEKs in its header cannot be read
    ├── KeyProviderError
    │   ├── KeyNotFoundError         the provider has no such key or version
    │   ├── KeyDisabledError
    │   ├── KeyDeniedError           the provider refuses this caller
    │   ├── KeyringError             the platform's keyring is missing, damaged or another host's
    │   ├── KeyOperationUnsupportedError
    │   ├── KeyProviderUnavailableError   no answer: says nothing about the key
    │   └── UnwrapError              altered, truncated, or made for another disk
    ├── VaultError                   our own key vault cannot be made, opened, served or administered
    │   ├── CredentialError          a credential file cannot be read, or is none
    │   ├── PrincipalNotFoundError
    │   └── PrincipalExistsError     the name is taken
    ├── AgentError                   the agent cannot serve, or what answers in its place cannot be trusted
    │   └── AgentUnavailableError    no agent answers
    ├── AuditError                   a key use cannot be recorded, or the log is not whole
    ├── StoreError
    ├── StageError                   a process between QEMU and the storage does not start, or has failed
    ├── MonitorError                 a QEMU process refuses what it is told by QMP, or is gone
    ├── LibvirtError
    │   └── LibvirtUnavailableError  no libvirt daemon answers
    ├── ToolError                    qemu-img, cryptsetup, …: missing or failed
    └── LabError                     the lab cannot be set up
        └── LabUnavailableError      the machine lacks something; says what

Library code raises these by meaning and chains the cause; only the edge (CLI, hook) prints. No message and
no attribute of any of them ever holds key material.
"""

from __future__ import annotations

import sys


class VirtSseError(Exception):
    """Base of all expected errors.

    :param message: one line, lowercase, without a full stop.
    :param hint: what the user can do about it, likewise one line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(VirtSseError):
    """The configuration cannot be read, or names something that is not there."""


class InvalidValueError(VirtSseError):
    """A name, size or option that makes no sense."""


class PluginError(VirtSseError):
    """A plugin cannot be loaded or breaks its contract.

    :param plugin: the name of the culprit's entry point.
    """

    def __init__(self, plugin: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"plugin {plugin!r}: {message}", hint=hint)
        self.plugin = plugin


class PolicyError(VirtSseError):
    """A rule, ours or a plugin's, refuses the operation."""


class EncryptionSetNotFoundError(VirtSseError):
    """No disk encryption set of that name or id."""


class EncryptionSetExistsError(VirtSseError):
    """The name of the disk encryption set is taken."""


class EncryptionSetInUseError(VirtSseError):
    """Disks are in the disk encryption set."""


class DiskNotFoundError(VirtSseError):
    """No disk of that name or id."""


class DiskExistsError(VirtSseError):
    """The name or the path is taken."""


class DiskStateError(VirtSseError):
    """The disk is in a state that does not allow the operation."""


class DiskInUseError(DiskStateError):
    """A domain, or another command at this moment, is using the disk."""


class VmStateError(VirtSseError):
    """The domain is in a state that does not allow the operation: it runs, is saved, or is at work on."""


class VerificationError(VirtSseError):
    """What runs, or is defined, is not what was asked for."""


class ImageError(VirtSseError):
    """The image file cannot be made, read or written."""


class ImageFormatError(ImageError):
    """The image is not what its format says, or carries no LUKS header."""


class EnvelopeError(ImageError):
    """The wrapped DEKs in an image's header cannot be read."""


class KeyProviderError(VirtSseError):
    """A key provider refused or failed."""


class KeyNotFoundError(KeyProviderError):
    """The provider has no such key or version (any more)."""


class KeyDisabledError(KeyProviderError):
    """The key exists and is disabled."""


class KeyDeniedError(KeyProviderError):
    """The provider refuses this caller."""


class KeyringError(KeyProviderError):
    """The platform's keyring is missing, damaged, or another host's."""


class KeyOperationUnsupportedError(KeyProviderError):
    """This provider does not do that."""


class KeyProviderUnavailableError(KeyProviderError):
    """The provider does not answer; that says nothing about the key."""


class UnwrapError(KeyProviderError):
    """A wrapped DEK was altered or truncated, or was made for another disk or layer."""


class VaultError(VirtSseError):
    """Our own key vault cannot be made, opened, served or administered."""


class CredentialError(VaultError):
    """A credential file cannot be read or written, is open to others, or is none."""


class PrincipalNotFoundError(VaultError):
    """The vault knows no such principal, or does not show it to this caller."""


class PrincipalExistsError(VaultError):
    """The vault has a principal of that name already."""


class AgentError(VirtSseError):
    """The agent cannot serve, or what answers in its place is not to be trusted."""


class AgentUnavailableError(AgentError):
    """No agent answers on this host, or not in time."""


class AuditError(VirtSseError):
    """A key use cannot be recorded, and is refused; or the audit log cannot be read, or is not whole."""


class StoreError(VirtSseError):
    """The store cannot be opened, migrated or written."""


class StageError(VirtSseError):
    """A process between a guest's QEMU and the storage cannot be started, or has failed."""


class MonitorError(VirtSseError):
    """A QEMU process refuses a QMP command, or is gone."""


class LibvirtError(VirtSseError):
    """A libvirt call failed."""


class LibvirtUnavailableError(LibvirtError):
    """No libvirt daemon answers at the configured URI."""


class ToolError(VirtSseError):
    """An external tool is missing or failed."""


class LabError(VirtSseError):
    """The lab cannot be set up or a guest did not do what it should."""


class LabUnavailableError(LabError):
    """The machine lacks something that the lab needs; the message says what."""


def report(error: VirtSseError) -> None:
    """Print *error*, and its hint if it has one, to the standard error: for the edge alone."""
    print(f"virt-sse: error: {error}", file=sys.stderr)  # noqa: T201 -- this is the edge
    if error.hint:
        print(f"virt-sse: hint: {error.hint}", file=sys.stderr)  # noqa: T201 -- likewise
