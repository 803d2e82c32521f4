"""Keys, credentials and certificates of the host, and its membership among the hosts of a shared store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509

from virt_sse.errors import HostKeyError, VirtSseError
from virt_sse.host.fault import HostFault, Severity
from virt_sse.keys.host import Host
from virt_sse.model.disks import PLATFORM_KEY, Disk

_SOON = timedelta(days=30)
_LARGEST = 1 << 20


def keyring(host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without the keyring, no disk under the platform key can be opened."""
    provider = host.plugins.key_provider(PLATFORM_KEY.provider)
    is_used = any(e.wrapped.key.provider == PLATFORM_KEY.provider for disk in disks for e in disk.deks)
    try:
        provider.current_key(PLATFORM_KEY.name)
    except VirtSseError as exc:
        remedy = "restore the keyring from a backup" if is_used else "virt-sse host init"
        yield HostFault("keyring-unusable", "keyring", str(exc), exc.hint or remedy)


def host_key(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without the host key, no image's seal can be verified."""
    key = host.freshness.host_key
    try:
        is_there = key.load() is not None
    except HostKeyError as exc:
        yield HostFault(
            "host-key-unusable", "host key", str(exc), exc.hint or "restore the file from a backup"
        )
        return
    if not is_there:
        problem, remedy = f"the host key {key.path} is missing", "restore the file, or virt-sse host init"
        yield HostFault("host-key-unusable", "host key", problem, remedy)


def certificates(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Expired credentials and certificates of vaults: no key of these vaults can be used."""
    config = host.config
    options = [value for table in config.provider_options.values() for value in table.values()]
    named = [Path(value) for value in options if isinstance(value, str) and value.startswith("/")]
    home = (config.state_directory / "vault").glob("*.pem")
    credentials = [config.operator_credential, *config.identity_directory.glob("*.json")]
    for path in sorted({*named, *home, *credentials}):
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST:
                continue
            content = path.read_bytes()
        except OSError as exc:
            problem = f"cannot read {path}: {exc.strerror}"
            yield HostFault("credential-unreadable", "credential", problem, "restore the file")
            continue
        for what, end in _ends(content):
            if found := _expiry(path, what, end):
                yield found


def _ends(content: bytes) -> Iterator[tuple[str, datetime]]:
    """The certificates and credentials in a file, each with the end of its validity."""
    try:
        document = msgspec.json.decode(content)
    except msgspec.DecodeError:
        document = None
    if isinstance(document, Mapping):
        if isinstance(expires := document.get("expires"), int):
            yield "credential", datetime.fromtimestamp(expires, UTC)
        content = str(document.get("ca_certificate", "")).encode()
    if b"-----BEGIN CERTIFICATE-----" in content:
        try:
            found = x509.load_pem_x509_certificates(content)
        except ValueError:
            return  # the key provider reports a damaged file
        for certificate in found:
            yield "certificate", certificate.not_valid_after_utc


def _expiry(path: Path, what: str, end: datetime) -> HostFault | None:
    now = datetime.now(UTC)
    if end - now > _SOON:
        return None
    has_ended = end <= now
    problem = f"the {what} in {path} {'expired' if has_ended else 'expires'} on {end:%Y-%m-%d}"
    return HostFault(
        f"{what}-expired" if has_ended else f"{what}-expires",
        what,
        problem,
        f"renew the {what} at the vault, and replace {path}",
        Severity.ERROR if has_ended else Severity.WARNING,
    )


def lease(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """A fenced host starts no domains: other hosts may use its disks."""
    if not host.leases.are_shared:
        return
    for each in host.leases.hosts():
        if each.id == host.leases.identity.id and each.is_fenced:
            problem = f"host {each.name!r} was fenced: other hosts may use its disks"
            yield HostFault("host-fenced", "leases", problem, "restart this machine")
