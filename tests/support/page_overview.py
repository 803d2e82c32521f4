"""Documents of the page for tests, with names as hostile as a domain's, an image's or a vault's may be."""

# ruff: noqa: E501 -- a table reads better unbroken
from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from virt_sse.page.document import (
    DiskPart,
    DomainDiskPart,
    DomainPart,
    EffectPart,
    FaultPart,
    HostPart,
    JobPart,
    KeyStatePart,
    LayerPart,
    Overview,
    SetPart,
    UsePart,
    WatchedDomainPart,
)

NOW = datetime(2026, 11, 27, 12, 30, 5, tzinfo=UTC)
PLATFORM, VAULT = "platform-managed:default", "customer-managed:https://vault-west.example.net/keys/orders"
VAULT_BILLING = "customer-managed:https://vault-west.example.net/keys/billing"
_OLD, _NEW = "0c3d8a51f7e24b6e9a70", "5b1e9f0a66d34c1f8d22"
_CUSTOMER, _PLATFORM = "EncryptionAtRestWithCustomerKey", "EncryptionAtRestWithPlatformKey"
_DOUBLE = "EncryptionAtRestWithPlatformAndCustomerKeys"


def disk(
    number: int, name: str, *layers: LayerPart, kind: str = "disk", state: str = "ready", **values: object
) -> DiskPart:
    fields = {
        "format": "qcow2",
        "path": f"/var/lib/libvirt/images/{name}.qcow2",
        "size": 64 << 30,
        "sku": "Premium_LRS",
        "encryption_type": _PLATFORM,
        "encryption_set": None,
        "caching": "None",
        "created": NOW - timedelta(days=number),
        "generation": 1,
    }
    fields |= values
    return DiskPart(id=UUID(int=number), name=name, kind=kind, state=state, layers=layers, **fields)  # type: ignore[arg-type]


def layer(
    key: str = PLATFORM, version: str = "1", *, process: str = "guest", slot: str = "service"
) -> LayerPart:
    cipher = "aes-256-xts" if process == "guest" else "aes-256-cbc-essiv:sha256"
    return LayerPart(process=process, cipher=cipher, slot=slot, key=key, version=version)


def used(target: str, of: DiskPart) -> DomainDiskPart:
    return DomainDiskPart(target=target, place=of.path, disk_id=of.id, is_encrypted=True, read_only=False)


def plain(target: str, place: str) -> DomainDiskPart:
    return DomainDiskPart(target=target, place=place, disk_id=None, is_encrypted=False, read_only=False)


def key_use(seq: int, key: str, version: str, of: DiskPart | None = None, **values: str | None) -> UsePart:
    moment = (NOW - timedelta(seconds=37 * (60 - seq))).isoformat(timespec="milliseconds")
    fields = {"component": "agent", "actor": "root(0),virt-sse[912]", "action": "unwrap", "domain": None}
    fields |= {"result": "allowed", "reason": None, "slot": "service" if of else None} | values
    disk_id = str(of.id) if of else None
    return UsePart(seq=seq, time=moment, key=key, version=version, disk=disk_id, **fields)  # type: ignore[arg-type]


def overview(**values: object) -> Overview:
    """A document with these parts; all others empty."""
    host = HostPart(
        name="host-a.example.net",
        version="0.1.0",
        began=(NOW - timedelta(days=3)).isoformat(),
        libvirt="qemu:///system",
        libvirt_connected=True,
        last_look=NOW.isoformat(),
        poll_seconds=2.0,
        surveyed=NOW,
    )
    return Overview(**({"time": NOW, "host": host} | values))  # type: ignore[arg-type]


