"""``virt-sse host hsm``: the PKCS#11 token of key provider ``hsm-simulated``, and the keys in the token."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse import pkcs11
from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.key_effects import what_stops
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows
from virt_sse.cli.private_key import read_private_key
from virt_sse.cli.session import backend, config
from virt_sse.errors import ConfigError, InvalidValueError, PolicyError, VirtSseError
from virt_sse.model.keys import KeyId
from virt_sse.pkcs11.pins import MOST_WRONG

if TYPE_CHECKING:
    from virt_sse.pkcs11.administration import TokenAdministration
    from virt_sse.pkcs11.options import TokenOptions
    from virt_sse.pkcs11.pins import PinSource
    from virt_sse.pkcs11.token import TokenKey

PROVIDER = "hsm-simulated"

app = typer.Typer(
    help=f"The PKCS#11 token of key provider {PROVIDER!r}, and its keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class KeyType(enum.Enum):
    """Values of ``--type``."""

    RSA = "rsa"
    AES = "aes"


KeyName = Annotated[
    str, typer.Argument(metavar="NAME", help="The key's name: its label.", show_default=False)
]
Version = Annotated[str | None, typer.Option("--version", help="Default: all versions.", show_default=False)]
AskPin = Annotated[bool, typer.Option("--ask-pin", help="Ask for the PIN; do not read the file.")]
PinDescriptor = Annotated[
    int | None,
    typer.Option("--pin-descriptor", help="Read the PIN from this file descriptor.", show_default=False),
]


@app.command()
def init(
    label: Annotated[str, typer.Option("--label", help="The token's label.")] = "virt-sse",
) -> None:
    """Create a SoftHSM token, its PINs and its configuration, unless they exist. For labs and trials."""
    options = _options()
    if options.uri is not None:
        raise ConfigError(
            f"the configuration names another token: {options.uri}",
            hint=f"use its vendor's tools, or remove 'uri' from [key-providers.{PROVIDER}]",
        )
    made = options.folder.initialise(label)
    note(f"made token {options.folder.read_uri()}" if made else "nothing to do")


@app.command()
def status(
    ask_pin: AskPin = False, pin_descriptor: PinDescriptor = None, output: Output = OutputFormat.TABLE
) -> None:
    """Show the token and its state. The exit status is 1 if the token is unusable."""
    options = _options()
    failure, keys = None, 0
    try:
        with _administration(ask_pin, pin_descriptor) as administration:
            keys = len(administration.all())
    except VirtSseError as exc:
        failure = exc
    fields: dict[str, object] = {
        "token": str(options.uri or "") or _known_uri(options),
        "module": options.module,
        "softhsm-config": str(options.softhsm_config or "") or None,
        "pin-file": str(options.pin_file),
        "wrong-pins": f"{options.guard.failures()} of {MOST_WRONG}",
        "state": "ready" if failure is None else "unreachable",
        "keys": keys if failure is None else None,
    }
    print_fields(fields, output)
    if failure is not None:
        raise failure


@app.command()
def unlock(ask_pin: AskPin = False, pin_descriptor: PinDescriptor = None) -> None:
    """Reset the counter of wrong PINs, and try the current PIN."""
    options = _options()
    options.guard.reset()
    options.open(_pin(ask_pin, pin_descriptor)).close()
    note("the token takes the PIN")


@app.command()
def create(
    name: KeyName,
    key_type: Annotated[KeyType, typer.Option("--type", help="RSA for OAEP, AES-256 for AES key wrap.")] = (
        KeyType.RSA
    ),
    size: Annotated[int, typer.Option("--size", help="RSA key size: 2048, 3072 or 4096 bits.")] = 3072,
    ask_pin: AskPin = False,
    pin_descriptor: PinDescriptor = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a key in the token. 'virt-sse key rotate --provider hsm-simulated' creates further versions."""
    from virt_sse.pkcs11.token import KeyKind

    with _administration(ask_pin, pin_descriptor) as administration:
        print_fields(_fields(administration.create(name, KeyKind(key_type.value), size)), output)


