"""``virt-sse des``."""

from __future__ import annotations

from typing import Annotated

import typer

from virt_sse.cli import completion
from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.disk_options import MaxRate
from virt_sse.cli.key import print_report
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows, warn
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend
from virt_sse.errors import VirtSseError
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.layers import EncryptionType, Placement
from virt_sse.model.sizes import parse_size

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


Name = Annotated[
    str,
    typer.Argument(
        help="The set's name or id.",
        show_default=False,
        autocompletion=completion.encryption_sets,
    ),
]
RevocationOption = typer.Option(
    "--revocation", help="Action on running domains when the key is disabled, deleted or denied."
)
GraceOption = typer.Option("--grace", help="Seconds from the shutdown request to the forced end.")
PlacementOption = typer.Option(
    "--placement",
    help="The process with the DEKs: the guest's own QEMU, or a storage daemon below; "
    "from the next start of each domain.",
)
KeyOption = typer.Option(
    "--key",
    help="The key: its name, in a key vault its URL, in a transit engine its path; "
    "with a version or for the newest.",
)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The new set's name.", show_default=False)],
    key: Annotated[str, KeyOption],
    provider: Annotated[str, typer.Option("--provider", help="The key provider.")] = "customer-managed",
    encryption_type: Annotated[
        EncryptionType, typer.Option("--encryption-type", help="Encryption type of the disks.")
    ] = EncryptionType.CUSTOMER_KEY,
    automatic_rotation: Annotated[
        bool, typer.Option("--auto-rotation", help="Rewrap automatically when the key has a new version.")
    ] = False,
    revocation: Annotated[RevocationAction, RevocationOption] = RevocationAction.SHUTDOWN,
    grace: Annotated[int, GraceOption] = 60,
    placement: Annotated[Placement | None, PlacementOption] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a set and its identity. The key's administrator then grants the identity access to the key."""
    with backend() as b:
        made = b.sets.create(
            name,
            provider=provider,
            key=key,
            encryption_type=encryption_type,
            automatic_rotation=automatic_rotation,
            revocation=revocation,
            grace_seconds=grace,
            placement=placement,
        )
    print_fields(_fields(made), output)


@app.command(name="list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List all sets."""
    with backend() as b:
        sizes = b.sets.sizes()
        rows = [_fields(each) | {"disks": sizes.get(each.id, 0)} for each in b.sets.all()]
    print_rows(rows, ("name", "provider", "key", "auto-rotation", "revocation", "disks"), output)


@app.command()
def show(name: Name, output: Output = OutputFormat.TABLE) -> None:
    """Show a set and its disks."""
    with backend() as b:
        found = b.sets.get(name)
        fields = _fields(found) | {"disks": [disk.name for disk in b.sets.disks(name)]}
    print_fields(fields, output)


@app.command()
def update(
    name: Name,
    key: Annotated[str | None, KeyOption] = None,
    automatic_rotation: Annotated[
        bool | None,
        typer.Option("--auto-rotation/--no-auto-rotation", help="Follow new versions of the key."),
    ] = None,
    revocation: Annotated[RevocationAction | None, RevocationOption] = None,
    grace: Annotated[int | None, GraceOption] = None,
    placement: Annotated[Placement | None, PlacementOption] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Move the set to this tenant; its identity stays behind."),
    ] = None,
    assign_identity: Annotated[
        bool, typer.Option("--assign-identity", help="Create an identity if the set has none.")
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change a set. A new key rewraps the DEKs of the set's disks."""
    with backend() as b, progress_bar("rewrapping") as progress:
        if tenant is not None:
            b.sets.move_to_tenant(name, tenant)
            for disk in b.sets.disks(name):
                warn(f"disk {disk.name} cannot be opened until the set has an identity again")
        if assign_identity:
            b.sets.assign_identity(name)
        changed, report = b.sets.update(
            name,
            key=key,
            automatic_rotation=automatic_rotation,
            revocation=revocation,
            grace_seconds=grace,
            placement=placement,
            progress=progress,
        )
    print_report(_fields(changed), report, output, again=f"des rotate {name}")


@app.command()
def rotate(
    name: Name,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Look at every image, afterwards try every wrapped DEK, and show the key of each."
        ),
    ] = False,
    reencrypt: Annotated[
        bool,
        typer.Option("--reencrypt", help="Give each disk new DEKs and a new volume key; all data is copied."),
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=64, help="With --reencrypt, number of disks at the same time.")
    ] = 2,
    max_rate: MaxRate = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Rewrap a set's DEKs with the current version of the key, or continue an interrupted rotation."""
    if reencrypt:
        _reencrypt(name, jobs, parse_size(max_rate) if max_rate else None)
        return
    with backend() as b:
        with progress_bar("rewrapping") as progress:
            report = b.sets.rotate(name, every_image=prove, progress=progress)
        if not prove:
            print_report({"set": name}, report, output, again=f"des rotate {name}")
            return
        with progress_bar("proving") as progress:
            findings = b.sets.prove(name, progress=progress) + b.saved_states.prove(b.sets.get(name))
    rows = [
        {"disk": each.disk, "place": each.place, "key": str(each.key or ""), "problem": each.problem}
        for each in findings
    ]
    print_rows(rows, ("disk", "place", "key", "problem"), output)
    problems = sum(each.problem is not None for each in findings)
    if problems or report.failed:
        raise VirtSseError(f"{problems} of {len(findings)} wrapped DEKs are not under the set's current key")


def _reencrypt(name: str, jobs: int, max_rate: int | None) -> None:
    with backend() as b:
        disks = [disk for disk in b.sets.disks(name) if disk.kind is DiskKind.DISK]
        with progress_bar("re-encrypting", size=sum(disk.size for disk in disks)) as progress:
            failed = b.reencryption.reencrypt_all(disks, jobs=jobs, max_rate=max_rate, progress=progress)
    note(f"re-encrypted {len(disks) - len(failed)} of {len(disks)} disks")
    for disk, error in failed.items():
        typer.echo(f"virt-sse: disk {disk}: {error}", err=True)
    if failed:
        raise VirtSseError(f"{len(failed)} of {len(disks)} disks are not re-encrypted")


@app.command(cls=DestructiveCommand)
def delete(name: Name) -> None:
    """Delete a set without disks, and its identity."""
    with backend() as b:
        confirm(lambda: [f"delete disk encryption set {b.sets.delete(name, dry_run=True).name}"])
        b.sets.delete(name)
    note(f"deleted disk encryption set {name}")


def _fields(encryption_set: EncryptionSet) -> dict[str, object]:
    version = f"/{encryption_set.key_version}" if encryption_set.key_version else ""
    return {
        "name": encryption_set.name,
        "id": str(encryption_set.id),
        "provider": encryption_set.key.provider,
        "key": encryption_set.key.name + version,
        "encryption-type": encryption_set.encryption_type.value,
        "auto-rotation": encryption_set.automatic_rotation,
        "revocation": encryption_set.revocation.value,
        "grace-seconds": encryption_set.grace_seconds,
        "placement": encryption_set.placement.value if encryption_set.placement else None,
        "subscription": encryption_set.subscription,
        "region": encryption_set.region,
        "tenant": encryption_set.tenant,
        "identity": encryption_set.identity,
        "created": encryption_set.created.isoformat(),
    }
