"""``virt-sse certificate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import session
from virt_sse.cli.output import Output, OutputFormat, print_fields, print_rows
from virt_sse.cli.session import backend
from virt_sse.errors import CertificateError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(name="list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List the certificates of this host, oldest first."""
    with backend() as b:
        rows = b.certificates.all()
    print_rows(
        [{"name": name, "disk": str(disk_id), "deleted": deleted} for disk_id, name, deleted in rows],
        ("deleted", "name", "disk"),
        output,
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or id of the deleted disk.", show_default=False)],
) -> None:
    """Print the newest certificate about a disk of that name or id, e.g. after a killed deletion."""
    with backend() as b:
        typer.echo(b.certificates.get(name).encode(), nl=False)


@app.command(name="public-key")
def public_key() -> None:
    """Print the public key for this host's certificates, 32 bytes in base64."""
    from virt_sse.model.certificate import encode_public_key

    with backend() as b:
        typer.echo(encode_public_key(b.certificates.key.provision().public_key()))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A certificate.", show_default=False)],
    key: Annotated[
        str | None,
        typer.Option(
            "--public-key", metavar="KEY", help="The host's public key in base64; default: of this host."
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Verify the signature of a certificate, and print what was deleted and which copies remain."""
    import msgspec

    from virt_sse.keys.signing_key import SigningKeyFile
    from virt_sse.model.certificate import DeletionCertificate, parse_public_key

    if key is None:
        trusted = SigningKeyFile(session.config().signing_key).load().public_key()
    else:
        trusted = parse_public_key(key)
    try:
        content = file.read_bytes()
    except OSError as exc:
        raise CertificateError(f"cannot read {file}: {exc.strerror}") from exc
    statement = DeletionCertificate.parse(content).verify(trusted)
    fields = msgspec.to_builtins(statement)
    disk = fields.pop("disk")
    print_fields({"signature": "valid", **{f"disk-{name}": disk[name] for name in disk}, **fields}, output)
