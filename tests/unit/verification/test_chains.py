from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.disk_chains import BackupJob, DiskChain
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.verification import chains
from virt_sse.verification.chains import LinkKind, PlaintextLink, may_be_ours

DISK = UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")
USAGE = SecretName(DISK, "service").usage
OURS = f"<encryption format='luks'><secret type='passphrase' usage='{USAGE}'/></encryption>"
THEIRS = "<encryption format='luks'><secret type='passphrase' usage='other'/></encryption>"


def disk_chains(xml: str, backup: str | None = None) -> list[DiskChain]:
    job = BackupJob.parse(backup) if backup is not None else None
    return DomainDefinition.parse(xml).disk_chains(job)


def plaintext_links(
    xml: str, backup: str | None = None, *, known: Mapping[str, UUID] | None = None
) -> list[PlaintextLink]:
    job = BackupJob.parse(backup) if backup is not None else None
    return chains.plaintext_links(DomainDefinition.parse(xml), job, known=known, guest_socket=guest_socket)


def guest_socket(disk_id: UUID) -> Path:
    return Path(f"/run/virt-sse-disks/{disk_id}/guest/nbd")


def source(file: str, encryption: str = "") -> str:
    return f"<source file='{file}' index='3'>{encryption}</source>"


def backing(file: str, encryption: str = "", below: str = "<backingStore/>") -> str:
    return f"<backingStore type='file' index='1'>{source(file, encryption)}{below}</backingStore>"


def domain(*parts: str) -> str:
    disk = f"<disk type='file'>{''.join(parts)}<target dev='vda'/><alias name='virtio-disk0'/></disk>"
    return f"<domain><devices>{disk}</devices></domain>"


def found(xml: str, backup: str | None = None) -> list[tuple[LinkKind, str]]:
    links = plaintext_links(xml, backup)
    assert all((link.disk_id, link.target) == (DISK, "vda") for link in links)
    return [(link.kind, link.place) for link in links]


def test_the_chain_of_an_ordinary_disk_has_no_plaintext_link() -> None:
    xml = domain(source("/ours", OURS), "<backingStore/>")
    assert found(xml) == []
    (chain,) = disk_chains(xml)
    assert (chain.ours, chain.alias, chain.links[0].slot) == (0, "virtio-disk0", "service")


def test_a_transient_disk_gets_a_plaintext_overlay() -> None:
    assert found(domain(source("/ours", OURS), "<transient/>")) == [(LinkKind.OVERLAY, "of <transient/>")]
    running = domain(source("/ours.TRANSIENT"), backing("/ours", OURS), "<transient/>")
    assert found(running) == [(LinkKind.OVERLAY, "/ours.TRANSIENT")]
    assert found(domain(source("/ours", THEIRS), "<transient/>")) == []


def test_files_that_the_guest_writes_without_encryption_are_found_in_every_role() -> None:
    def written(*parts: str) -> list[str]:
        (chain,) = disk_chains(domain(*parts))
        return [link.place for link in chain.written_as_plain]

    assert written(source("/ours", OURS)) == []
    assert written(source("/top"), backing("/below")) == ["/top", "/below"]
    assert written(source("/top"), "<readonly/>") == []
    assert written("<source pool='p' volume='v'/>") == ["p v"]
    assert written(source("/ours", OURS), f"<mirror type='file'>{source('/copy')}</mirror>") == ["/copy"]


def test_plaintext_overlays_and_backing_files_are_found() -> None:
    below = backing("/ours", OURS, backing("/base"))
    xml = domain(source("/two"), backing("/one", below=below))
    assert found(xml) == [
        (LinkKind.OVERLAY, "/two"),
        (LinkKind.OVERLAY, "/one"),
        (LinkKind.BACKING, "/base"),
    ]
    (chain,) = disk_chains(xml)
    assert [link.index for link in chain.links] == ["3", "1", "1", "1"]


def test_images_encrypted_by_others_are_no_plaintext() -> None:
    assert found(domain(source("/overlay", THEIRS), backing("/ours", OURS))) == []
    assert (
        found(domain(source("/ours", OURS), f"<mirror job='copy'>{source('/copy', THEIRS)}</mirror>")) == []
    )


def test_disks_that_are_not_ours_are_ignored() -> None:
    assert found(domain(source("/plain"), backing("/base"))) == []
    assert found(domain(source("/plain", THEIRS), f"<mirror job='copy'>{source('/copy')}</mirror>")) == []
    assert disk_chains("<domain><devices><disk device='cdrom'/></devices></domain>") == []


def test_a_copy_is_a_mirror_and_a_commit_is_none() -> None:
    def mirror(job: str) -> str:
        return f"<mirror type='file' job='{job}' ready='yes'>{source('/copy')}</mirror>"

    assert found(domain(source("/ours", OURS), mirror("copy"))) == [(LinkKind.MIRROR, "/copy")]
    committing = domain(source("/overlay"), backing("/ours", OURS), mirror("active-commit"))
    assert found(committing) == [(LinkKind.OVERLAY, "/overlay")]
    assert disk_chains(committing)[0].mirror_ready