def busy_host() -> Overview:
    """A host with something to show on every page."""
    orders = disk(
        1,
        "orders",
        layer(VAULT, _NEW),
        layer(PLATFORM, "3", process="storage", slot="infrastructure"),
        LayerPart(process="cache", detail="ReadOnly"),
        encryption_type=_DOUBLE,
        encryption_set="orders",
        caching="ReadOnly",
    )
    logs = disk(
        2, "orders-log", layer(VAULT, _OLD), encryption_type=_CUSTOMER, encryption_set="orders", size=8 << 30
    )
    billing = disk(
        3, "billing", layer(VAULT_BILLING, _NEW), encryption_type=_CUSTOMER, encryption_set="billing"
    )
    system = disk(4, "system", layer(PLATFORM, "3"), size=20 << 30)
    copy = disk(5, "orders-2026-11-26", layer(VAULT, _NEW), kind="snapshot", encryption_type=_CUSTOMER)
    new = disk(6, "mail", layer(PLATFORM, "3"), state="copying", size=256 << 30)
    domains = (
        DomainPart(
            id=UUID(int=101), name="orders-db", state="running", encryption_at_host=True,
            disks=(used("vda", orders), used("vdb", logs)),
        ),
        DomainPart(
            id=UUID(int=102), name="billing", state="paused", encryption_at_host=False, disks=(used("vda", billing),)
        ),
        DomainPart(
            id=UUID(int=103), name="mail", state="running", encryption_at_host=False,
            disks=(used("vda", new), plain("vdb", "/var/lib/libvirt/images/mail-scratch.raw")),
        ),
        DomainPart(id=UUID(int=104), name="web", state="off", encryption_at_host=False, disks=(used("vda", system),)),
        DomainPart(
            id=UUID(int=105), name="legacy-import", state="running", encryption_at_host=False,
            disks=(plain("sda", "/srv/images/legacy.img"),),
        ),
    )  # fmt: skip
    uses = (
        key_use(51, PLATFORM, "3", new, domain="mail", actor="root(0),sudo:alice,virt-sse[2210]", action="wrap"),
        key_use(52, VAULT, _NEW, orders, domain="orders-db"),
        key_use(53, PLATFORM, "3", orders, slot="infrastructure", domain="orders-db"),
        key_use(54, VAULT, _OLD, logs, domain="orders-db"),
        key_use(
            55, VAULT_BILLING, _NEW, billing, domain="billing", result="refused",
            reason="the key vault refuses: KeyDisabled: the key 'billing' is disabled",
        ),
        key_use(56, VAULT, _NEW, copy, component="host", actor="root(0),sudo:alice,virt-sse[2290]", action="wrap"),
    )  # fmt: skip
    sets = (
        SetPart(id=UUID(int=201), name="orders", key=VAULT, version=None, automatic_rotation=True, action="shutdown", grace_seconds=60),
        SetPart(id=UUID(int=202), name="billing", key=VAULT_BILLING, version=_NEW, automatic_rotation=False, action="pause", grace_seconds=0),
    )  # fmt: skip
    return overview(
        disks=(orders, logs, billing, system, copy, new),
        domains=domains,
        watched=(
            WatchedDomainPart(name="billing", revoked=uses[4].reason, paused=True, plaintext=()),
            WatchedDomainPart(name="mail", revoked=None, paused=False, plaintext=()),
            WatchedDomainPart(
                name="orders-db", revoked=None, paused=False,
                plaintext=("vdb: overlay /var/lib/libvirt/images/orders-log.snap1",),
            ),
        ),
        sets=sets,
        key_states=(
            KeyStatePart(key=VAULT, version=_NEW, state="enabled"),
            KeyStatePart(key=VAULT, version=_OLD, state="enabled"),
            KeyStatePart(key=VAULT_BILLING, version=_NEW, state="disabled"),
            KeyStatePart(key=PLATFORM, version="3", state="enabled"),
        ),
        effects=(
            EffectPart(key=VAULT, domain_id=UUID(int=101), action="shutdown", grace_seconds=60),
            EffectPart(key=PLATFORM, domain_id=UUID(int=101), action="shutdown", grace_seconds=60),
            EffectPart(key=PLATFORM, domain_id=UUID(int=103), action="shutdown", grace_seconds=60),
            EffectPart(key=VAULT_BILLING, domain_id=UUID(int=102), action="pause", grace_seconds=0),
        ),
        jobs=(
            JobPart(kind="re-encryption", subject="mail", detail="copying, online, as vda", fraction=0.634),
            JobPart(kind="encryption in place", subject="archive", detail="copying, offline"),
        ),
        uses=uses,
        last_uses=uses,
        records_read=56,
        faults=(
            FaultPart(
                part="disk system", problem="other users may write /srv/images (mode 0777)", remedy="chmod go-w /srv/images"
            ),
        ),
    )  # fmt: skip


HOSTILE = (
    "<script>alert(1)</script>",
    "\"' onmouseover='alert(1)' x=\"",
    "\u202egnp.kcatta\u2066",
    "a" * 4000,
    "\x00\x1b[31m\n\x7f",
    "\udcff\udc80 not UTF-8",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "</title></style><svg onload=alert(1)>",
    "&lt;b&gt;",
)


def hostile_host(name: str) -> Overview:
    """A host where every text is *name*."""
    text = {
        "format": name,
        "path": name,
        "sku": name,
        "encryption_type": name,
        "encryption_set": name,
        "caching": name,
    }
    only = disk(
        1,
        name,
        LayerPart(process=name, detail=name, cipher=name, slot=name, key=f"p:{name}", version=name),
        LayerPart(process="cache", detail=name),
        kind=name,
        state=name,
        **text,
    )
    unknown = disk(2, name, problem=name, **text)
    use = UsePart(
        seq=1, time="2026-11-27T12:00:00+00:00", component=name, actor=name, action=name, key=f"p:{name}",
        version=name, disk=str(only.id), slot=name, domain=name, result=name, reason=name,
    )  # fmt: skip
    return overview(
        disks=(only, unknown),
        domains=(
            DomainPart(
                id=UUID(int=101), name=name, state="running", encryption_at_host=False,
                disks=(
                    DomainDiskPart(target=name, place=name, disk_id=only.id, is_encrypted=True, read_only=False),
                    DomainDiskPart(target=name, place=name, disk_id=UUID(int=2), is_encrypted=True, read_only=False),
                    DomainDiskPart(target=name, place=name, disk_id=UUID(int=9), is_encrypted=True, read_only=False),
                    plain(name, name),
                ),
            ),
        ),
        watched=(WatchedDomainPart(name=name, revoked=name, paused=True, plaintext=(name,)),),
        sets=(SetPart(id=UUID(int=3), name=name, key=f"p:{name}", version=name, automatic_rotation=True, action=name, grace_seconds=1),),
        key_states=(KeyStatePart(key=f"p:{name}", version=name, state=name),),
        effects=(EffectPart(key=f"p:{name}", domain_id=UUID(int=101), action=name, grace_seconds=1),),
        jobs=(JobPart(kind=name, subject=name, detail=name, fraction=0.5),),
        uses=(use,),
        last_uses=(use,),
        records_read=1,
        faults=(FaultPart(part=name, problem=name, remedy=name),),
    )  # fmt: skip
