"""Through a whole life of disks, no secret lies anywhere but in the places that the threat model lists."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from soak.kill_points import KillBy, KillPoint, run
from support import images
from support.agent_site import CustomerSite
from support.canaries import Canaries
from support.command_line import PROGRAM
from support.lab_operator import Operator
from virt_sse.host.backup import back_up_store
from virt_sse.lab.guests import Guest
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.lab.tokens import LabHsm
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.keys import Dek
from virt_sse.vault.backup import back_up
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.credential_file import CredentialFile

PLAINTEXT = b"canary of the guest: " + os.urandom(16).hex().encode()


def volume_key(image: Path, dek: bytes) -> bytes:
    done = subprocess.run(
        ["cryptsetup", "luksDump", "--dump-volume-key", "--batch-mode", "--key-file", "-", image],
        input=dek,
        capture_output=True,
        check=True,
    )
    _, _, dump = done.stdout.decode().partition("MK dump:")
    return bytes.fromhex(dump)


def header_of_tokens(vault: LabVault) -> bytes:
    """The header that all access tokens of a vault share, as its base64 decodes."""
    with contextlib.closing(VaultCredential(vault.administrator_path)) as credential:
        header, _, _ = credential.token().partition(".")
    return base64.urlsafe_b64decode(header + "=" * (-len(header) % 4))


def dek_of(site: CustomerSite, disk: Disk) -> Dek:
    current = site.backend.disks.get(disk.name)
    (entry,) = current.deks
    return site.backend.host.keys.unwrap_slot(current, entry.slot)


@pytest.mark.slow
def test_no_secret_is_where_the_threat_model_has_none(
    site: CustomerSite, lab_vault: LabVault, lab_hsm: LabHsm, tmp_path: Path
) -> None:
    images.require("cryptsetup", "strace")
    assert lab_hsm.module
    backend, root, vault = site.backend, site.host.root, lab_vault.directory
    operator = Operator(site.host)
    source = tmp_path / "source"
    guest_image = boot_sector_image(stays=True).read_bytes()
    source.write_bytes(guest_image + PLAINTEXT + bytes(1 << 20))

    operator.virt_sse("host", "hsm", "init")
    operator.virt_sse("host", "hsm", "create", "canary", "--size", "2048")
    in_hsm = backend.sets.create("canary-hsm", provider="hsm-simulated", key="canary")
    in_vault = site.new_set()
    disks = [
        backend.transfer.import_image(
            NewDisk(name=f"canary-{number}", format=DiskFormat.RAW, encryption_set=name),
            source,
            source_format="raw",
        )
        for number, name in enumerate((in_vault.name, in_hsm.name, None))
    ]
    elements = [
        backend.domains.disk_element(disk.name, target=f"vd{letter}")
        for disk, letter in zip(disks, "abc", strict=True)
    ]
    guest = Guest(site.host, "canary", acceleration=site._acceleration, disks=elements)
    guest.define()
    guest.start()

    backend.keys.rotate(PLATFORM_KEY)
    site.keys.rotate(in_vault.key.name)
    assert backend.sets.rotate(in_vault.name).failed == {}
    site.agent.kill()
    command = [PROGRAM, "disk", "create", "killed", "-s", "1M", "--path", site.host.images / "killed"]
    killed = run(KillPoint(KillBy.CALL, 1, "linkat").around(command), environment=site.host.environment)
    assert killed.killed
    site.agent.start()
    backend.transfer.import_image(NewDisk(name="copy", format=DiskFormat.RAW), source, source_format="raw")
    disks.append(backend.disks.get("copy"))
    backend.transfer.export("copy", tmp_path / "exported", destination_format="raw")
    assert PLAINTEXT in (tmp_path / "exported").read_bytes()
    back_up_store(backend.host.config, root / "store.backup")
    back_up(VaultDirectory(vault), vault / "vault.backup")

    state = root / "var/lib/virt-sse"
    canaries = Canaries()
    canaries.add("plaintext", PLAINTEXT)
    canaries.add("access token", header_of_tokens(lab_vault))
    for disk in disks:
        dek = dek_of(site, disk)
        canaries.add(f"DEK of {disk.name}", dek.material)
        canaries.add(f"volume key of {disk.name}", volume_key(disk.path, dek.passphrase))
    for path in (state / "platform-managed/root.key", vault / "root.key"):
        canaries.add(str(path), path.read_bytes())
    for path in (state / "hsm-simulated/pin", state / "hsm-simulated/so-pin"):
        canaries.add(str(path), path.read_bytes().strip())
    for path in (*(state / "identities").glob("*.json"), lab_vault.administrator_path):
        body = CredentialFile.read(path).private_key.splitlines()[1:-1]
        canaries.add(str(path), "".join(body).encode()[:60])

    kept_in_files = {Path(name) for name in canaries.names() if name.startswith("/")}
    for moment in ("running", "ended"):
        found = canaries.in_files(root, vault)
        assert {name: paths for name, paths in found.items() if paths != {Path(name)}} == {}, moment
        assert set(map(Path, found)) == kept_in_files, moment  # the search finds what there is
        assert canaries.in_processes() == {}, moment
        if moment == "running":
            guest.destroy()
