"""Customer-managed keys, in a real vault: unwraps, rotation, a domain's start, and its end by revocation."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from domain import set_by_hand, start_and_destroy
from hosts import dek_of, prepared_host, private_backend
from measurement import Measurement, Row, Run, Target, Unit, seconds
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disks import NewDisk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.permissions import Permission, Role

_USE = (Permission.GET, Permission.WRAP_KEY, Permission.UNWRAP_KEY)
_CLIENTS = 8


def measure(bench: Run) -> Iterator[Row]:
    """Measure unwraps and a rotation without a domain, then domains under the agent."""
    with LabVault(premium=True) as vault:
        with private_backend(bench.scratch / "customer") as backend:
            yield _unwraps(bench, backend, _new_set(vault, backend, 2048), "RSA")
            yield _unwraps(bench, backend, _new_set(vault, backend, 2048, "--hsm"), "RSA-HSM")
            yield _rewrap(bench, vault, backend, _new_set(vault, backend, 3072))
        with prepared_host() as (host, backend), LabHost() as peer, LabAgent(host):
            encryption_set = _new_set(vault, backend, 2048)
            yield _start(bench, host, backend, peer, encryption_set)
            yield _revocation(bench, vault, host, backend, encryption_set)


def _new_set(vault: LabVault, backend: Backend, size: int, *options: str) -> EncryptionSet:
    """A new disk encryption set, under a new key of *size* bits; its identity may use the key.

    :param options: further options of ``virt-sse key create``.
    """
    name = f"rsa-{size}-{os.urandom(4).hex()}"
    _key(vault, "create", name, "--size", str(size), *options)
    operator = backend.host.config.operator_credential
    with VaultClient(vault.administrator_path) as administrator:
        if not operator.exists():
            operator.parent.mkdir(parents=True, exist_ok=True)
            administrator.new_credential_file(operator, f"host-{name}", role=Role.IDENTITY_OPERATOR)
        made = backend.sets.create(
            name, provider="customer-managed", key=f"{vault.url}/keys/{name}", grace_seconds=0
        )
        administrator.grant(str(made.identity), _USE)
    return made


def _key(vault: LabVault, *arguments: str) -> None:
    """Run ``virt-sse key`` as the vault's administrator."""
    command = [str(Path(sys.executable).with_name("virt-sse")), "key", *arguments]
    command += ["--credential", str(vault.administrator_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"virt-sse key {arguments[0]}: {done.stderr.strip()}")


def _unwraps(bench: Run, backend: Backend, encryption_set: EncryptionSet, kind: str) -> Row:
    """Unwrap over persistent TLS, several clients at once; against the bare private operation, in process.

    :param kind: the key's type, in Azure's words.
    """
    count = bench.amount(2000, quick=400)
    disk = backend.disks.create(
        NewDisk(name=f"unwraps-{kind}", size=1 << 20, encryption_set=encryption_set.name)
    )
    entry = disk.deks[0]
    provider = backend.host.plugins.key_provider(entry.wrapped.key.provider, encryption_set.id)

    def unwrap(_: int) -> None:
        provider.unwrap(entry.wrapped, context=disk.context(entry.slot))

    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(unwrap, range(_CLIENTS)))
        ours = count / seconds(lambda: list(pool.map(unwrap, range(count))))
    key = rsa.generate_private_key(65537, 2048)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    ciphertext = key.public_key().encrypt(bytes(64), oaep)
    bare = count / seconds(lambda: [key.decrypt(ciphertext, oaep) for _ in range(count)])
    return Row(
        "customer/unwrap" if kind == "RSA" else "customer/unwrap-hsm",
        f"unwrap at the vault, {kind} 2048, {_CLIENTS} clients",
        Measurement(ours, Unit.PER_SECOND),
        Measurement(bare, Unit.PER_SECOND),
        "cryptography, in process",
    )


