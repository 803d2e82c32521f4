"""``virt-sse key``: administration of the keys in a key vault.

Uses Azure's client library, and so works with Azure Key Vault and the embedded vault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.key_effects import what_stops
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows
from virt_sse.cli.private_key import read_private_key
from virt_sse.cli.session import plugins
from virt_sse.cli.vault_options import Credential, credential_path
from virt_sse.errors import InvalidValueError, VaultError

if TYPE_CHECKING:
    from azure.keyvault.keys import KeyClient, KeyProperties, KeyVaultKey

app = typer.Typer(rich_markup_mode=None)

_PROVIDER = "customer-managed"
"""The key provider of disks under a vault's key."""

KeyName = Annotated[
    str, typer.Argument(metavar="NAME", help="The key's name in the vault.", show_default=False)
]
Version = Annotated[str | None, typer.Option("--version", help="Default: the newest.", show_default=False)]
Size = Annotated[int, typer.Option("--size", help="2048, 3072 or 4096 bits.")]
Protection = Annotated[
    str, typer.Option("--protection", help="software, or hsm: in the HSM of a premium vault.")
]
Hardware = Annotated[bool, typer.Option("--hsm", help="The same as --protection hsm.")]
NotBefore = Annotated[
    datetime | None,
    typer.Option("--not-before", help="Start of the period for wrapping; UTC.", show_default=False),
]
Expires = Annotated[
    datetime | None,
    typer.Option(
        "--expires", help="End of the period for wrapping; unwrapping still works. UTC.", show_default=False
    ),
]


