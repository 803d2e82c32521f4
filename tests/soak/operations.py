"""The operations that are killed, with their preparation, and the check of the host afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from soak.invariants import check_host, is_whole_database
from soak.sites import KINDS, PLAIN, FileSite, Kind, M, content
from virt_sse.backend import Backend
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import PLATFORM_KEY


@dataclass(frozen=True, slots=True)
class FileOperation:
    """A command on a host's files.

    :ivar prepare: brings the host into the state before the command.
    :ivar arguments: of ``virt-sse``.
    :ivar check: checks the host after the kill; whether the command has taken effect.
    :ivar refusals: parts of messages with which the same command may be refused once it has taken effect.
    """

    name: str
    prepare: Callable[[FileSite], None]
    arguments: Callable[[FileSite], list[str | Path]]
    check: Callable[[FileSite], bool]
    refusals: tuple[str, ...] = ()


def _contents(*kinds: Kind, **more: bytes) -> Mapping[str, bytes]:
    return {kind.name: content() for kind in kinds} | more


def _chosen(kind: Kind) -> list[str | Path]:
    chosen: list[str | Path] = ["--des", kind.encryption_set] if kind.encryption_set else []
    return ["--format", kind.format, *chosen]


def _create(kind: Kind) -> FileOperation:
    return FileOperation(
        f"disk-create-{kind.name}",
        lambda site: site.bring_host(*((kind,) if kind.encryption_set == "hsm" else ())),
        lambda _: ["disk", "create", "new", "-s", "1M", *_chosen(kind)],
        lambda site: (
            "new"
            in check_host(
                site,
                _contents(*((kind,) if kind.encryption_set == "hsm" else ()), new=b""),
                optional=["new"],
            )
        ),
        ("exist",),
    )


def _import(kind: Kind) -> FileOperation:
    return FileOperation(
        f"disk-import-{kind.name}",
        lambda site: site.bring_host(*((kind,) if kind.encryption_set == "hsm" else ())),
        lambda site: ["disk", "import", "new", site.source, "--source-format", "raw", *_chosen(kind)],
        lambda site: (
            "new"
            in check_host(
                site,
                _contents(*((kind,) if kind.encryption_set == "hsm" else ()), new=content()),
                optional=["new"],
            )
        ),
        ("exist",),
    )


def _export(kind: Kind) -> FileOperation:
    def check(site: FileSite) -> bool:
        out = site.out / "plain.raw"
        check_host(site, _contents(kind))
        assert list(site.out.iterdir()) in ([], [out])
        if not out.exists():
            return False
        assert out.read_bytes() == content()
        assert out.stat().st_mode & 0o777 == 0o600
        return True

    return FileOperation(
        f"disk-export-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda site: ["disk", "export", kind.name, site.out / "plain.raw", "--plaintext", "--format", "raw"],
        check,
        ("exists already",),
    )


def _size(site: FileSite, name: str) -> int:
    with Backend.open(site.root) as backend:
        return backend.disks.get(name).size


def _resize(kind: Kind, size: int) -> FileOperation:
    """After a kill the disk may have either size; the next command stores the size."""

    def check(site: FileSite) -> bool:
        check_host(site, _contents(kind))
        found = _size(site, kind.name)
        assert found in (M, size), f"{found} bytes"
        return found == size

    word = "grow" if size > M else "shrink"
    return FileOperation(
        f"disk-{word}-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["disk", "resize", kind.name, str(size), *(["--shrink"] if size < M else [])],
        check,
    )


def _check(kind: Kind) -> FileOperation:
    def check(site: FileSite) -> bool:
        check_host(site, _contents(kind))
        return False

    return FileOperation(
        f"disk-check-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["disk", "check", kind.name],
        check,
    )


def _delete(kind: Kind) -> FileOperation:
    def check(site: FileSite) -> bool:
        return not check_host(site, _contents(kind), optional=[kind.name])

    return FileOperation(
        f"disk-delete-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["disk", "delete", kind.name, "--purge"],
        check,
        ("no disk",),
    )


def _delete_for_a_time(kind: Kind) -> FileOperation:
    return FileOperation(
        f"disk-soft-delete-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["disk", "delete", kind.name],
        lambda site: _recovered(site, kind),
        ("is deleted",),
    )


def _recover(kind: Kind) -> FileOperation:
    return FileOperation(
        f"disk-recover-{kind.name}",
        lambda site: _bring_deleted(site, kind),
        lambda _: ["disk", "recover", kind.name],
        lambda site: not _recovered(site, kind),
        ("is not deleted",),
    )


def _purge(kind: Kind) -> FileOperation:
    def check(site: FileSite) -> bool:
        with Backend.open(site.root) as backend:
            if backend.soft_deletion.all():
                backend.disks.check(kind.name)
                return False
        return not check_host(site, _contents(kind), optional=[kind.name])

    return FileOperation(
        f"disk-purge-{kind.name}",
        lambda site: _bring_deleted(site, kind),
        lambda _: ["disk", "purge", kind.name],
        check,
        ("no disk",),
    )


def _bring_deleted(site: FileSite, kind: Kind) -> None:
    site.bring_host(kind)
    site.cli("disk", "delete", kind.name)


def _recovered(site: FileSite, kind: Kind) -> bool:
    """Recover the disk if deleted, and check the host; whether the disk was deleted."""
    with Backend.open(site.root) as backend:
        is_deleted = bool(backend.soft_deletion.all())
        if is_deleted:
            backend.soft_deletion.recover(kind.name)
    check_host(site, _contents(kind))
    return is_deleted


def _disk_id(site: FileSite, name: str) -> str:
    with Backend.open(site.root) as backend:
        return str(backend.disks.get(name).id)


def _reencrypt(kind: Kind, *options: str) -> FileOperation:
    """After a kill the disk has its old or its new keys, and its content."""

    def prepare(site: FileSite) -> None:
        site.bring_host(kind)
        (site.out.parent / "id").write_text(_disk_id(site, kind.name))

    def check(site: FileSite) -> bool:
        check_host(site, _contents(kind))
        with Backend.open(site.root) as backend:
            assert backend.host.store.replacements.all() == []
        return _disk_id(site, kind.name) != (site.out.parent / "id").read_text()

    return FileOperation(
        "-".join(("disk-reencrypt", kind.name, *(option.strip("-") for option in options))),
        prepare,
        lambda _: ["disk", "reencrypt", kind.name, *options],
        check,
    )


def _adopt(kind: Kind) -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host(kind)
        image = site.images / f"{kind.name}.{kind.format}"
        image.rename(image.with_stem("moved"))

    def check(site: FileSite) -> bool:
        moved = site.images / f"moved.{kind.format}"
        with Backend.open(site.root) as backend:
            done = backend.disks.get(kind.name).path == moved
        if not done:  # the store still has the old place: move the image back for the check
            image = site.images / f"{kind.name}.{kind.format}"
            moved.rename(image)
            check_host(site, _contents(kind))
            image.rename(moved)
            return False
        check_host(site, _contents(kind))
        return True

    return FileOperation(
        f"disk-adopt-{kind.name}",
        prepare,
        lambda site: ["disk", "adopt", site.images / f"moved.{kind.format}"],
        check,
        ("the store has this disk",),
    )


def _update(kind: Kind) -> FileOperation:
    target = "double" if kind.encryption_set == "double" else "other"

    def check(site: FileSite) -> bool:
        check_host(site, _contents(kind))
        with Backend.open(site.root) as backend:
            disk = backend.disks.get(kind.name)
            return disk.set_id == backend.sets.get(target).id

    return FileOperation(
        f"disk-update-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["disk", "update", kind.name, "--des", target],
        check,
    )


def _snapshot(kind: Kind) -> FileOperation:
    return FileOperation(
        f"snapshot-create-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["snapshot", "create", "new", "--disk", kind.name],
        lambda site: "new" in check_host(site, _contents(kind, new=content()), optional=["new"]),
        ("exist",),
    )


def _incremental_snapshot(kind: Kind) -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host(kind)
        site.cli("snapshot", "create", "before", "--disk", kind.name)

    return FileOperation(
        f"snapshot-create-incremental-{kind.name}",
        prepare,
        lambda _: ["snapshot", "create", "new", "--disk", kind.name, "--incremental"],
        lambda site: (
            "new" in check_host(site, _contents(kind, before=content(), new=content()), optional=["new"])
        ),
        ("exist",),
    )


def _from_snapshot(kind: Kind) -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host(kind)
        site.cli("snapshot", "create", "before", "--disk", kind.name)

    return FileOperation(
        f"snapshot-restore-{kind.name}",
        prepare,
        lambda _: ["snapshot", "restore", "before", "new"],
        lambda site: (
            "new" in check_host(site, _contents(kind, before=content(), new=content()), optional=["new"])
        ),
        ("exist",),
    )


def _image(kind: Kind) -> FileOperation:
    return FileOperation(
        f"image-create-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda _: ["image", "create", "new", "--disk", kind.name, "--version", "1"],
        lambda site: "new:1" in check_host(site, _contents(kind) | {"new:1": content()}, optional=["new:1"]),
        ("exist",),
    )


def _bring_image(kind: Kind) -> Callable[[FileSite], None]:
    def prepare(site: FileSite) -> None:
        site.bring_host(kind)
        site.cli("image", "create", "image", "--disk", kind.name, "--version", "1")

    return prepare


def _clone(kind: Kind) -> FileOperation:
    whole = _contents(kind, clone=content()) | {"image:1": content()}
    return FileOperation(
        f"disk-create-linked-{kind.name}",
        _bring_image(kind),
        lambda _: ["disk", "create", "clone", "--image", "image", "--linked"],
        lambda site: "clone" in check_host(site, whole, optional=["clone"]),
        ("exist",),
    )


def _image_delete(kind: Kind) -> FileOperation:
    """An image with its clone: after a kill, a clone never lacks its image."""

    def prepare(site: FileSite) -> None:
        _bring_image(kind)(site)
        site.cli("disk", "create", "clone", "--image", "image", "--linked")

    def check(site: FileSite) -> bool:
        more = {"clone": content(), "image:1": content()}
        found = check_host(site, _contents(kind) | more, optional=more)
        assert "image:1" in found or "clone" not in found, f"a clone without its image: {found}"
        return "image:1" not in found

    return FileOperation(
        f"image-delete-force-{kind.name}",
        prepare,
        lambda _: ["image", "delete", "image:1", "--force"],
        check,
        ("no image",),
    )


def _backup(kind: Kind, *options: str) -> FileOperation:
    """Each repetition makes a restore point of its own; all must be whole, or gone."""

    def check(site: FileSite) -> bool:
        check_host(site, _contents(kind))
        with Backend.open(site.root) as backend:
            points = backend.disks.all(DiskKind.RESTORE_POINT)
            for point in points:
                backend.restore_points.verify(point.name)
        names = {name for point in points for name in (point.path.name, f"{point.path.name}.json")}
        assert {path.name for path in site.out.iterdir()} == names
        return False

    return FileOperation(
        f"disk-backup{''.join(options)}-{kind.name}",
        lambda site: site.bring_host(kind),
        lambda site: ["disk", "backup", kind.name, site.out, *options],
        check,
    )


def _keep(
    name: str, arguments: list[str | Path], *kinds: Kind, refusals: tuple[str, ...] = ()
) -> FileOperation:
    """A command that leaves the disks as they are."""

    def check(site: FileSite) -> bool:
        check_host(site, _contents(*kinds))
        return False

    return FileOperation(name, lambda site: site.bring_host(*kinds), lambda _: arguments, check, refusals)


def _vault_rotation() -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host(*_of("customer"))
        with Backend.open(site.root) as backend:
            site.keys.rotate(backend.sets.get("customer").key.name)

    def check(site: FileSite) -> bool:
        check_host(site, _contents(*_of("customer")))
        with Backend.open(site.root) as backend:
            wanted = backend.sets.wanted_key(backend.sets.get("customer"))
            return {use.key for use in backend.keys.in_use()} == {wanted}

    return FileOperation("des-rotate-customer", prepare, lambda _: ["des", "rotate", "customer"], check)


def _platform_rotation() -> FileOperation:
    kinds = (*PLAIN, *_of("double"))

    def check(site: FileSite) -> bool:
        check_host(site, _contents(*kinds))
        with Backend.open(site.root) as backend:
            assert backend.keys.rewrap(PLATFORM_KEY).failed == {}
        check_host(site, _contents(*kinds))
        return False

    arguments: list[str | Path] = ["key", "rotate", "--provider", "platform-managed"]
    return FileOperation(
        "key-rotate-platform", lambda site: site.bring_host(*kinds), lambda _: arguments, check
    )


def _of(encryption_set: str) -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if kind.encryption_set == encryption_set)


def _sets(site: FileSite) -> set[str]:
    with Backend.open(site.root) as backend:
        return {each.name for each in backend.sets.all()}


def _des_create() -> FileOperation:
    def check(site: FileSite) -> bool:
        check_host(site, {})
        done = "new" in _sets(site)
        if done:
            site.grant("new")  # its identity is there
            with Backend.open(site.root) as backend:
                assert backend.host.config.identity(backend.sets.get("new").id).exists()
        return done

    return FileOperation(
        "des-create-customer",
        FileSite.bring_host,
        lambda site: ["des", "create", "new", "--key", f"{site.vault.url}/keys/any"],
        check,
        ("exists",),
    )


def _des_delete() -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host()
        site.cli("des", "create", "doomed", "--key", f"{site.vault.url}/keys/any")

    def check(site: FileSite) -> bool:
        check_host(site, {})
        return "doomed" not in _sets(site)

    return FileOperation(
        "des-delete", prepare, lambda _: ["des", "delete", "doomed"], check, ("no disk encryption set",)
    )


def _des_update() -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host(*_of("customer"))
        (site.out.parent / "url").write_text(site.keys.new_key())

    def check(site: FileSite) -> bool:
        check_host(site, _contents(*_of("customer")))
        return False

    return FileOperation(
        "des-update-key",
        prepare,
        lambda site: ["des", "update", "customer", "--key", (site.out.parent / "url").read_text()],
        check,
    )


def _store_backup() -> FileOperation:
    def check(site: FileSite) -> bool:
        check_host(site, _contents(*PLAIN))
        return is_whole_database(site.out / "backup")

    return FileOperation(
        "store-backup",
        lambda site: site.bring_host(*PLAIN),
        lambda site: ["store", "backup", site.out / "backup"],
        check,
        ("File exists",),
    )


def _store_restore() -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring_host(*PLAIN)
        site.cli("store", "backup", site.out / "backup")
        for path in site.state.glob("store.sqlite*"):
            path.unlink()

    def check(site: FileSite) -> bool:
        site.await_quiet()
        if (site.state / "store.sqlite").exists():
            check_host(site, _contents(*PLAIN))
            return True
        return False

    return FileOperation(
        "store-restore",
        prepare,
        lambda site: ["store", "restore", site.out / "backup"],
        check,
        ("the host has a store",),
    )


def _vault_init() -> FileOperation:
    def prepare(site: FileSite) -> None:
        site.bring("empty", lambda: None)

    def check(site: FileSite) -> bool:
        site.await_quiet()
        if not (site.state / "vault/vault.json").exists():
            return False
        administrator = site.out / f"a-{uuid.uuid4()}.json"
        site.cli("vault", "rescue", administrator.stem, "--file", administrator)
        return True

    return FileOperation("vault-init", prepare, lambda _: ["vault", "init"], check, ("already",))


def _vault_files(name: str, arguments: list[str], *, restores: bool = False) -> FileOperation:
    """A command on the files of a vault that is not served."""

    def prepare(site: FileSite) -> None:
        site.bring("vault", lambda: site.cli("vault", "init"))
        if restores:
            site.cli("vault", "backup", site.out / "file")
            for path in site.state.glob("vault/vault.sqlite*"):
                path.unlink()

    def check(site: FileSite) -> bool:
        site.await_quiet()
        if name == "vault-rescue":
            return (site.out / "file").exists()
        return is_whole_database(site.state / "vault/vault.sqlite" if restores else site.out / "file")

    refusals = ("has a database", "exists")
    return FileOperation(name, prepare, lambda site: [*arguments, site.out / "file"], check, refusals)


def _host_init() -> FileOperation:
    def check(site: FileSite) -> bool:
        site.await_quiet()
        site.cli("host", "init")
        site.cli("disk", "create", "new", "-s", "1M")
        check_host(site, {"new": b""})
        site.cli("disk", "delete", "new", "--purge")
        return True

    return FileOperation(
        "host-init", lambda site: site.bring("empty", lambda: None), lambda _: ["host", "init"], check
    )


def _hsm_init() -> FileOperation:
    def check(site: FileSite) -> bool:
        site.await_quiet()
        site.cli("host", "hsm", "init")
        site.cli("host", "hsm", "status")
        return True

    return FileOperation("hsm-init", FileSite.bring_host, lambda _: ["host", "hsm", "init"], check)


OPERATIONS: tuple[FileOperation, ...] = (
    *map(_create, KINDS),
    *map(_import, KINDS),
    *map(_export, KINDS),
    *(_resize(kind, size) for kind in KINDS[:4] for size in (2 * M, M // 2)),
    *map(_check, KINDS[2:4]),
    *map(_delete_for_a_time, KINDS[1:3]),
    *map(_recover, KINDS[1:3]),
    *map(_purge, KINDS[1:3]),
    *map(_delete, KINDS),
    *map(_reencrypt, KINDS[:6]),
    _reencrypt(KINDS[0], "--des", "double"),
    _reencrypt(KINDS[0], "--format", "raw"),
    *map(_adopt, KINDS[:6]),
    *map(_update, KINDS[:6]),
    *map(_snapshot, KINDS[:6]),
    *(_incremental_snapshot(kind) for kind in KINDS[:6] if kind.format == "qcow2"),
    *map(_from_snapshot, KINDS[2:4]),
    *map(_image, KINDS[2:4]),
    *map(_clone, KINDS[1:3]),
    *map(_image_delete, KINDS[1:3]),
    *map(_backup, KINDS[2:4]),
    *(_backup(kind, "--incremental") for kind in KINDS[2:4]),
    _platform_rotation(),
    _vault_rotation(),
    _keep("key-rotate-hsm", ["key", "rotate", "disks", "--provider", "hsm-simulated"], *_of("hsm")),
    _keep("key-rewrap", ["key", "rewrap", "--provider", "platform-managed"], *PLAIN),
    _keep(
        "hsm-create-key",
        ["host", "hsm", "create", "more", "--size", "2048"],
        *_of("hsm"),
        refusals=("already holds",),
    ),
    _des_create(),
    _des_delete(),
    _des_update(),
    _store_backup(),
    _store_restore(),
    _host_init(),
    _hsm_init(),
    _vault_files("vault-backup", ["vault", "backup"]),
    _vault_files("vault-restore", ["vault", "restore"], restores=True),
    _vault_files("vault-rescue", ["vault", "rescue", "second", "--file"]),
    _vault_init(),
)
