"""Act two: a customer's key in a key vault, rotated under a writing guest, taken away and given back."""

from __future__ import annotations

import json
import time
from pathlib import Path

from guest_scripts import VERIFY, WRITE
from stage import Stage, heading, quote
from virt_sse.errors import LabError
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.vaults import LabVault


def play(stage: Stage) -> None:
    """Play the act.

    :raise LabError: On an unexpected result.
    """
    linux = acceleration.probe("linux-micro")
    with LabVault() as vault:
        administrator = ("-c", vault.administrator_path)
        heading("A key vault, a key, and a disk encryption set permitted to use the key")
        quote(f"(a vault was made by 'virt-sse vault init'; 'virt-sse vault serve' serves it at {vault.url})")
        stage.virt_sse("key", "create", "web", "--size", "3072", *administrator)
        operator = stage.host.root / "etc/virt-sse/identity-operator.json"
        operator.parent.mkdir(parents=True, exist_ok=True)
        role = ("--role", "identity-operator", "--file", operator)
        stage.virt_sse("vault", "principal", "create", "demo-host", *role, *administrator)
        key = f"{vault.url}/keys/web"
        made = stage.virt_sse("des", "create", "web", "--key", key, "--grace", "0", "--output", "json")
        identity = json.loads(made)["identity"]
        stage.virt_sse("vault", "access", "set", identity, "get", "wrapKey", "unwrapKey", *administrator)
        stage.virt_sse("disk", "create", "web", "--size", "64M", "--des", "web", *stage.at("web"))

        with LabAgent(stage.host):
            _rotate_under_a_guest(stage, linux, administrator)
            _take_the_key_away(stage, administrator)
            _give_it_back(stage, linux, administrator)

        heading("Key uses in the audit logs of the host and the vault")
        stage.virt_sse("audit", "list", "--limit", "3")
        stage.virt_sse("audit", "verify")
        stage.virt_sse("audit", "verify", "--log", vault.directory / "audit.jsonl")


def _guest(stage: Stage, linux: acceleration.Acceleration) -> Guest:
    disks = [stage.run("virt-sse", "disk", "xml", "web")]
    return Guest(stage.host, "web", acceleration=linux, boot=recipes.linux_micro(), disks=disks)


def _rotate_under_a_guest(
    stage: Stage, linux: acceleration.Acceleration, administrator: tuple[str, Path]
) -> None:
    heading("The key is rotated while a guest writes")
    guest = _guest(stage, linux)
    guest.define(WRITE)
    stage.virsh("start", "web")
    guest.wait_for("writing")
    stage.virt_sse("key", "rotate", "web", *administrator)
    stage.virt_sse("des", "rotate", "web", "--prove")
    quote(guest.wait_for("files").splitlines()[-1])


def _take_the_key_away(stage: Stage, administrator: tuple[str, Path]) -> None:
    heading("The key is disabled: the guest is shut off, and cannot be started")
    stage.virt_sse("key", "disable", "web", *administrator)
    began = time.monotonic()
    while stage.run("virsh", "domstate", "web").strip() != "shut off":
        if time.monotonic() - began > 30:
            raise LabError("the guest is still running without its key")
        time.sleep(0.05)
    quote(f"the guest was shut off after {time.monotonic() - began:.1f} s")
    refusal = stage.virsh("start", "web", succeeds=False)
    if "KeyDisabled" not in refusal:
        raise LabError("the domain was refused for another reason than the disabled key")
    stage.see_no_secret()


def _give_it_back(stage: Stage, linux: acceleration.Acceleration, administrator: tuple[str, Path]) -> None:
    heading("The key is enabled again: the guest starts with its data intact")
    stage.virt_sse("key", "enable", "web", *administrator)
    guest = _guest(stage, linux)
    guest.define(VERIFY)
    stage.virsh("start", "web")
    said = guest.wait_shutoff()
    quote(said)
    if "linux-micro: exit 0" not in said:
        raise LabError("the guest's data is damaged")
