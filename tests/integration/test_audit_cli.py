"""``virt-sse audit`` as an operator sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from support import images
from support.command_line import PROGRAM, CommandLine
from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord, Component, Result
from virt_sse.backend import Backend
from virt_sse.errors import LibvirtUnavailableError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import NewDisk


@pytest.fixture
def log(root: Path) -> AuditLog:
    """Five uses of another log, a vault's, one of them with a name that would clear the screen."""
    log = AuditLog(root / "vault/audit.jsonl")
    for number in range(5):
        log.append(
            AuditRecord(
                component=Component.VAULT,
                actor="agent",
                action="unwrapKey",
                key="https://vault/keys/k" if number < 4 else "\x1b[2J",
                key_version="7f" if number < 4 else None,
                disk=UUID(int=number + 1),
                source="192.0.2.1",
                result=Result.REFUSED if number % 2 else Result.ALLOWED,
                reason="Forbidden" if number % 2 else None,
                correlation=UUID(int=number + 100),
            )
        )
    return log


def entries(virt_sse: CommandLine, *arguments: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(virt_sse("audit", "list", "--output", "json", *arguments))
    return found


@pytest.mark.slow
def test_a_disks_life_is_in_the_log(virt_sse: CommandLine, root: Path) -> None:
    images.require("qemu-img")
    headings = ["TIME", "RESULT", "ACTION", "KEY", "DISK", "DOMAIN", "ACTOR", "CORRELATION", "REASON"]
    assert virt_sse("audit", "list").split() == headings
    assert "records      0\n" in virt_sse("audit", "verify")
    assert not (root / "var/log/virt-sse").exists()

    virt_sse("host", "init")
    for name in ("web", "db"):
        virt_sse("disk", "create", name, "--size", "1M")
    disk = json.loads(virt_sse("disk", "show", "web", "--output", "json"))
    virt_sse("disk", "check", "web")
    virt_sse("key", "rotate", "--provider", "platform-managed")
    found = entries(virt_sse)
    assert [entry["action"] for entry in found[:5]] == ["wrap", "wrap", "unwrap", "rotate", "rotate"]
    for each in {entry["disk"] for entry in found[5:]}:  # disks are rewrapped at the same time
        assert [entry["action"] for entry in found[5:] if entry["disk"] == each] == ["unwrap", "wrap"]
    assert [entry["seq"] for entry in found] == list(range(1, 10))
    assert {entry["key"] for entry in found} == {"platform-managed:default"}
    assert ",virt-sse[" in found[0]["actor"]
    mine = [entry for entry in found if entry["disk"] == disk["id"]]
    assert len(mine) == 4
    assert entries(virt_sse, "--disk", "web") == mine
    (root / "var/lib/virt-sse/store.sqlite").unlink()
    assert entries(virt_sse, "--disk", disk["id"]) == mine
    assert "no disk" in virt_sse.refuses("audit", "list", "--disk", "web")
    new = found[4]["key-version"]
    assert len(entries(virt_sse, "--key", f"platform-managed:default:{new}")) == 3
    assert "whole        True\nrecords      9\n" in virt_sse("audit", "verify")
    for folder, name in (("var/log/virt-sse", "audit.jsonl"), ("var/lib/virt-sse", "audit.key")):
        assert images.mode(root / folder) == 0o700
        assert images.mode(root / folder / name) == 0o600


def test_a_starting_domain_is_named_in_the_log(virt_sse: CommandLine, backend: Backend) -> None:
    images.require("qemu-img")
    backend.disks.create(NewDisk(name="web", size=1 << 20))
    element = backend.domains.disk_element("web")
    identity = f"<name>my-domain</name><uuid>{uuid.uuid4()}</uuid>"
    definition = DomainDefinition.parse(f"<domain>{identity}<devices>{element}</devices></domain>")
    with pytest.raises(LibvirtUnavailableError):  # which is asked when the DEKs are there
        backend.domains.restore(definition)
    assert [(entry["action"], entry["domain"]) for entry in entries(virt_sse)] == [
        ("wrap", None),
        ("unwrap", "my-domain"),
    ]


@pytest.mark.slow
def test_the_listing_is_filtered_by_its_options(virt_sse: CommandLine, log: AuditLog) -> None:
    def seqs(*arguments: str) -> list[int]:
        return [entry["seq"] for entry in entries(virt_sse, "--log", log.path, *arguments)]

    assert seqs() == [1, 2, 3, 4, 5]
    assert seqs("--refused") == [2, 4]
    assert seqs("--limit", "2") == [4, 5]
    assert seqs("--limit", "1", "--refused") == [4]
    assert seqs("--key", "https://vault/keys/k") == [1, 2, 3, 4]
    assert seqs("--key", "https://vault/keys/k/7f") == [1, 2, 3, 4]
    assert seqs("--disk", str(UUID(int=3))) == [3]
    assert seqs("--correlation", str(UUID(int=101))) == [2]
    for since in ("1h", "7d", "999999999w", "2026-01-01"):
        assert seqs("--since", since) == [1, 2, 3, 4, 5]
    for since in ("0s", "2999-12-31T12:00:00Z", "2999-12-31 12:00+02:00"):
        assert seqs("--since", since) == []
    table = virt_sse("audit", "list", "--log", log.path)
    assert "\x1b" not in table
    assert "\\x1b[2J" in table
    assert {len(line.split()) for line in table.splitlines()} == {9}
    assert f"https://vault/keys/k/7f  {UUID(int=1)}  -" in table


@pytest.mark.parametrize(
    "arguments",
    [("--since", "yesterday"), ("--since", "1y"), ("--correlation", "x"), ("--limit", "0")],
)
def test_invalid_options_are_wrong_usage(virt_sse: CommandLine, arguments: tuple[str, str]) -> None:
    virt_sse("audit", "list", *arguments, status=2)


def test_a_missing_log_is_reported(virt_sse: CommandLine, root: Path) -> None:
    for command in ("list", "tail", "verify"):
        assert "no audit log" in virt_sse.refuses("audit", command, "--log", root / "none.jsonl")


@pytest.mark.slow
def test_verify_names_the_fault_and_its_place(virt_sse: CommandLine, log: AuditLog) -> None:
    whole = virt_sse("audit", "verify", "--log", log.path)
    position = next(line.split()[1] for line in whole.splitlines() if line.startswith("position"))
    assert "authentic    True\n" in whole
    virt_sse("audit", "verify", "--log", log.path, "--anchor", position)
    assert "invalid position '5:x'" in virt_sse.refuses("audit", "verify", "--anchor", "5:x", status=2)

    content = log.path.read_bytes()
    log.path.write_bytes(content.replace(b"Forbidden", b"forbidden", 1))
    message = virt_sse.refuses("audit", "verify", "--log", log.path)
    assert message == (
        f"virt-sse: error: the audit log is not whole: {log.path}, line 2: the record was altered\n"
        "virt-sse: hint: the 1 records before are whole\n"
    )
    report = json.loads(virt_sse("audit", "verify", "--log", log.path, "--output", "json", status=1))
    assert report["whole"] is False
    assert report["broken"] == {
        "file": str(log.path), "line": 2, "seq": 2, "reason": "the record was altered"
    }  # fmt: skip
    assert [entry["seq"] for entry in entries(virt_sse, "--log", log.path)] == [1, 3, 4, 5]

    log.path.write_bytes(b"".join(content.splitlines(keepends=True)[:3]))
    assert "line 4: records 4 to 5 are missing" in virt_sse.refuses("audit", "verify", "--log", log.path)
    log.path.with_suffix(".head").unlink()
    assert "head is missing" in virt_sse.refuses("audit", "verify", "--log", log.path)
    assert "records 4 to 5 are missing" in virt_sse.refuses(
        "audit", "verify", "--log", log.path, "--anchor", position
    )


@pytest.mark.slow
def test_a_copy_is_verified_with_its_key_or_without(virt_sse: CommandLine, log: AuditLog, root: Path) -> None:
    key = log.path.with_suffix(".key").rename(root / "key")
    assert "authentic    False\n" in virt_sse("audit", "verify", "--log", log.path)
    assert "authentic    True\n" in virt_sse("audit", "verify", "--log", log.path, "--mac-key", key)
    key.write_bytes(os.urandom(32))
    message = virt_sse.refuses("audit", "verify", "--log", log.path, "--mac-key", key)
    assert "line 1: the record was not written with this log's key" in message


@pytest.mark.slow
def test_tail_follows_until_it_is_interrupted(virt_sse: CommandLine, log: AuditLog) -> None:
    lines = virt_sse("audit", "tail", "--log", log.path, "-n", "2").splitlines()
    assert [line.split()[1] for line in lines] == ["refused", "allowed"]
    assert "\x1b" not in "".join(lines)
    [last] = virt_sse("audit", "tail", "--log", log.path, "-n", "1", "--output", "json").splitlines()
    assert json.loads(last) == [*log.records()][-1].as_json()

    # As typed in a terminal: what runs the tests may have been told to ignore interrupts.
    typed = ["env", "--default-signal=INT", PROGRAM, "audit", "tail", "-f", "-n", "1", "--output", "json"]
    with subprocess.Popen(
        [*typed, "--log", log.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert json.loads(process.stdout.readline())["seq"] == 5
            for number in (6, 7):
                log.append(next(log.records()).record)
                assert json.loads(process.stdout.readline())["seq"] == number
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.slow
def test_a_command_whose_key_use_cannot_be_recorded_is_refused(
    virt_sse: CommandLine, backend: Backend, root: Path
) -> None:
    images.require("qemu-img")
    backend.disks.create(NewDisk(name="web", size=1 << 20))
    keys = backend.keys.in_use()
    (root / "var/log/virt-sse").rename(root / "away")
    (root / "var/log/virt-sse").touch()
    for command in (("disk", "create", "db", "--size", "1M"), ("disk", "check", "web")):
        message = virt_sse.refuses(*command)
        assert "cannot write the audit log" in message
        assert "hint: a key use that cannot be recorded is refused" in message
    virt_sse("disk", "list")
    assert images.files_below(root / "var/lib/libvirt/images") == ["web.qcow2"]
    assert backend.keys.in_use() == keys
    (root / "var/log/virt-sse").unlink()
    (root / "away").rename(root / "var/log/virt-sse")
    virt_sse("disk", "check", "web")
    virt_sse("audit", "verify")
