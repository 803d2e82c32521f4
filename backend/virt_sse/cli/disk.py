"""``virt-sse disk``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import completion, disk_attachment, disk_backup, disk_deletion
from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.disk_fields import dek_fields, image_place, print_disk, shown_fields
from virt_sse.cli.disk_options import ImagePath, Name, Pool, cipher_option, des_option
from virt_sse.cli.disk_receive import receive
from virt_sse.cli.disk_reencrypt import disk_reencrypt
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend, config, host, listed_disks
from virt_sse.cli.vm_inspect import disk_inspect
from virt_sse.errors import InvalidValueError, LibvirtUnavailableError, PolicyError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import DiskSku, DiskState, NewDisk, parse_disk_size
from virt_sse.model.layers import EncryptionType
from virt_sse.system.block_devices import is_device

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


NewName = Annotated[str, typer.Argument(help="The new disk's name.", show_default=False)]
ImageFormat = Annotated[DiskFormat, typer.Option("--format", help="The image format.")]
SetName = Annotated[
    str | None,
    des_option("The disk encryption set; default: none, the disk is under the platform's key."),
]
InfrastructureCipher = Annotated[
    Cipher | None,
    cipher_option(
        "--infrastructure-cipher",
        "Cipher of the second layer, in a set for double encryption; default: the configured cipher.",
    ),
]
SkuOption = Annotated[
    DiskSku,
    typer.Option("--sku", help="The SKU, by the cloud's name."),
]


@app.command()
def create(
    name: NewName,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            "-s",
            help="Size visible to the guest, e.g. 10G; default: the image's, or the room on a block device.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            metavar="NAME[:VERSION]",
            help="Copy the content of this image; without --des, the disk is in the image's set.",
            show_default=False,
        ),
    ] = None,
    linked: Annotated[
        bool,
        typer.Option(
            "--linked", help="With --image: copy nothing; the disk is read from the image, which must stay."
        ),
    ] = False,
    des: SetName = None,
    infrastructure_cipher: InfrastructureCipher = None,
    sku: SkuOption = DiskSku.PREMIUM_SSD,
    image_format: ImageFormat = DiskFormat.QCOW2,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create an empty disk, or a disk with the content of an image."""
    if linked and image is None:
        raise InvalidValueError("--linked makes a disk of an image", hint="pass --image")
    if size is None and image is None and not (path and is_device(path)):
        raise InvalidValueError(f"no size for disk {name!r}", hint="pass --size, or --image")
    new = NewDisk(
        name=name,
        size=parse_disk_size(size) if size is not None else None,
        format=image_format,
        sku=sku,
        encryption_set=des,
        infrastructure_cipher=infrastructure_cipher,
        place=image_place(path, pool),
    )
    with backend() as b:
        if image is None:
            disk = b.disks.create(new)
        elif linked:
            disk = b.images.new_clone(image, new)
        else:
            with progress_bar("copying", size=lambda: b.host.store.get(name).size) as progress:
                disk = b.images.new_disk(image, new, progress=progress)
    print_disk(disk, output)