@app.command()
def create(
    name: KeyName,
    size: Size = 3072,
    protection: Protection = "software",
    hsm: Hardware = False,
    not_before: NotBefore = None,
    expires: Expires = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create an RSA key in a vault, or a new version of an existing key."""
    in_hsm = _in_hsm(protection, hsm=hsm)
    with _client(credential) as client:
        made = client.create_rsa_key(
            name, size=size, hardware_protected=in_hsm, not_before=not_before, expires_on=expires
        )
        print_fields(_fields(made), output)


@app.command(name="import")
def import_(
    name: KeyName,
    file: Annotated[Path, typer.Argument(help="An RSA private key, PEM, not encrypted.", show_default=False)],
    protection: Protection = "software",
    hsm: Hardware = False,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Import an RSA key into a vault. The vault does not export keys."""
    key, in_hsm = _web_key(file), _in_hsm(protection, hsm=hsm)
    with _client(credential) as client:
        print_fields(_fields(client.import_key(name, key, hardware_protected=in_hsm)), output)


@app.command()
def show(
    name: KeyName, version: Version = None, credential: Credential = None, output: Output = OutputFormat.TABLE
) -> None:
    """Show a key in a vault."""
    with _client(credential) as client:
        print_fields(_fields(client.get_key(name, version)), output)


@app.command(name="list")
def list_(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the keys in a vault."""
    with _client(credential) as client:
        rows = [
            _properties(each) | {"type": _type(client, each.name or "")}
            for each in client.list_properties_of_keys()
        ]
    print_rows(rows, ("name", "type", "enabled", "not-before", "expires", "url"), output)


@app.command()
def versions(name: KeyName, credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the versions of a key in a vault, oldest first."""
    with _client(credential) as client:
        found = sorted(client.list_properties_of_key_versions(name), key=lambda each: str(each.created_on))
        rows = [_properties(each) for each in found]
    print_rows(rows, ("version", "enabled", "created", "expires"), output)


@app.command(cls=DestructiveCommand)
def disable(name: KeyName, version: Version = None, credential: Credential = None) -> None:
    """Disable a key's version: every use is refused, unwrapping included."""
    with _client(credential) as client:

        def plan() -> list[str]:
            found = client.get_key(name, version)
            return [f"disable key {found.id}", *_what_stops(found.id, found.properties.version)]

        confirm(plan)
        _enable(client, name, version, enabled=False)


@app.command()
def enable(name: KeyName, version: Version = None, credential: Credential = None) -> None:
    """Enable a disabled version of a key."""
    with _client(credential) as client:
        _enable(client, name, version, enabled=True)


@app.command(cls=DestructiveCommand)
def delete(name: KeyName, credential: Credential = None) -> None:
    """Delete a key with all versions; recoverable until the key is purged."""
    with _client(credential) as client:
        confirm(lambda: [f"delete key {name}", *_what_stops(client.get_key(name).id, None)])
        deleted = client.begin_delete_key(name).result()
    note(f"deleted key {name}; it will be purged on {deleted.scheduled_purge_date:%Y-%m-%d}")


@app.command()
def recover(name: KeyName, credential: Credential = None) -> None:
    """Recover a deleted key."""
    with _client(credential) as client:
        client.begin_recover_deleted_key(name).wait()
    note(f"recovered key {name}")


@app.command(cls=DestructiveCommand)
def purge(name: KeyName, credential: Credential = None) -> None:
    """Destroy a deleted key irrecoverably, and so all data wrapped with the key."""
    with _client(credential) as client:
        deleted = client.get_deleted_key(name)
        confirm(
            lambda: [
                f"purge key {name} ({deleted.recovery_id}), and lose all data wrapped with the key",
                *_what_stops(deleted.id, None),
            ]
        )
        client.purge_deleted_key(name)
    typer.echo(f"purged key {name} ({deleted.recovery_id})")


@app.command(name="rotation-policy")
def rotation_policy(
    name: KeyName,
    every: Annotated[
        str | None,
        typer.Option("--every", help="Rotate a version at this age; ISO 8601, e.g. P90D."),
    ] = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show or set a key's policy for automatic rotation."""
    with _client(credential) as client:
        if every is not None:
            from azure.keyvault.keys import (
                KeyRotationLifetimeAction,
                KeyRotationPolicy,
                KeyRotationPolicyAction,
            )

            action = KeyRotationLifetimeAction(KeyRotationPolicyAction.rotate, time_after_create=every)
            client.update_key_rotation_policy(name, KeyRotationPolicy(), lifetime_actions=[action])
        policy = client.get_key_rotation_policy(name)
    rows: list[dict[str, object]] = [
        {
            "action": str(getattr(each.action, "value", each.action)),
            "after-creation": each.time_after_create,
            "before-expiry": each.time_before_expiry,
        }
        for each in policy.lifetime_actions or []
    ]
    print_rows(rows, ("action", "after-creation", "before-expiry"), output)


def rotate(name: str, credential: Path | None) -> str:
    """Make a new version of a key in a vault, and return its URL."""
    with _client(credential) as client:
        return str(client.rotate_key(name).id)


def _what_stops(key: str | None, version: str | None) -> list[str]:
    """What would stop on this host without a key of the vault.

    :param key: the key's URL.
    :param version: ``None``: all versions.
    """
    url, _ = plugins().parse_key(_PROVIDER, str(key))
    return what_stops(
        lambda used: (used.provider, used.name) == (_PROVIDER, url) and version in (None, used.version)
    )


def _enable(client: KeyClient, name: str, version: str | None, *, enabled: bool) -> None:
    changed = client.update_key_properties(name, version, enabled=enabled)
    note(f"{'enabled' if enabled else 'disabled'} key {changed.id}")


@contextlib.contextmanager
def _client(credential: Path | None) -> Iterator[KeyClient]:
    """Open a client of the credential file's vault; Azure's exceptions become virt-sse's exceptions."""
    from azure.core.exceptions import AzureError, HttpResponseError
    from azure.keyvault.keys import KeyClient

    from virt_sse.vault_client.credential import VaultCredential
    from virt_sse.vault_client.failures import failure_reason

    identity = VaultCredential(credential_path(credential))
    try:
        with KeyClient(
            identity.file.vault_url,
            identity,
            connection_verify=identity.ca_file(),
            verify_challenge_resource=False,
            use_env_settings=False,
            retry_total=1,
            connection_timeout=5,
            read_timeout=30,
        ) as client:
            yield client
    except HttpResponseError as exc:
        raise VaultError(f"the key vault refused ({exc.status_code}): {_reason(exc)}") from exc
    except AzureError as exc:
        raise VaultError(
            f"the key vault {identity.file.vault_url} does not answer: {failure_reason(exc)}"
        ) from exc
    except ValueError as exc:
        raise InvalidValueError(str(exc)) from exc
    finally:
        identity.close()


def _in_hsm(protection: str, *, hsm: bool) -> bool:
    """Check whether the options ask for a key in an HSM.

    :raise InvalidValueError: When *protection* is unknown.
    """
    if protection not in ("software", "hsm"):
        raise InvalidValueError(f"invalid protection {protection!r}: choose software or hsm")
    return hsm or protection == "hsm"


def _type(client: KeyClient, name: str) -> str | None:
    """Fetch a key's type, which listings lack; ``None`` if the caller may not get the key."""
    from azure.core.exceptions import HttpResponseError

    try:
        return _key_type(client.get_key(name))
    except HttpResponseError as exc:
        if exc.status_code in (403, 404):  # 404: deleted meanwhile
            return None
        raise


def _key_type(key: KeyVaultKey) -> str:
    return str(getattr(key.key_type, "value", key.key_type))


def _reason(exc: Any) -> str:
    """Return the vault's own message."""
    return str(exc.error.message if exc.error else exc.message).splitlines()[0]


def _web_key(file: Path) -> Any:
    """Read the private key in *file* into the client library's type.

    :raise InvalidValueError: When the file has no RSA private key, or an encrypted key.
    """
    from azure.keyvault.keys import JsonWebKey, KeyType

    key = read_private_key(file)
    private, public = key.private_numbers(), key.public_key().public_numbers()
    numbers = {
        "n": public.n,
        "e": public.e,
        "d": private.d,
        "p": private.p,
        "q": private.q,
        "dp": private.dmp1,
        "dq": private.dmq1,
        "qi": private.iqmp,
    }
    parts = {name: number.to_bytes((number.bit_length() + 7) // 8, "big") for name, number in numbers.items()}
    return JsonWebKey(kty=KeyType.rsa, **parts)


def _fields(key: KeyVaultKey) -> dict[str, object]:
    modulus = getattr(key.key, "n", b"") or b""
    return _properties(key.properties) | {
        "type": _key_type(key),
        "bits": 8 * len(modulus),
    }


def _properties(properties: KeyProperties) -> dict[str, object]:
    return {
        "name": properties.name,
        "url": properties.id,
        "version": properties.version,
        "enabled": properties.enabled,
        "created": _time(properties.created_on),
        "not-before": _time(properties.not_before),
        "expires": _time(properties.expires_on),
    }


def _time(time: datetime | None) -> str | None:
    return time.isoformat() if time else None