@pytest.mark.parametrize("place", ["target", "scratch"])
def test_a_plaintext_backup_is_found_and_an_encrypted_one_is_not(place: str) -> None:
    def backup(name: str, encryption: str = "", **attributes: str) -> str:
        said = "".join(f" {key}='{value}'" for key, value in attributes.items())
        inner = f"<{place} file='/backup'>{encryption}</{place}>"
        return f"<domainbackup><disks><disk name='{name}'{said}>{inner}</disk></disks></domainbackup>"

    xml = domain(source("/ours", OURS))
    assert found(xml, backup("vda")) == [(LinkKind.BACKUP, "/backup")]
    assert found(xml, backup("vda", THEIRS)) == []
    (chain,) = disk_chains(xml, backup("vda", OURS))
    assert [link.disk_id for link in chain.backup] == [DISK]
    assert found(xml, backup("vdb")) == []
    assert found(xml, backup("vda", backup="no")) == []


def export(disk_id: UUID = DISK, *, socket: Path | None = None) -> str:
    host = f"<host transport='unix' socket='{socket or guest_socket(disk_id)}'/>"
    return f"<source protocol='nbd' name='virt-sse:{disk_id}' index='3'>{host}</source>"


def test_the_export_of_a_disk_that_is_decrypted_below_qemu_is_no_plaintext_link() -> None:
    xml = domain(export(), "<backingStore/>")
    assert found(xml) == []
    (chain,) = disk_chains(xml)
    assert (chain.ours, chain.disk_id, chain.links[0].slot, chain.links[0].is_encrypted) == (
        0,
        DISK,
        None,
        False,
    )


def test_every_other_image_with_data_of_such_a_disk_is_a_plaintext_link() -> None:
    place = str(guest_socket(DISK))
    below = f"<backingStore type='network' index='1'>{export()}</backingStore>"
    assert found(domain(source("/overlay"), below)) == [(LinkKind.OVERLAY, "/overlay")]
    assert found(domain(source("/overlay", OURS), below)) == []
    copied = f"<mirror job='copy'>{source('/copy')}</mirror>"
    assert found(domain(export(), copied)) == [(LinkKind.MIRROR, "/copy")]
    backup = "<domainbackup><disks><disk name='vda'><target file='/backup'/></disk></disks></domainbackup>"
    assert found(domain(export()), backup) == [(LinkKind.BACKUP, "/backup")]
    committed = f"<mirror job='active-commit'>{export()}</mirror>"
    assert found(domain(source("/overlay"), below, committed)) == [(LinkKind.OVERLAY, "/overlay")]
    assert place not in str(plaintext_links(domain(source("/overlay"), below)))


def test_a_name_alone_does_not_make_an_export_ours() -> None:
    strange = Path("/srv/strange")
    assert found(domain(export(socket=strange))) == [(LinkKind.SUBSTITUTE, str(strange))]
    forged = f"<mirror job='copy'>{export(socket=strange)}</mirror>"
    assert found(domain(export(), forged)) == [(LinkKind.MIRROR, str(strange))]
    other = f"<mirror job='copy'>{export(UUID(int=7), socket=guest_socket(DISK))}</mirror>"
    assert found(domain(export(), other)) == [(LinkKind.MIRROR, str(guest_socket(DISK)))]
    as_file = f"<source protocol='nbd' name='virt-sse:{DISK}' file='{guest_socket(DISK)}'/>"
    assert found(domain(as_file)) == [(LinkKind.SUBSTITUTE, str(guest_socket(DISK)))]


def test_an_image_in_the_place_of_a_disk_is_known_by_the_serial() -> None:
    copied = domain(source("/copy"), f"<serial>{DISK.hex[:20]}</serial>")
    assert may_be_ours(copied)
    assert not may_be_ours(domain(source("/copy"), "<serial>WD-1</serial>"))
    assert plaintext_links(copied) == []
    (link,) = plaintext_links(copied, known={"another": UUID(int=1), DISK.hex[:20]: DISK})
    assert (link.kind, link.place, link.disk_id) == (LinkKind.SUBSTITUTE, "/copy", DISK)
    assert str(link) == "vda: image in its place /copy"


def test_places_that_are_no_files_are_named() -> None:
    host = "<host transport='unix' socket='/socket'/>"
    remote = "<source protocol='rbd' name='pool/image'><host name='monitor'/></source>"
    for given, place in (
        (f"<source protocol='nbd'>{host}</source>", "/socket"),
        ("<source dev='/dev/sdb'/>", "/dev/sdb"),
        (remote, "rbd:pool/image"),
        ("<source protocol='iscsi' name='iqn'><host name='target'/></source>", "iscsi iqn target"),
        ("<source/>", "an unnamed source"),
    ):
        assert found(domain(given, backing("/ours", OURS))) == [(LinkKind.OVERLAY, place)]
        assert not disk_chains(domain(given))[0].links[0].is_file


@pytest.mark.parametrize("text", ["", "<domain>", domain(source("/x", OURS.replace(str(DISK), "nonsense")))])
def test_invalid_xml_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match=r"invalid domain XML|names an unknown secret"):
        plaintext_links(text)