@app.command(name="import")
def import_(
    name: NewName,
    source: Annotated[Path, typer.Argument(help="Any image readable by qemu-img.", show_default=False)],
    source_format: Annotated[
        str | None,
        typer.Option("--source-format", help="QEMU's name of the source's format; default: probed."),
    ] = None,
    with_backing: Annotated[
        bool, typer.Option("--with-backing", help="Read the source's backing files, too.")
    ] = False,
    des: SetName = None,
    infrastructure_cipher: InfrastructureCipher = None,
    sku: SkuOption = DiskSku.PREMIUM_SSD,
    image_format: ImageFormat = DiskFormat.QCOW2,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a disk with the content of an image, encrypted in transit."""
    with backend() as b, progress_bar("encrypting", size=lambda: b.host.store.get(name).size) as progress:
        disk = b.transfer.import_image(
            NewDisk(
                name=name,
                format=image_format,
                sku=sku,
                encryption_set=des,
                infrastructure_cipher=infrastructure_cipher,
                place=image_place(path, pool),
            ),
            source,
            source_format=source_format,
            with_backing=with_backing,
            progress=progress,
        )
    print_disk(disk, output)


@app.command()
def copy(
    name: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="The disk to copy.",
            autocompletion=completion.disks,
        ),
    ],
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="The new disk's name.")],
    des: Annotated[
        str | None,
        des_option("The new disk's encryption set; default: the source's."),
    ] = None,
    encryption_type: Annotated[
        EncryptionType | None,
        typer.Option(
            "--encryption-type",
            help="EncryptionAtRestWithPlatformKey: the new disk is in no set, whatever the source's set.",
        ),
    ] = None,
    infrastructure_cipher: InfrastructureCipher = None,
    sku: Annotated[DiskSku | None, typer.Option("--sku", help="The SKU; default: the source's.")] = None,
    image_format: Annotated[
        DiskFormat | None, typer.Option("--format", help="The image format; default: the source's.")
    ] = None,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Copy a disk, also of a running domain, to a new disk with keys of its own, in any set or in none."""
    is_free = _is_for_platform_key(des, encryption_type)
    with backend() as b, progress_bar("copying", size=lambda: b.host.store.get(name).size) as progress:
        source = b.disks.get(name)
        if des is None and not is_free and source.set_id:
            des = str(source.set_id)
        if des is not None:
            b.sets.require_type(des, encryption_type)
        new = NewDisk(
            name=new_name,
            format=image_format or source.format,
            sku=sku or source.sku,
            encryption_set=des,
            infrastructure_cipher=infrastructure_cipher,
            place=image_place(path, pool),
            source=source,
        )
        copied = b.copies.copy([new], progress=progress)
    print_disk(copied.disks[0], output)


@app.command()
def export(
    name: Name,
    destination: Annotated[Path, typer.Argument(help="The image to create.", show_default=False)],
    plaintext: Annotated[
        bool, typer.Option("--plaintext", help="Confirm that the new image is not encrypted.")
    ] = False,
    destination_format: Annotated[
        str, typer.Option("--format", help="QEMU's name of the new image's format.")
    ] = "qcow2",
) -> None:
    """Decrypt a disk into a new image; requires --plaintext."""
    if not plaintext:
        raise PolicyError("an export is not encrypted", hint="pass --plaintext to confirm")
    with backend() as b, progress_bar("decrypting", size=lambda: b.host.store.get(name).size) as progress:
        b.transfer.export(name, destination, destination_format=destination_format, progress=progress)


@app.command()
def adopt(
    path: Annotated[Path, typer.Argument(help="The image of an unlisted disk.", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="Default: the name in the image's envelope. A moved disk keeps its name."
        ),
    ] = None,
    des: Annotated[
        str | None,
        des_option("A set with access to the disk's key; default: the set in the image's envelope."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Adopt an image of another host or of a deleted disk, or an older image; audited.",
        ),
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Add a disk to the store after a lost store or a moved image, from its image and the key provider."""
    with backend() as b:
        disk = b.disks.adopt(path, name=name, encryption_set=des, trust=trust)
    print_disk(disk, output)


@app.command()
def trust(name: Name, output: Output = OutputFormat.TABLE) -> None:
    """Take a disk's image as it is, e.g. restored from a backup, if the DEK opens the image; audited."""
    with backend() as b:
        disk = b.disks.trust(name)
    print_disk(disk, output)


@app.command(name="list")
def list_(
    deleted: Annotated[
        bool, typer.Option("--deleted", help="List the deleted disks that can be recovered.")
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List all disks as stored; state 'missing' without an image. No image is opened."""
    from virt_sse.disks.missing_images import missing_images

    disks = [disk for disk in listed_disks() if (disk.state is DiskState.DELETED) is deleted]
    missing = missing_images(disks, config().image_states)
    fields = ("deleted", "scheduled-purge", "key", "path") if deleted else ("format", "state", "key", "path")
    print_rows(
        [shown_fields(disk, output, is_missing=disk.id in missing) for disk in disks],
        ("name", "size", *fields),
        output,
    )


@app.command()
def show(name: Name, output: Output = OutputFormat.TABLE) -> None:
    """Show a disk: its image, its keys and their states, its domains."""
    from virt_sse.disks.missing_images import missing_images
    from virt_sse.disks.stored_images import image_state, with_real_size
    from virt_sse.libvirt import disk_users

    with host() as h:
        disk = with_real_size(h, h.store_reads.get(name))
        missing = missing_images([disk], h.config.image_states)
        fields = shown_fields(disk, output, is_missing=disk.id in missing) | {"image": image_state(disk)}
        fields["placement"] = (disk.placement or h.config.placement).value
        fields["deks"] = dek_fields(h, disk)
        try:
            fields["domains"] = disk_users.names(h.config.libvirt_uri, disk.id)
        except LibvirtUnavailableError:
            fields["domains"] = None
    print_fields(fields, output)


@app.command()
def check(name: Name) -> None:
    """Check that a disk's image is intact, opens with its DEK and carries the wrapped DEK."""
    with backend() as b:
        b.disks.check(name)
    note(f"disk {name}: ok")


app.command(name="inspect")(disk_inspect)
app.command(name="backup")(disk_backup.backup)
app.command(name="backups")(disk_backup.backups)
app.command(name="restore")(disk_backup.restore)
app.command(name="verify-backup")(disk_backup.verify_backup)
app.command(name="erase-backup", cls=DestructiveCommand)(disk_backup.erase_backup)
app.command(name="reencrypt")(disk_reencrypt)
app.command()(receive)
app.command(cls=DestructiveCommand)(disk_deletion.delete)
app.command()(disk_deletion.recover)
app.command(cls=DestructiveCommand)(disk_deletion.purge)
app.command()(disk_attachment.xml)
app.command()(disk_attachment.attach)
app.command()(disk_attachment.detach)


@app.command()
def update(
    name: Name,
    des: Annotated[
        str | None,
        des_option("The disk encryption set to move the disk into."),
    ] = None,
    encryption_type: Annotated[
        EncryptionType | None,
        typer.Option("--encryption-type", help="The expected type; with --des, that of the set."),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Move a disk into another disk encryption set, also while a domain uses the disk."""
    is_free = _is_for_platform_key(des, encryption_type)
    if des is None and not is_free:
        raise InvalidValueError("no disk encryption set", hint="pass --des SET")
    with backend() as b:
        if des is None:
            disk = b.sets.use_platform_key(name)
        else:
            b.sets.require_type(des, encryption_type)
            disk = b.sets.move_disk(name, des)
    print_disk(disk, output)


@app.command(cls=DestructiveCommand)
def resize(
    name: Name,
    size: Annotated[str, typer.Argument(help="The new size, e.g. 20G.", show_default=False)],
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Allow a smaller size; data beyond is lost.")
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Resize a disk, also while a domain uses the disk."""
    with backend() as b:
        wanted = parse_disk_size(size)

        def plan() -> list[str]:
            before = b.disks.resize(name, wanted, shrink=shrink, dry_run=True).size
            loss = ", and lose all data beyond" if wanted < before else ""
            return [f"resize disk {name} from {before} to {wanted} bytes{loss}"]

        confirm(plan, asks=shrink)
        disk = b.disks.resize(name, wanted, shrink=shrink)
    print_disk(disk, output)


def _is_for_platform_key(des: str | None, encryption_type: EncryptionType | None) -> bool:
    """Whether a disk is meant to be in no set."""
    is_free = encryption_type is EncryptionType.PLATFORM_KEY
    if is_free and des is not None:
        raise InvalidValueError(f"{EncryptionType.PLATFORM_KEY.value} and --des exclude each other")
    return is_free
