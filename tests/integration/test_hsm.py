"""Guests on disks under keys in a PKCS#11 token: they start, and end when the key is taken away."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from support.agent_site import Site, key_of, prepared
from support.inside_token import home_of
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.host import LabHost
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import KeyId

SOON_SECONDS = 5.0
"""From the administrator's command to the end of the guest, with no grace time."""

CONFIG = """\
[agent]
poll-seconds = 0.4
probe-seconds = 3

[key-providers.hsm-simulated]
"""


class HsmSite(Site):
    """:ivar token: what the host's sets have their keys in."""

    def __init__(
        self, host: LabHost, backend: Backend, agent: LabAgent, acceleration: Acceleration, token: LabToken
    ) -> None:
        super().__init__(host, backend, agent, acceleration)
        self.token = token

    def worker(self) -> int:
        """The agent's process for the token."""
        (found,) = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        return int(found)

    def new_set(self, key: str) -> EncryptionSet:
        """A set under that key of the token."""
        return self.backend.sets.create(
            f"s{uuid.uuid4().hex[:8]}", provider="hsm-simulated", key=key, grace_seconds=0
        )


@pytest.fixture(scope="module")
def running_site(
    lab_host: LabHost, lab_hsm: LabHsm, acceleration: Callable[[str], Acceleration]
) -> Iterator[HsmSite]:
    how = acceleration("boot-sector")
    with lab_hsm.token() as token:
        options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in token.options.items())
        with prepared(lab_host, CONFIG + options) as backend, LabAgent(lab_host) as agent:
            yield HsmSite(lab_host, backend, agent, how, token)


@pytest.fixture
def site(running_site: HsmSite) -> Iterator[HsmSite]:
    yield running_site
    running_site.forget_domains()


def test_a_guest_lives_and_ends_with_its_key(site: HsmSite) -> None:
    site.virt_sse("host", "hsm", "create", "disks", "--size", "2048")
    guest, disk = site.guest(site.new_set("disks").name)
    key = key_of(disk)
    assert (key.provider, key.name, disk.deks[0].wrapped.algorithm) == (
        "hsm-simulated",
        "disks",
        "RSA-OAEP-256",
    )
    guest.start()
    site.wait_until_watched(guest)

    access = pkcs11_tool(site, key)
    assert "never extractable" in access
    assert "always sensitive" in access

    site.virt_sse("host", "hsm", "disable", "disks")
    assert_ends(site, guest, "is disabled in the token")
    site.virt_sse("host", "hsm", "enable", "disks")
    guest.start()
    site.wait_until_watched(guest)

    site.virt_sse("host", "hsm", "destroy", "disks", "--version", key.version, "--force")
    assert_ends(site, guest, "the token holds no version")


def test_a_token_that_is_away_revokes_nothing(site: HsmSite) -> None:
    site.virt_sse("host", "hsm", "create", "away", "--type", "aes")
    encryption_set = site.new_set("away")
    guest, disk = site.guest(encryption_set.name)
    other, _ = site.guest(encryption_set.name)
    assert disk.deks[0].wrapped.algorithm == "A256KW"
    guest.start()
    site.wait_until_watched(guest)
    home = home_of(site.token)
    elsewhere = home.parents[1] / "elsewhere"
    home.rename(elsewhere)
    try:
        wait_until(lambda: states(site) == {"unreachable"}, "all keys are known as unreachable")
        assert guest.is_active()
        assert "no token matches" in site.refusal(other)
    finally:
        elsewhere.rename(home)
    site.wait_until_watched(guest)
    assert guest.is_active()


