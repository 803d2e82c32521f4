"""Parsers of domain XML, on the way of the hook, and of names within."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from support.fuzzing import Parser, texts
from virt_sse.errors import VirtSseError
from virt_sse.libvirt.disk_chains import BackupJob
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.libvirt.secret_name import SecretName, exported_disk, plain_export
from virt_sse.libvirt.users import User
from virt_sse.libvirt.xml import parse_with_prefixes, to_text

_GOLDEN = Path(__file__).parents[2] / "golden"
_ID = "6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1"
_NVRAM = "<os firmware='efi'><nvram>/n</nvram></os><memory dumpCore='off'/><on_crash>destroy</on_crash>"
_DEVICES = f"""<disk type='network'><source protocol='nbd' name='x'><host transport='unix' socket='/s'/>
<reconnect delay='5'/></source><backingStore type='file'><source file='/b'/></backingStore>
<mirror job='copy' ready='yes'><source file='/m'><encryption><secret usage='virt-sse:{_ID}:a'/></encryption>
</source></mirror><target dev='vdb'/><alias name='a'/><readonly/></disk>
<disk type='network'><source protocol='nbd' name='virt-sse:{_ID}'><host transport='unix' socket='/s'/>
</source><mirror><source protocol='nbd' name='virt-sse:{_ID}'/></mirror><target dev='vdc'/></disk>
<disk type='volume' device='cdrom'><source pool='p' volume='v'/><target dev='sda'/></disk>
<tpm><backend type='emulator'><encryption secret='{_ID}'/></backend></tpm>
<serial type='file'><source path='/c'/><log file='/l'/></serial>
<memory model='nvdimm'><source><path>/p</path></source></memory>"""
_METADATA = """<metadata><virt-sse:vm xmlns:virt-sse="https://virt-sse.invalid/vm/1" encryption-at-host="on"
size="Standard_D2s_v3" temp-disk-size="10737418240" generation="1"/></metadata>"""
DOMAIN = (
    f"<domain type='kvm'><name>web</name><uuid>{_ID}</uuid>{_METADATA}{_NVRAM}<devices>"
    + (_GOLDEN / "disk-qcow2.xml").read_text()
    + f"{_DEVICES}</devices><seclabel model='dac'><label>+64055:+108</label></seclabel></domain>"
)
BACKUP = f"""<domainbackup><disks><disk name='vda' backup='yes' type='file'><target file='/t'/>
<scratch file='/s'><encryption><secret usage='virt-sse:{_ID}:a'/></encryption></scratch></disk></disks>
</domainbackup>"""
_WORDS = [
    b"virt-sse:",
    b"<domain>",
    b"</domain>",
    b"<uuid>",
    b"&#0;",
    b"&#xD800;",
    b"&lt;",
    b"<!DOCTYPE a []>",
]


def read_parts(domain: DomainDefinition) -> None:
    """Read each part of *domain*, and raise the first error at the end."""
    parts: list[Callable[[], object]] = [
        *(lambda: domain.uuid, lambda: domain.our_disks, lambda: domain.temp_disks),
        *(lambda: domain.vm_secrets, lambda: [(name.uuid, name.usage) for name in domain.secrets]),
        *(domain.disk_places, domain.disk_chains, lambda: domain.disk_chains(BackupJob.parse(BACKUP))),
        *(domain.free_target, lambda: domain.qemu_user, lambda: domain.stated),
        *(lambda: domain.has_encryption_at_host, lambda: domain.tpm_secret),
        *(lambda: domain.has_our_tpm_secret, lambda: domain.guest_data.disks()),
        *(lambda: domain.guest_data.persistent_memory(), lambda: domain.guest_data.console_files()),
        *(lambda: domain.guest_data.shared_folders(), lambda: domain.guest_data.uefi_variables),
    ]
    problems = []
    for part in parts:
        try:
            part()
        except VirtSseError as exc:
            problems.append(exc)
    if problems:
        raise problems[0]


def _parse(text: str) -> None:
    domain = DomainDefinition.parse(text)
    _ = domain.name, domain.mentions_us, repr(domain)
    edited = DomainEdit(domain).result()
    assert edited.name == domain.name.replace("\r", "\n")
    read_parts(domain)


def _salvage(text: str) -> None:
    domain = DomainDefinition.salvage(text)
    _ = domain.name, domain.mentions_us, repr(domain)
    assert all(part.isprintable() or part for part in domain.unreadable)
    for use in (*domain.our_disks, *domain.temp_disks):
        _ = use.secret and use.secret.uuid, use.placement
    with contextlib.suppress(VirtSseError):
        _ = domain.vm_secrets, [name.uuid for name in domain.secrets]
    with contextlib.suppress(VirtSseError):
        read_parts(domain)


def _backup(text: str) -> None:
    salvaged, _ = BackupJob.salvage(text)
    if salvaged is not None:
        salvaged.targets()
    BackupJob.parse(text).targets()


def _xml(text: str) -> None:
    root, prefixes = parse_with_prefixes(text, kind="XML")
    again, _ = parse_with_prefixes(to_text(root, prefixes), kind="XML")
    assert [each.tag for each in again.iter()] == [each.tag for each in root.iter()]


def _secret_name(text: str) -> None:
    name = SecretName.parse(text)
    if name is not None:
        _ = name.uuid
        assert SecretName.parse(name.usage) == name


def _export(text: str) -> None:
    disk_id = exported_disk(text)
    if disk_id is not None:
        assert exported_disk(plain_export(disk_id)) == disk_id


_SEEDS = [DOMAIN.encode()]
_EXPORTS = [f"virt-sse:{_ID}".encode(), _ID.encode()]
_USAGES = [f"virt-sse:{_ID}:service".encode(), f"virt-sse:{UUID(_ID).hex}:tpm".encode(), b"ceph"]
PARSERS = [
    Parser("xml", texts(_xml), [*_SEEDS, BACKUP.encode()], words=_WORDS),
    Parser("domain-xml", texts(_parse), _SEEDS, words=_WORDS),
    Parser("domain-xml-of-a-running-domain", texts(_salvage), _SEEDS, (), words=_WORDS),
    Parser("backup-xml", texts(_backup), [BACKUP.encode()], words=_WORDS),
    Parser("secret-usage-id", texts(_secret_name), _USAGES, (ValueError,), words=_WORDS[:1]),
    Parser("nbd-export", texts(_export), _EXPORTS, (ValueError,), words=_WORDS[:1]),
    Parser("dac-label", texts(User.parse), [b"+64055:+108", b"0:0"]),
]
