"""Creating a vault."""

from __future__ import annotations

import contextlib
import secrets
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from virt_sse.errors import InvalidValueError, VaultError
from virt_sse.system.files import sync_folder, write_private
from virt_sse.vault.home.certificates import new_authority, new_server_certificate
from virt_sse.vault.home.database import Database, failures_named
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.sealing import ROOT_KEY_BYTES, TOKENS, VaultRootKey
from virt_sse.vault.home.settings import DEFAULT_PORT, RETENTION_DAYS, Tier, VaultSettings, url_of
from virt_sse.vault.hsm.access import prepare_hsm, require_shared
from virt_sse.vault.hsm.sealed_root import SealingKey
from virt_sse.vault.identity.principals import Principals
from virt_sse.vault.identity.tokens import new_signing_key, remove_vault
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.root_key import has_root_key, read_root_key, write_sealed
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key
from virt_sse.vault_client.permissions import ADMINISTRATION, Role

DEFAULT_HOSTS = ("localhost", "127.0.0.1")
FIRST_ADMINISTRATOR = "administrator"


def initialise(
    path: Path,
    *,
    name: str = "vault",
    hosts: Sequence[str] = DEFAULT_HOSTS,
    port: int = DEFAULT_PORT,
    audience: str | None = None,
    tier: Tier = Tier.STANDARD,
    tenant: str | None = None,
    retention_days: int = RETENTION_DAYS[-1],
    purge_protection: bool = False,
    hsm: Mapping[str, str] | None = None,
    database: str | None = None,
    sealed_by: SealingKey | None = None,
    new_key: bool = False,
) -> VaultDirectory:
    """Create a vault in the folder *path*, with the credential file of its first administrator.

    The administrator has all permissions except the use of keys, which needs a grant.

    :param hosts: names and addresses of the server; the first is part of the vault's URL.
    :param audience: parent domain of the first host, for Azure's stock clients: they accept a challenge only
        for a parent domain of the vault's name. By default the vault's URL, which they refuse.
    :param tenant: a UUID; by default a new UUID.
    :param hsm: the HSM token of a premium vault, as in :class:`~virt_sse.pkcs11.options.TokenOptions`; by
        default a new SoftHSM token in the vault's folder.
    :param database: SQLAlchemy URL of an empty database in PostgreSQL; by default SQLite in the folder.
    :param sealed_by: a key in a PKCS#11 token that seals the root key, which then never is on a disk in the
        clear.
    :param new_key: make this key in the token.
    :raise VaultError: When the folder or the database has a vault already, or cannot be written.
    :raise InvalidValueError: When a value is invalid.
    :raise ConfigError: When software for the HSM token is not installed, or the PIN cannot be read.
    :raise KeyProviderUnavailableError: When the HSM token does not answer or rejects the PIN.
    """
    if hsm and tier is Tier.STANDARD:
        raise InvalidValueError("a standard vault has no HSM", hint="pass --tier premium")
    settings = VaultSettings(
        name=name,
        tenant=tenant or str(uuid.uuid4()),
        tier=tier,
        url=url_of(hosts[0], port) if hosts else "",
        audience=url_of(_parent_domain(audience, hosts[0]) if audience else hosts[0], port) if hosts else "",
        hosts=tuple(hosts),
        retention_days=retention_days,
        purge_protection=purge_protection,
        database=database,
    )
    if tier is Tier.PREMIUM:
        require_shared(settings, hsm or {})
    directory = VaultDirectory(path)
    try:
        with directory.making():
            _clear(directory)
            if tier is Tier.PREMIUM:
                prepared = prepare_hsm(directory, hsm or {})
                settings = msgspec.structs.replace(settings, hsm=prepared)
            root = VaultRootKey(secrets.token_bytes(ROOT_KEY_BYTES), settings.identity)
            url = directory.database_url(settings)
            with failures_named(), contextlib.closing(Database(url, create=True)) as opened:
                if sealed_by is None:
                    write_private(directory.root_key_path, root.material)
                else:
                    write_sealed(directory, root, sealed_by, new_key=new_key)
                _fill(directory, settings, root, opened)
            directory.unfinished_settings_path.replace(directory.settings_path)
            sync_folder(path)
    except OSError as exc:
        raise VaultError(f"cannot create a vault in {path}: {exc.strerror}") from exc
    return directory


def _parent_domain(domain: str, host: str) -> str:
    """Check that *host* is a name below *domain*.

    :raise InvalidValueError: When it is not.
    """
    if not host.lower().endswith(f".{domain.lower()}"):
        raise InvalidValueError(
            f"the audience {domain[:80]!r} is no parent domain of the host {host[:80]!r}",
            hint="e.g. --host keys.vault.example --audience vault.example",
        )
    return domain


def _clear(directory: VaultDirectory) -> None:
    """Remove the database of a killed ``vault init``; a complete vault has settings and never gets here.

    A SoftHSM token is kept: its initialisation is completed instead.
    """
    unfinished = directory.unfinished_settings()
    if unfinished is not None and unfinished.database is not None and has_root_key(directory):
        with failures_named(), contextlib.closing(Database(unfinished.database)) as database:
            remove_vault(database, read_root_key(directory, unfinished).sealer(TOKENS))
    for path in (
        directory.unfinished_settings_path,  # first: a new root key is of another vault
        directory.root_key_path,
        directory.sealed_root_path,
    ):
        path.unlink(missing_ok=True)
    for suffix in ("", "-wal", "-shm"):
        path = directory.database_path
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _fill(directory: VaultDirectory, settings: VaultSettings, root: VaultRootKey, database: Database) -> None:
    ca, ca_key = new_authority(settings.name)
    write_private(directory.unfinished_settings_path, settings.to_json())
    write_private(directory.ca_key_path, ca_key)
    write_private(directory.ca_path, ca)
    write_private(directory.server_path, new_server_certificate(ca, ca_key, settings.hosts))
    new_signing_key(database, root.sealer(TOKENS))
    _add_administrator(directory, settings, database, FIRST_ADMINISTRATOR, directory.administrator_path)


def add_administrator(directory: VaultDirectory, name: str, file: Path) -> None:
    """Create an administrator and its credential file without a login, for a vault without administrators.

    :param file: path of the credential file; must not exist.
    :raise VaultError: When there is no vault, a process serves the vault, or the name or the file exists.
    """
    settings = directory.settings()
    if file.exists():
        raise VaultError(f"{file} exists already")
    with directory.lock():
        try:
            with contextlib.closing(Database(directory.database_url(settings))) as database:
                _add_administrator(directory, settings, database, name, file)
        except Refusal as refusal:
            raise VaultError(f"cannot create an administrator: {refusal.message.rstrip('.')}") from refusal


def _add_administrator(
    directory: VaultDirectory, settings: VaultSettings, database: Database, name: str, file: Path
) -> None:
    private, public = new_assertion_key()
    administrator = Principals(database).create(
        name, public, role=Role.ADMINISTRATOR, permissions=ADMINISTRATION
    )
    CredentialFile(
        vault_url=settings.url,
        ca_certificate=directory.ca_path.read_text("ascii"),
        audience=settings.audience,
        tenant=settings.tenant,
        client_id=administrator.client_id,
        object_id=administrator.object_id,
        token_endpoint=settings.token_endpoint,
        private_key=private,
        expires=None,
    ).write(file)