def test_a_token_that_hangs_holds_up_nobody_else(site: HsmSite) -> None:
    """SoftHSM waits for locks on its files, as a module may for its network."""
    site.virt_sse("host", "hsm", "create", "slow", "--type", "aes")
    guest, _ = site.guest(site.new_set("slow").name)
    other, _ = site.guest()
    guest.start()
    site.wait_until_watched(guest)
    with contextlib.ExitStack() as locks:
        for path in home_of(site.token).iterdir():
            fcntl.lockf(locks.enter_context(path.open("r+b")), fcntl.LOCK_EX)
        worker = site.worker()
        wait_until(
            lambda: re.search(f"-> POSIX .* {worker} ", Path("/proc/locks").read_text("ascii")),
            "the module's process waits for the lock",
        )
        other.start()
        wait_until(lambda: "enabled" in states(site), "a key is known as enabled")
        assert guest.is_active()
        assert site.worker() == worker, "it does not hang any more"
    site.wait_until_watched(guest)
    assert site.worker() == worker, "it was in time"


def test_a_rotation_goes_unnoticed(site: HsmSite) -> None:
    site.virt_sse("host", "hsm", "create", "turning", "--size", "2048")
    encryption_set = site.new_set("turning")
    guest, disk = site.guest(encryption_set.name)
    guest.start()
    before = key_of(disk)
    report = json.loads(
        site.virt_sse("key", "rotate", "turning", "--provider", "hsm-simulated", "--output", "json")
    )
    assert (report["rewrapped"], report["failed"]) == (1, [])
    after = key_of(site.backend.disks.get(disk.name))
    assert str(after) == report["key"]
    assert after != before
    site.virt_sse("host", "hsm", "destroy", "turning", "--version", before.version)
    site.wait_until_watched(guest)
    assert guest.is_active()
    assert "rotate" in site.virt_sse("audit", "tail")


def test_an_imported_private_key_is_found_nowhere(site: HsmSite, tmp_path: Path) -> None:
    private = rsa.generate_private_key(65537, 2048)
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    site.virt_sse("host", "hsm", "import", "brought", pem)
    guest, _ = site.guest(site.new_set("brought").name)
    guest.start()
    site.wait_until_watched(guest)

    numbers = private.private_numbers()
    pieces = [
        number.to_bytes((number.bit_length() + 7) // 8, order)[32:64]
        for number in (numbers.p, numbers.q, numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp)
        for order in ("big", "little")
    ]

    memory = process_memory(site.agent.pid)
    assert b"brought" in memory, "the memory was not read"
    assert [piece for piece in pieces if piece in memory] == []
    for folder in (site.host.root, site.host.directory, site.token.folder.path.parent):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                assert [piece for piece in pieces if piece in content] == [], path


def assert_ends(site: HsmSite, guest: object, reason: str) -> None:
    took = wait_until(lambda: not guest.is_active(), "the guest has ended")  # type: ignore[attr-defined]
    sys.stdout.write(f"shut off after {took:.2f} s\n")
    assert took < SOON_SECONDS
    assert reason in site.refusal(guest)  # type: ignore[arg-type]
    assert site.secrets() == []


def states(site: HsmSite) -> set[str]:
    return {key["state"] for key in site.agent.status()["keys"]}  # type: ignore[attr-defined]


def pkcs11_tool(site: HsmSite, key: KeyId) -> str:
    """What OpenSC says of the private key."""
    options = site.token.options
    return subprocess.run(
        [
            *("pkcs11-tool", "--module", str(options["module"]), "--token-label", site.token.uri.token or ""),
            *("--login", "--pin", "env:PIN", "--list-objects", "--type", "privkey", "--id", key.version),
        ],
        env={**os.environ, "SOFTHSM2_CONF": str(options["softhsm-config"]), "PIN": site.token.pin},
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout


def process_memory(process: int) -> bytes:
    """All of it that is private to the process, as a core dump has it."""
    memory = bytearray()
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as file:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            area, permissions, *_ = line.split()
            if permissions != "rw-p":
                continue
            start, end = (int(each, 16) for each in area.split("-"))
            with contextlib.suppress(OSError):  # it was given back since it was listed
                memory += os.pread(file.fileno(), end - start, start)
    return bytes(memory)
