"""Every key provider under every encryption type, with encryption at host and without: a guest writes and
verifies, and what runs is what was asked for.
"""

from __future__ import annotations

import contextlib
import json
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from support.agent_site import prepared
from support.customer_keys import RIGHTS, CustomerKeys
from support.images import contains, require
from support.stage_site import CONFIG, StageSite
from support.waiting import wait_until
from virt_sse.config import Config
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import BOOT_SECTOR_TEXT, boot_sector_image
from virt_sse.lab.tokens import LabHsm
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import EncryptionType, HostCaching
from virt_sse.pkcs11.token import KeyKind
from virt_sse.pkcs11.versions import VersionedKeys
from virt_sse.vault_client.permissions import Role

PROVIDERS = ("platform-managed", "customer-managed", "hsm-simulated")
SINGLE, DOUBLE = EncryptionType.CUSTOMER_KEY, EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
AT_ONCE = 3


@dataclass(frozen=True, slots=True)
class Case:
    """:ivar caching: what the host caches of the guest's disk; something, with encryption at host."""

    provider: str
    encryption_type: EncryptionType
    caching: HostCaching
    image_format: DiskFormat

    @property
    def at_host(self) -> bool:
        return self.caching is not HostCaching.NONE

    def __str__(self) -> str:
        at_host = f"at host, {self.caching.value}" if self.at_host else "not at host"
        return f"{self.provider}, {self.encryption_type.value}, {at_host}, {self.image_format.value}"


def _cases() -> Iterator[Case]:
    formats, cachings = tuple(DiskFormat), (HostCaching.READ_ONLY, HostCaching.READ_WRITE)
    for number, provider in enumerate(PROVIDERS):
        for kind in (SINGLE, DOUBLE):
            yield Case(provider, kind, HostCaching.NONE, formats[(number + (kind is DOUBLE)) % 2])
            yield Case(provider, kind, cachings[(number + (kind is DOUBLE)) % 2], formats[number % 2])


class MatrixSite(StageSite):
    """:ivar sets: the names of disk encryption sets, by provider and type."""

    sets: dict[tuple[str, EncryptionType], str]

    def prepare(self, case: Case) -> tuple[Guest, Disk]:
        """A guest that is as the case says, defined."""
        disk = self.backend.transfer.import_image(
            NewDisk(
                name=f"m{uuid.uuid4().hex[:8]}",
                format=case.image_format,
                encryption_set=self.sets[case.provider, case.encryption_type],
            ),
            boot_sector_image(stays=True),
            source_format="raw",
        )
        guest = self.guest(disk)
        if case.at_host:
            at_host = ("--encryption-at-host", "on", "--temp-disk-size", "4M")
            caching = ("--disk-caching", f"vda={case.caching.value}")
            self.virt_sse("vm", "update", guest.name, *at_host, *caching)
        return guest, disk

    def left(self) -> dict[str, Sequence[object]]:
        temporary = list(Config.load(self.host.root).temp_disk_directory.glob("*"))
        return super().left() | ({"temporary": temporary} if temporary else {})


@pytest.fixture(scope="module")
def site(
    lab_host: LabHost, lab_vault: LabVault, lab_hsm: LabHsm, acceleration: Callable[[str], Acceleration]
) -> Iterator[MatrixSite]:
    require("qemu-storage-daemon", "nbdkit")
    how = acceleration("boot-sector")
    with contextlib.ExitStack() as stack:
        token = stack.enter_context(lab_hsm.token())
        administrator = VersionedKeys(token.open())
        stack.callback(administrator.token.close)
        administrator.create("matrix", KeyKind.RSA, 2048)
        options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in token.options.items())
        config = f"{CONFIG}[key-providers.hsm-simulated]\n{options}"
        backend = stack.enter_context(prepared(lab_host, config))
        site = MatrixSite(lab_host, backend, how)
        stack.enter_context(LabAgent(lab_host))

        folder = lab_host.directory / f"identities-{uuid.uuid4().hex[:8]}"
        keys = stack.enter_context(CustomerKeys(lab_vault, folder))
        credential = backend.host.config.operator_credential
        credential.unlink(missing_ok=True)
        name = f"host-{uuid.uuid4().hex[:8]}"
        keys.administration.new_credential_file(credential, name, role=Role.IDENTITY_OPERATOR)
        key = {
            "platform-managed": "default",
            "customer-managed": keys.new_key(),
            "hsm-simulated": "matrix",
        }
        site.sets = {}
        for provider in PROVIDERS:
            for kind in (SINGLE, DOUBLE):
                made = backend.sets.create(
                    f"s{uuid.uuid4().hex[:8]}", provider=provider, key=key[provider], encryption_type=kind
                )
                if made.identity:
                    keys.administration.set_permissions(made.identity, RIGHTS)
                site.sets[provider, kind] = made.name
        yield site
        site.forget_domains()


def test_every_kind_of_disk_keeps_a_guests_data_encrypted_as_asked(site: MatrixSite) -> None:
    """All in one, because they run at the same time."""
    cases = list(_cases())
    assert len({(case.provider, case.encryption_type, case.at_host) for case in cases}) == 12
    failed = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for case, outcome in zip(cases, pool.map(lambda case: _try(site, case), cases), strict=True):
            if outcome:
                failed[str(case)] = outcome
    assert not failed, "\n".join(f"{case}: {outcome}" for case, outcome in failed.items())
    assert site.left() == {}


def _try(site: MatrixSite, case: Case) -> str:
    """Why the case is not as it should be; nothing when it is."""
    try:
        _run(site, case)
    except Exception:  # noqa: BLE001 -- told together with the others'
        return traceback.format_exc()
    return ""


def _run(site: MatrixSite, case: Case) -> None:
    guest, disk = site.prepare(case)
    with contextlib.closing(site.host.connect()) as connection:
        connection.lookupByName(guest.name).create()
    assert "verified 8 sectors, ok" in guest.wait_for("boot-sector: done")
    verdict = json.loads(site.virt_sse("vm", "verify", guest.name, "-o", "json"))
    assert (verdict["as-asked"], verdict["runs"], verdict["encryption-at-host"]) == (True, True, case.at_host)
    found, *others = verdict["disks"]
    assert (found["disk"], found["caching"]) == (disk.name, case.caching.value)
    assert len(others) == case.at_host  # the temporary disk
    _check_layers(found, case, disk)
    guest.destroy()
    wait_until(lambda: site.backend.host.stages.record(disk.id) is None, "the stages' record is gone")
    assert disk.path.stat().st_uid == 0
    assert not contains([disk.path], BOOT_SECTOR_TEXT)
    site.backend.disks.check(disk.name)
    site.backend.disks.erase(disk)  # later tests on this host have neither its token nor its vault


def _check_layers(found: dict[str, Any], case: Case, disk: Disk) -> None:
    """Each layer is there, with the cipher and under the key that the disk was made with, and no other."""
    layers = {layer["slot"]: layer for layer in found["layers"] if layer["slot"]}
    assert list(layers) == [entry.slot for entry in disk.deks]
    assert len(layers) == (2 if case.encryption_type is DOUBLE else 1)
    for entry in disk.deks:
        assert layers[entry.slot]["key"] == str(entry.wrapped.key)
        assert layers[entry.slot]["cipher"] == str(entry.cipher)
    assert disk.deks[0].wrapped.key.provider == case.provider
    assert disk.deks[-1].wrapped.key.provider in ("platform-managed", case.provider)
    caches = [layer for layer in found["layers"] if layer["where"] == "host cache"]
    assert len(caches) == case.at_host
    assert [place for place in found["places"] if place["is-plaintext"]] == []
    assert found["places"]
