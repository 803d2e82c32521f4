"""The demo: guests boot from encrypted disks on a private libvirt host, and then the host is searched.

What it says was found out by looking: it reads the raw images, asks QEMU for its block graph and libvirt for
its secrets, and fails if any of that is not as it should be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from virt_sse.cli.output import OutputFormat, print_rows
from virt_sse.errors import LabError, VirtSseError, report
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost

_TEXT = b"the quick brown fox keeps a secret"
_LINUX_SCRIPT = f"""\
set -e
mke2fs -q /dev/vda
mount -t ext2 /dev/vda /mnt
echo {_TEXT.decode()} >/mnt/fox
umount /mnt
mount -t ext2 /dev/vda /mnt
cat /mnt/fox
sleep 2
"""
_KEYRING = "var/lib/virt-sse/platform-managed"


def main() -> None:
    """Run the demo; exits 1 when something is not as it should be."""
    try:
        _run()
    except VirtSseError as exc:
        report(exc)
        for note in getattr(exc, "__notes__", ()):
            print(note, file=sys.stderr)
        sys.exit(1)


def _run() -> None:
    began = time.monotonic()
    _heading("How guests run on this machine")
    boot_sector = acceleration.probe("boot-sector")
    linux = acceleration.probe("linux-micro")
    _quote(f"{boot_sector}\n{linux}")

    with LabHost("demo") as host:
        _heading("A private libvirt host, and virt-sse on it")
        _virt_sse(host, "host", "init")
        host.restart_libvirtd()

        _heading("Two encrypted disks: an operating system, encrypted on its way in, and an empty one")
        _virt_sse(
            host, "disk", "import", "system", recipes.boot_sector_image(stays=True), *_at(host, "system")
        )
        _virt_sse(host, "disk", "create", "data", "--size", "64M", *_at(host, "data"))

        _heading("A guest boots from its encrypted disk")
        boots = Guest(host, "boots", acceleration=boot_sector, disks=[_element(host, "system")])
        boots.define()
        _virsh(host, "start", "boots")
        _quote(boots.wait_for("boot-sector: done"))
        system = _look_inside(host, "boots")
        _virsh(host, "destroy", "boots")
        _see_no_secret(host)

        _heading("A Linux guest makes a file system on the other and writes a text")
        micro = recipes.linux_micro()
        writes = Guest(host, "writes", acceleration=linux, boot=micro, disks=[_element(host, "data")])
        writes.define(_LINUX_SCRIPT)
        _virsh(host, "start", "writes")
        writes.wait_for(_TEXT.decode())
        data = _look_inside(host, "writes")
        _quote(writes.wait_shutoff())
        _see_no_secret(host)

        _heading("What was found where")
        rows = [
            {"domain": "boots", **system, **_search(host, "system", recipes.BOOT_SECTOR_TEXT)},
            {"domain": "writes", **data, **_search(host, "data", _TEXT)},
        ]
        print_rows(rows, list(rows[0]), OutputFormat.TABLE)
        _draw(host, data["block graph"])

        _heading("Without the platform's keyring, nothing starts")
        keyring = host.root / _KEYRING
        _quote(f"$ mv {keyring} elsewhere")
        keyring.rename(host.root / "elsewhere")
        refusal = _virsh(host, "start", "boots", succeeds=False)
        if "keyring is missing" not in refusal:
            raise LabError("the domain was refused, but not for that reason")
        _quote(f"$ mv elsewhere {keyring}")
        (host.root / "elsewhere").rename(keyring)
        _virsh(host, "start", "boots")
        boots.wait_for("boot-sector: done")

    print(f"\nAll as it should be, in {time.monotonic() - began:.0f} s. Nothing of the lab is left.")


def _at(host: LabHost, disk: str) -> tuple[str, Path]:
    return "--path", host.images / f"{disk}.qcow2"


def _element(host: LabHost, disk: str) -> str:
    return _virt_sse(host, "disk", "xml", disk)


def _look_inside(host: LabHost, domain: str) -> dict[str, str]:
    """How libvirt really runs *domain*, and what QEMU says its first disk is made of."""
    with host.connect() as connection:
        root = ET.fromstring(connection.lookupByName(domain).XMLDesc())  # noqa: S314 -- from libvirtd
    command = json.dumps({"execute": "query-named-block-nodes"})
    nodes = json.loads(host.virsh("qemu-monitor-command", domain, command).stdout)["return"]
    for node in nodes:
        luks = node["image"].get("format-specific", {}).get("data", {}).get("encrypt", {})
        if node.get("encrypted") and luks.get("format") == "luks":
            cipher = f"{luks['cipher-alg']}-{luks['cipher-mode']}"
            return {"domain type": root.get("type", ""), "block graph": f"{node['drv']}+luks {cipher}"}
    raise LabError(f"QEMU's block graph of domain {domain} has no LUKS node")


def _search(host: LabHost, disk: str, text: bytes) -> dict[str, str]:
    """Look for *text* with the key, in what an export gives, and without, in the image file itself."""
    plain = host.directory / "plain"
    _virt_sse(host, "disk", "export", disk, plain, "--format", "raw", "--plaintext")
    with_key = text in plain.read_bytes()
    plain.unlink()
    without = text in (host.images / f"{disk}.qcow2").read_bytes()
    if without or not with_key:
        raise LabError(f"the text on disk {disk} was found without the key, or not found with it")
    return {"text with the key": "found", "text in the raw image": "not found"}


def _see_no_secret(host: LabHost) -> None:
    """libvirt must have no secret once no domain runs."""
    if "virt-sse" in _virsh(host, "secret-list"):
        raise LabError("a secret outlived its domain")


def _draw(host: LabHost, node: str) -> None:
    disk = json.loads(_run_command(host, ["virt-sse", "disk", "show", "data", "-o", "json"]))
    dek = disk["deks"][0]
    print(f"""
    guest     /dev/vda, {disk["size"] >> 20} MiB, plaintext
      |
    QEMU      {node}  <-- DEK, from an ephemeral libvirt secret that the hook sets
      |       ciphertext
    image     LUKS header | envelope | encrypted clusters
                             |
                             +-- DEK, wrapped ({dek["algorithm"]}) by
                                 {dek["key"]}""")


def _virt_sse(host: LabHost, *arguments: str | Path) -> str:
    return _shown(host, ["virt-sse", *map(str, arguments)])


def _virsh(host: LabHost, *arguments: str, succeeds: bool = True) -> str:
    return _shown(host, ["virsh", *arguments], succeeds=succeeds)


def _shown(host: LabHost, command: list[str], *, succeeds: bool = True) -> str:
    """Run a command of the user's on the terminal, as it were."""
    _quote(f"$ {' '.join(command)}")
    said = _run_command(host, command, succeeds=succeeds)
    _quote(said)
    return said


def _run_command(host: LabHost, command: list[str], *, succeeds: bool = True) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    result = subprocess.run(
        command,
        env=host.environment | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if (result.returncode == 0) != succeeds:
        raise LabError(f"{' '.join(command)} exited {result.returncode}: {result.stdout.strip()}")
    return result.stdout


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _quote(text: str) -> None:
    for line in text.strip().splitlines():
        print(f"   {line}", flush=True)


if __name__ == "__main__":
    main()
