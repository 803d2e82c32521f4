"""``virt-sse host hsm``, as an operator uses it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from support import images
from support.command_line import PROGRAM, CommandLine
from virt_sse.lab.tokens import LabHsm


@pytest.fixture
def hsm(virt_sse: CommandLine, lab_hsm: LabHsm) -> CommandLine:
    """The command line of a host that has a token; *lab_hsm* skips where there is no SoftHSM."""
    assert lab_hsm.module
    virt_sse("host", "hsm", "init")
    return virt_sse


def folder(cli: CommandLine) -> Path:
    return cli.root / "var/lib/virt-sse/hsm-simulated"


def keys(cli: CommandLine) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(cli("host", "hsm", "list", "--output", "json"))
    return rows


def with_pin(cli: CommandLine, pin: bytes, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that reads the PIN from a descriptor."""
    reading, writing = os.pipe()
    os.write(writing, pin)
    os.close(writing)
    try:
        return subprocess.run(
            [PROGRAM, *arguments, "--pin-descriptor", str(reading)],
            env={**os.environ, "VIRT_SSE_ROOT": str(cli.root)},
            pass_fds=(reading,),
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        os.close(reading)


@pytest.mark.slow
def test_one_command_makes_an_hsm_token(virt_sse: CommandLine, lab_hsm: LabHsm) -> None:
    assert lab_hsm.module
    assert "host hsm init" in virt_sse.refuses("host", "hsm", "list")
    assert virt_sse("host", "hsm", "init").startswith("made token pkcs11:token=virt-sse;serial=")
    assert virt_sse("host", "hsm", "init") == "nothing to do\n"
    status = json.loads(virt_sse("host", "hsm", "status", "--output", "json"))
    assert (status["state"], status["keys"], status["wrong-pins"]) == ("ready", 0, "0 of 3")
    assert status["token"] == (folder(virt_sse) / "uri").read_text().strip()
    for path in folder(virt_sse).rglob("*"):
        assert not path.stat().st_mode & 0o077, path


def test_a_second_hsm_token_is_not_made(virt_sse: CommandLine) -> None:
    config = virt_sse.root / "etc/virt-sse/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[key-providers.hsm-simulated]\nuri = "pkcs11:token=net-hsm"\nmodule = "/no/such.so"\n')
    assert "names another token" in virt_sse.refuses("host", "hsm", "init")
    said = virt_sse.warns_and_refuses("host", "hsm", "status")
    assert "cannot" in said or "PIN" in said


@pytest.mark.slow
def test_a_key_is_created_rotated_disabled_and_destroyed(hsm: CommandLine) -> None:
    images.require("qemu-img", "cryptsetup")
    hsm("host", "init")
    made = json.loads(hsm("host", "hsm", "create", "disks", "--size", "2048", "--output", "json"))
    assert (made["type"], made["bits"], made["never-extractable"]) == ("rsa", 2048, True)
    hsm("des", "create", "ours", "--provider", "hsm-simulated", "--key", "disks")
    hsm("disk", "create", "data", "--size", "4M", "--des", "ours")
    report = json.loads(hsm("key", "rotate", "disks", "--provider", "hsm-simulated", "-o", "json"))
    assert (report["rewrapped"], report["failed"]) == (1, [])
    old, new = made["version"], report["key"].rpartition(":")[2]

    hsm("host", "hsm", "disable", "disks", "--version", new)
    assert [(key["version"], key["enabled"]) for key in keys(hsm)] == [(old, True), (new, False)]
    assert "disabled in the token" in hsm.refuses("disk", "create", "more", "--size", "4M", "--des", "ours")
    hsm("host", "hsm", "enable", "disks")

    assert "takes either" in hsm.refuses("host", "hsm", "destroy", "disks", status=2)
    said = hsm.refuses("host", "hsm", "destroy", "disks", "--all-versions")
    assert "1 DEKs of this host's disks" in said
    dry = hsm("host", "hsm", "destroy", "disks", "--all-versions", "--force", "--dry-run")
    *destroyed, lost = dry.splitlines()
    assert [line.partition(" key ")[0] for line in destroyed] == ["would destroy"] * 2
    assert lost == "would leave these disks and copies without a usable key: data"
    hsm("host", "hsm", "destroy", "disks", "--version", old)
    hsm("host", "hsm", "destroy", "disks", "--all-versions", "--force")
    assert keys(hsm) == []
    assert "deleted" in hsm("key", "used")

    log = hsm("audit", "tail", "-n", "100")
    for action, version in (("create", old), ("rotate", new), ("disable", new), ("destroy", old)):
        assert re.search(rf"requested +{action} +hsm-simulated:disks", log), action
        assert re.search(rf"allowed +{action} +hsm-simulated:disks:{version}", log), action


@pytest.mark.slow
def test_a_key_of_the_customer_is_imported(hsm: CommandLine, tmp_path: Path) -> None:
    private = rsa.generate_private_key(65537, 3072)
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    made = json.loads(hsm("host", "hsm", "import", "ours", pem, "--output", "json"))
    assert (made["bits"], made["extractable"], made["never-extractable"]) == (3072, False, False)
    pem.write_bytes(b"nothing")
    assert "no private key in PEM" in hsm.refuses("host", "hsm", "import", "other", pem, status=2)


@pytest.mark.slow
def test_wrong_pins_lock_the_token_until_unlocked(hsm: CommandLine) -> None:
    right = (folder(hsm) / "pin").read_bytes()
    assert with_pin(hsm, right, "host", "hsm", "list").returncode == 0
    for _ in range(3):
        refused = with_pin(hsm, b"4711-wrong\n", "host", "hsm", "list")
        assert refused.returncode == 1
        assert "rejected the PIN as wrong" in refused.stderr
        assert "4711" not in refused.stdout + refused.stderr
    assert "locked after 3 wrong PINs" in with_pin(hsm, right, "host", "hsm", "list").stderr
    assert "'virt-sse host hsm unlock'" in hsm.refuses("host", "hsm", "list")
    assert "3 of 3" in with_pin(hsm, right, "host", "hsm", "status").stdout
    assert hsm("host", "hsm", "unlock") == "the token takes the PIN\n"
    assert keys(hsm) == []


@pytest.mark.slow
def test_a_pin_typed_at_a_prompt_is_not_shown(hsm: CommandLine) -> None:
    pin = (folder(hsm) / "pin").read_text().strip()
    (folder(hsm) / "pin").unlink()
    assert "cannot read the PIN" in hsm.refuses("host", "hsm", "list")
    child, terminal = pty.fork()
    if not child:
        os.environ["VIRT_SSE_ROOT"] = str(hsm.root)
        os.execv(PROGRAM, [str(PROGRAM), "host", "hsm", "list", "--ask-pin"])  # noqa: S606 -- it is ours
    said = b""
    while b"PIN: " not in said:  # what is typed before is thrown away
        said += read(terminal)
    os.write(terminal, pin.encode() + b"\n")
    while piece := read(terminal):
        said += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, said
    assert b"NEVER-EXTRACTABLE" in said
    assert pin.encode() not in said


def read(terminal: int) -> bytes:
    assert select.select([terminal], [], [], 20)[0], "it says nothing"
    try:
        return os.read(terminal, 1000)
    except OSError:  # so a terminal ends
        return b""
