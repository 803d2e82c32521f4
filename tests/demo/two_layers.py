"""Act three: a key in an HSM, two layers of encryption, and encryption at host."""

from __future__ import annotations

from stage import Stage, heading, quote
from virt_sse.errors import LabError
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.guests import Guest


def play(stage: Stage) -> None:
    """Play the act.

    :raise LabError: On an unexpected result.
    """
    heading("A key in a token, and a disk encryption set for double encryption with this key")
    stage.virt_sse("host", "hsm", "init")
    stage.virt_sse("host", "hsm", "create", "vital", "--size", "3072")
    two_layers = ("--encryption-type", "EncryptionAtRestWithPlatformAndCustomerKeys")
    stage.virt_sse("des", "create", "vital", "--provider", "hsm-simulated", "--key", "vital", *two_layers)
    source = recipes.boot_sector_image(stays=True)
    stage.virt_sse("disk", "import", "books", source, "--des", "vital", *stage.at("books"))

    heading("Encryption at host: a temporary disk, and a host cache holding ciphertext")
    disks = [stage.run("virt-sse", "disk", "xml", "books")]
    kvm = acceleration.probe("boot-sector", slow_kvm=True)
    guest = Guest(stage.host, "books", acceleration=kvm, disks=disks)
    guest.define()
    at_host = ("--encryption-at-host", "on", "--temp-disk-size", "64M", "--disk-caching", "vda=ReadOnly")
    stage.virt_sse("vm", "update", "books", *at_host)
    stage.virsh("start", "books")
    quote(guest.wait_for("verified"))

    heading("The running domain matches the request")
    stage.virt_sse("vm", "verify", "books")
    stage.virsh("destroy", "books")
    stage.see_no_secret()
    left = list((stage.host.root / "run/virt-sse-disks").iterdir())
    if left:
        raise LabError(f"the domain has ended but left {left[0]}")
    quote("no process, socket or temporary disk is left after the domain's end")