@app.command(name="import")
def import_(
    name: KeyName,
    file: Annotated[Path, typer.Argument(help="An RSA private key, PEM, not encrypted.", show_default=False)],
    ask_pin: AskPin = False,
    pin_descriptor: PinDescriptor = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Import an RSA key into the token, by wrapped transfer. The token never exports the key."""
    private = read_private_key(file)
    with _administration(ask_pin, pin_descriptor) as administration:
        print_fields(_fields(administration.bring(name, private)), output)


@app.command(name="list")
def list_(
    ask_pin: AskPin = False, pin_descriptor: PinDescriptor = None, output: Output = OutputFormat.TABLE
) -> None:
    """List the keys in the token by name, the versions of a key from the oldest to the current."""
    with _administration(ask_pin, pin_descriptor) as administration:
        rows = [_fields(key) for key in administration.all()]
    print_rows(rows, ("name", "version", "type", "bits", "enabled", "never-extractable"), output)


@app.command(cls=DestructiveCommand)
def disable(
    name: KeyName, version: Version = None, ask_pin: AskPin = False, pin_descriptor: PinDescriptor = None
) -> None:
    """Refuse every use of a key. Until 'enable', DEKs wrapped with the key cannot be unwrapped."""
    _set_enabled(name, version, ask_pin, pin_descriptor, enabled=False)


@app.command()
def enable(
    name: KeyName, version: Version = None, ask_pin: AskPin = False, pin_descriptor: PinDescriptor = None
) -> None:
    """Allow the use of a key again."""
    _set_enabled(name, version, ask_pin, pin_descriptor, enabled=True)


@app.command(cls=DestructiveCommand)
def destroy(
    name: KeyName,
    version: Version = None,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="Destroy the whole key.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if this host's disks need the key.")] = False,
    ask_pin: AskPin = False,
    pin_descriptor: PinDescriptor = None,
) -> None:
    """Destroy a key's version for good. DEKs wrapped with this version are lost."""
    if all_versions is (version is not None):
        raise InvalidValueError("destroying takes either --version or --all-versions")
    with _administration(ask_pin, pin_descriptor) as administration:
        doomed = administration.versions(name, version)
        if not force:
            _require_unused(doomed)
        confirm(
            lambda: [
                *(f"destroy key {_key_id(key)}, and lose all data wrapped with the key" for key in doomed),
                *_what_stops(doomed),
            ]
        )
        for key in doomed:
            administration.destroy(key)
            typer.echo(f"destroyed key {_key_id(key)}")


def _set_enabled(
    name: str, version: str | None, ask_pin: bool, pin_descriptor: int | None, *, enabled: bool
) -> None:
    with _administration(ask_pin, pin_descriptor) as administration:
        keys = administration.versions(name, version)
        if not enabled:
            confirm(lambda: [*(f"disable key {_key_id(key)}" for key in keys), *_what_stops(keys)])
        for key in keys:
            administration.set_enabled(key, enabled=enabled)
            note(f"{'enabled' if enabled else 'disabled'} key {_key_id(key)}")


def _what_stops(keys: list[TokenKey]) -> list[str]:
    lost = {_key_id(key) for key in keys}
    return what_stops(lambda used: used in lost)


def _require_unused(keys: list[TokenKey]) -> None:
    doomed = {_key_id(key) for key in keys}
    with backend() as b:
        used = [use for use in b.keys.in_use() if use.key in doomed]
        disks = b.host.store.all() if used else []
        lost = [disk for disk in disks if any(entry.wrapped.key in doomed for entry in disk.deks)]
        above = {copy.name: copy for disk in lost for copy in b.erasure.based_on(disk)}
    if used:
        others = sorted(above.keys() - {disk.name for disk in lost})
        raise PolicyError(
            f"{sum(use.deks for use in used)} DEKs of this host's disks are wrapped with key {used[0].key}",
            hint="rewrap these DEKs first; with --force, these disks are lost"
            + (f", and so are the incremental copies based on them: {', '.join(others)}" if others else ""),
        )


def _options() -> TokenOptions:
    pkcs11.require()
    from virt_sse.pkcs11.options import TokenOptions

    provider = config().key_provider(PROVIDER)
    return TokenOptions.parse(f"[key-providers.{PROVIDER}]", provider.directory, provider.options)


@contextlib.contextmanager
def _administration(ask_pin: bool, pin_descriptor: int | None) -> Iterator[TokenAdministration]:
    options = _options()
    from virt_sse.audit.log import AuditLog
    from virt_sse.pkcs11.administration import TokenAdministration

    token = options.open(_pin(ask_pin, pin_descriptor))
    with TokenAdministration(token, AuditLog.of_host(config()), provider=PROVIDER) as administration:
        yield administration


def _pin(ask_pin: bool, descriptor: int | None) -> PinSource | None:
    from virt_sse.pkcs11.pins import PinSource

    if ask_pin and descriptor is not None:
        raise InvalidValueError("--pin-descriptor and --ask-pin exclude each other")
    if descriptor is not None:
        return PinSource.descriptor(descriptor)
    if ask_pin:
        return PinSource.prompt(lambda: str(typer.prompt("PIN", hide_input=True, err=True)))
    return None


def _known_uri(options: TokenOptions) -> str | None:
    try:
        return str(options.token_uri())
    except ConfigError:
        return None


def _key_id(key: TokenKey) -> KeyId:
    return KeyId(PROVIDER, key.label, key.id.hex())


def _fields(key: TokenKey) -> dict[str, object]:
    return {
        "name": key.label,
        "version": key.id.hex(),
        "type": key.kind.value,
        "bits": key.bits,
        "enabled": key.is_enabled,
        "never-extractable": key.is_never_extractable,
        "extractable": key.is_extractable,
    }
