"""Every command of virsh that touches disks, on each kind of disk: does what the page about virsh says."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt
import pytest

from support.faults import EVERY_KILL
from support.loaded_commands import run_command
from support.stage_site import CONFIG, StageSite, stage_site
from support.virsh_cells import Cell, Kind, Outcome, Row
from support.virsh_verbs import ROWS
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk

M = 1 << 20
_KINDS = tuple(Kind) if EVERY_KILL else (Kind.SINGLE_QCOW2, Kind.DOUBLE_RAW, Kind.AT_HOST)
_AT_ONCE = 2
"""Kinds at a time: a domain that starts has ten seconds to take its storage processes over."""
_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
}


@pytest.fixture(scope="module")
def site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector"), CONFIG) as site:
        yield site
        site.forget_domains()


class Bench:
    """A domain with a disk of a kind, a second disk of the kind, and what else the commands name."""

    def __init__(self, site: StageSite, agent: LabAgent, kind: Kind) -> None:
        self.site, self.agent, self.kind = site, agent, kind
        self.name = kind.name.lower().replace("_", "-")
        self.folder = site.host.images / self.name
        self.folder.mkdir()
        self.folder.chmod(0o777)  # QEMU makes the socket of a pull backup there
        self.disk, self.spare = (f"{self.name}-{uuid.uuid4().hex[:8]}" for _ in range(2))
        images = [self._import(self.disk, "disk"), self._import(self.spare, "spare")]
        element = site.backend.domains.disk_element(self.disk)
        self.guest = Guest(site.host, f"{self.name}-domain", acceleration=site.acceleration, disks=[element])
        self.guest.define()
        if kind is Kind.AT_HOST:
            at_host = ("--encryption-at-host", "on", "--disk-caching", "vda=ReadWrite")
            site.virt_sse("vm", "update", self.guest.name, *at_host)
        self.words = {
            "DOMAIN": self.guest.name,
            "NEW": f"{self.guest.name}-new",
            "DISK": self.disk,
            "SPAREDISK": self.spare,
            "IMAGE": str(images[0]),
            "SPARE": str(images[1]),
            "VOLUME": images[1].name,
            "POOL": f"{self.name}-pool",
            "PLAIN": str(self.folder / "plain.raw"),
            "FILE": str(self.folder / "file"),
        }
        (self.folder / "plain.raw").write_bytes(bytes(M))
        self._write_documents()
        site.virsh("pool-create-as", self.words["POOL"], "dir", "--target", self.folder)

    def _import(self, disk: str, name: str) -> Path:
        """Make a disk of the kind, with the guest on it; its image."""
        double = self.kind in (Kind.DOUBLE_RAW, Kind.DOUBLE_QCOW2)
        image_format = DiskFormat.RAW if self.kind in (Kind.SINGLE_RAW, Kind.DOUBLE_RAW) else DiskFormat.QCOW2
        path = self.folder / f"{name}.{image_format.value}"
        new = NewDisk(
            name=disk, format=image_format, encryption_set=self.site.set if double else None, place=path
        )
        source = boot_sector_image(stays=True)
        self.site.backend.transfer.import_image(new, source, source_format="raw")
        return path

    def _write_documents(self) -> None:
        backend = self.site.backend
        disk = backend.disks.get(self.disk)
        definition = self.site.virsh("dumpxml", self.guest.name)
        found = re.search(r"<disk .*?</disk>", definition, re.DOTALL)
        assert found
        secret = SecretName(disk.id, disk.deks[0].slot)
        self.words["SECRET"] = str(secret.uuid)
        for word, content in {
            "DOMAIN.xml": definition,
            "DISK.xml": found[0],
            "SPARE.xml": backend.domains.disk_element(self.spare, target="vdb"),
            "CHECKPOINT.xml": "<domaincheckpoint><name>first</name></domaincheckpoint>",
            "VOLUME.xml": "<volume><name>created</name><capacity unit='MiB'>1</capacity></volume>",
            "BACKUP.xml": "<domainbackup mode='pull'>"
            f"<server transport='unix' socket='{self.folder}/backup.nbd'/>"
            f"<disks><disk name='vda' type='file'><scratch file='{self.folder}/scratch'/></disk></disks>"
            "</domainbackup>",
            "SECRET.xml": f"<secret ephemeral='yes' private='no'><uuid>{secret.uuid}</uuid>"
            f"<usage type='volume'><volume>{secret.usage}</volume></usage></secret>",
        }.items():
            path = self.folder / word.lower()
            path.write_text(content)
            self.words[word] = str(path)

    def run(self) -> str:
        """Run all rows: how the first one that differs from the page differs, or nothing."""
        for row in ROWS:
            if not row.tests:
                try:
                    self._run_row(row)
                except Exception:  # noqa: BLE001 -- told together with the others'
                    return f"{self.kind.value}: {row.command}: {traceback.format_exc()}"
        return ""

    def _run_row(self, row: Row) -> None:
        cell = row.cells[self.kind]
        for command in row.before:
            self._must(command)
        seen = len(self.agent.log())
        status, said = self._type(f"virsh {row.command}")
        assert cell.says in said, said
        fails = cell.outcome is Outcome.REFUSED or (cell.outcome is Outcome.HARM and bool(cell.says))
        assert status == fails, said
        self._await_state(cell.state or row.state)
        self._check_tellers(cell, seen)
        if not fails or cell.outcome is Outcome.HARM:
            for command in row.after:
                self._must(command)

    def _await_state(self, wanted: str) -> None:
        """Wait for the domain's state: libvirt may notice the end of a QEMU after the command's failure."""

        def state() -> str:
            with contextlib.closing(self.site.host.connect()) as connection:
                try:
                    return _STATES[connection.lookupByName(self.guest.name).state()[0]]
                except libvirt.libvirtError:
                    return "gone"

        wait_until(lambda: state() == wanted, f"the domain is {wanted}, not {state()}")

    def _check_tellers(self, cell: Cell, seen: int) -> None:
        if cell.event:
            name, values = cell.event
            subjects = {self.guest.name, self.disk, self.spare}
            wait_until(
                lambda: any(
                    event["event"] == name
                    and values.items() <= event.items()
                    and subjects & {event.get("domain"), event.get("disk")}
                    for event in self.agent.log()[seen:]
                ),
                f"the agent logs {name} {values}",
                seconds=60,
            )
        if cell.tells:
            command, text = cell.tells
            assert text in self._type(command)[1]

    def _must(self, command: str) -> None:
        status, said = self._type(command)
        assert status == 0, f"{command}: {said}"

    def _type(self, command: str) -> tuple[int, str]:
        """Run a command: exit status, and output and errors together."""
        program, *arguments = [self._filled_in(word) for word in shlex.split(command)]
        environment = self.site.host.environment | {"EDITOR": "true"}
        if program == "gone":
            target = f"<target dev='{arguments[0]}'"
            wait_until(lambda: target not in self.site.virsh("dumpxml", self.guest.name), f"no {target}")
        elif program == "rm":
            paths = list(self.folder.glob(Path(arguments[0]).name))
            assert paths
            for path in paths:
                path.unlink()
        elif program == "inside":  # sees the processes of the host
            self.site.run(*arguments)
        elif program == "virt-sse":
            done = run_command(arguments, environment, together=True)
            return done.returncode, done.stdout
        else:
            ran = subprocess.run(
                [program, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
                check=False,
            )
            return ran.returncode, ran.stdout
        return 0, ""

    def _filled_in(self, word: str) -> str:
        names = "|".join(re.escape(each) for each in sorted(self.words, key=len, reverse=True))
        return re.sub(rf"\b({names})\b", lambda match: self.words[match[0]], word)


@pytest.mark.slow
def test_each_command_does_what_the_page_says(site: StageSite) -> None:
    """Several kinds in one test, because some run at the same time."""
    with LabAgent(site.host) as agent:
        benches = [Bench(site, agent, kind) for kind in _KINDS]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            wrong = [found for found in pool.map(Bench.run, benches) if found]
    assert not wrong, "\n".join(wrong)
    for bench in benches:
        for disk in (bench.disk, bench.spare):
            site.backend.disks.delete(disk)