def _rewrap(bench: Run, vault: LabVault, backend: Backend, encryption_set: EncryptionSet) -> Row:
    """Rotate a set's key for many disks; against the bare calls to the vault."""
    count = bench.amount(300, quick=50)
    for index in range(count):
        backend.disks.create(NewDisk(name=f"disk-{index}", size=1 << 20, encryption_set=encryption_set.name))
    _key(vault, "rotate", encryption_set.key.name.rpartition("/")[2])
    took = seconds(lambda: _rotate(backend, encryption_set, count))
    disk = backend.sets.disks(encryption_set.name)[0]
    entry, context = disk.deks[0], disk.context(disk.deks[0].slot)
    provider = backend.host.plugins.key_provider(entry.wrapped.key.provider, encryption_set.id)

    def call() -> None:
        provider.wrap(provider.unwrap(entry.wrapped, context=context), entry.wrapped.key, context=context)

    bare = seconds(lambda: [call() for _ in range(count)])
    return Row(
        "customer/rewrap",
        f"rotate a customer's key, RSA-3072, {count} disks",
        Measurement(took / count, Unit.SECONDS),
        Measurement(bare / count, Unit.SECONDS),
        "bare unwrap and wrap at the vault, per disk",
        Target(seconds=0.015),
    )


def _rotate(backend: Backend, encryption_set: EncryptionSet, count: int) -> None:
    report = backend.sets.rotate(encryption_set.name)
    if report.rewrapped != count:
        raise LabError(f"{report.rewrapped} of {count} disks were rewrapped")


def _start(bench: Run, host: LabHost, backend: Backend, peer: LabHost, encryption_set: EncryptionSet) -> Row:
    """Start a domain as in the benchmark ``domain``, but with the agent and a key in the vault."""
    how = acceleration.probe("boot-sector", slow_kvm=True)
    source = recipes.boot_sector_image(stays=True)
    disk = backend.transfer.import_image(
        NewDisk(name="boot", encryption_set=encryption_set.name), source, source_format="raw"
    )
    element = backend.domains.disk_element("boot")
    with closing(host.connect()) as here, closing(peer.connect()) as there:
        by_hand = set_by_hand(there, peer, element, disk.path, dek_of(backend, disk))
        domains = [
            here.defineXML(Guest(host, "bench", acceleration=how, disks=[element]).xml()),
            there.defineXML(Guest(peer, "bench", acceleration=how, disks=[by_hand]).xml()),
        ]
        turns = [[start_and_destroy(each) for each in domains] for _ in range(bench.amount(11, quick=4))]
    with_agent, without = (Measurement.median([turn[side][0] for turn in turns[1:]]) for side in (0, 1))
    return Row(
        "customer/start",
        f"start a domain under the agent ({how.domain_type})",
        with_agent,
        without,
        "secret set by hand, no hook",
        Target(seconds=without.value + 0.15),
        details={"difference_ms": (with_agent.value - without.value) * 1000},
    )


def _revocation(
    bench: Run, vault: LabVault, host: LabHost, backend: Backend, encryption_set: EncryptionSet
) -> Row:
    """Time from the end of ``key disable`` until libvirt reports the guest as shut off."""
    name = encryption_set.key.name.rpartition("/")[2]
    guest = Guest(
        host,
        "bench",
        acceleration=acceleration.probe("boot-sector", slow_kvm=True),
        disks=[backend.domains.disk_element("boot")],
    )
    samples = []
    for _ in range(bench.amount(5, quick=2)):
        guest.start()
        time.sleep(1)
        _key(vault, "disable", name)
        samples.append(seconds(lambda: guest.wait_shutoff(timeout=30)))
        _key(vault, "enable", name)
    with contextlib.suppress(LabError):
        guest.undefine()
    return Row(
        "customer/revocation",
        "from 'key disable' to shut off",
        Measurement.median(samples),
        target=Target(seconds=5),
        details={"longest_s": max(samples)},
    )
