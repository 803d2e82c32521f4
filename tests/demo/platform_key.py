"""Act one: guests boot from disks under the platform's key; then the host is searched for their data."""

from __future__ import annotations

import json

from stage import Stage, heading, quote
from virt_sse.cli.output import OutputFormat, print_rows
from virt_sse.errors import LabError
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.libvirt.xml import parse_xml

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


def play(stage: Stage) -> None:
    """Play the act.

    :raise LabError: On an unexpected result.
    """
    host = stage.host
    heading("Acceleration of guests on this machine")
    boot_sector = acceleration.probe("boot-sector", slow_kvm=True)
    linux = acceleration.probe("linux-micro")
    quote(f"{boot_sector}\n{linux}")

    heading("A private libvirt host, and virt-sse on it")
    stage.virt_sse("host", "init")
    host.restart_libvirtd()

    heading("Two encrypted disks: an operating system, encrypted during import, and an empty disk")
    source = recipes.boot_sector_image(stays=True)
    stage.virt_sse("disk", "import", "system", source, *stage.at("system"))
    stage.virt_sse("disk", "create", "data", "--size", "64M", *stage.at("data"))

    heading("A guest boots from its encrypted disk")
    boots = Guest(host, "boots", acceleration=boot_sector, disks=[stage.virt_sse("disk", "xml", "system")])
    boots.define()
    stage.virsh("start", "boots")
    quote(boots.wait_for("boot-sector: done"))
    system = _look_inside(host, "boots")
    stage.virsh("destroy", "boots")
    stage.see_no_secret()

    heading("A Linux guest makes a file system on the empty disk and writes a text")
    micro = recipes.linux_micro()
    writes = Guest(
        host, "writes", acceleration=linux, boot=micro, disks=[stage.virt_sse("disk", "xml", "data")]
    )
    writes.define(_LINUX_SCRIPT)
    stage.virsh("start", "writes")
    writes.wait_for(_TEXT.decode())
    data = _look_inside(host, "writes")
    quote(writes.wait_shutoff())
    stage.see_no_secret()

    heading("Results of the search")
    rows = [
        {"domain": "boots", **system, **_search(stage, "system", recipes.BOOT_SECTOR_TEXT)},
        {"domain": "writes", **data, **_search(stage, "data", _TEXT)},
    ]
    print_rows(rows, list(rows[0]), OutputFormat.TABLE)
    _draw(stage, data["block graph"])

    heading("Without the platform's keyring, nothing starts")
    keyring = host.root / _KEYRING
    quote(f"$ mv {keyring} elsewhere")
    keyring.rename(host.root / "elsewhere")
    refusal = stage.virsh("start", "boots", succeeds=False)
    if "keyring is missing" not in refusal:
        raise LabError("the domain was refused for another reason than the missing keyring")
    quote(f"$ mv elsewhere {keyring}")
    (host.root / "elsewhere").rename(keyring)
    stage.virsh("start", "boots")
    boots.wait_for("boot-sector: done")
    stage.virsh("destroy", "boots")


def _look_inside(host: LabHost, domain: str) -> dict[str, str]:
    """The domain type according to libvirt, and the layers of the first disk according to QEMU."""
    with host.connect() as connection:
        root = parse_xml(connection.lookupByName(domain).XMLDesc(), kind="domain XML")
    command = json.dumps({"execute": "query-named-block-nodes"})
    nodes = json.loads(host.virsh("qemu-monitor-command", domain, command).stdout)["return"]
    for node in nodes:
        luks = node["image"].get("format-specific", {}).get("data", {}).get("encrypt", {})
        if node.get("encrypted") and luks.get("format") == "luks":
            cipher = f"{luks['cipher-alg']}-{luks['cipher-mode']}"
            return {"domain type": root.get("type", ""), "block graph": f"{node['drv']}+luks {cipher}"}
    raise LabError(f"QEMU's block graph of domain {domain} has no LUKS node")


def _search(stage: Stage, disk: str, text: bytes) -> dict[str, str]:
    """Search for *text* with the key, in an export of the disk, and without the key, in the image file."""
    host = stage.host
    plain = host.directory / "plain"
    stage.virt_sse("disk", "export", disk, plain, "--format", "raw", "--plaintext")
    with_key = text in plain.read_bytes()
    plain.unlink()
    without = text in (host.images / f"{disk}.qcow2").read_bytes()
    if without or not with_key:
        raise LabError(f"the text on disk {disk} was found without the key, or not found with the key")
    return {"text with the key": "found", "text in the raw image": "not found"}


def _draw(stage: Stage, node: str) -> None:
    disk = json.loads(stage.run("virt-sse", "disk", "show", "data", "-o", "json"))
    dek = disk["deks"][0]
    print(f"""
    guest     /dev/vda, {disk["size"] >> 20} MiB, plaintext
      |
    QEMU      {node}  <-- DEK, from an ephemeral libvirt secret set by the hook
      |       ciphertext
    image     LUKS header | envelope | encrypted clusters
                             |
                             +-- DEK, wrapped ({dek["algorithm"]}) by
                                 {dek["key"]}""")
