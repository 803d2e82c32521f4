"""Copies and backups known by QEMU's events alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from support import images
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.job_watch import JobWatch
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.host.setup import initialise
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, NewDisk

M = 1 << 20


class Watched:
    """A running domain with a disk."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.domain_id = uuid4()
        self.disk = backend.disks.create(NewDisk(name="web", size=M))
        self.element = backend.domains.disk_element("web")
        self.polls = 0
        self._number = 0
        self.watch = JobWatch(backend, Metrics(), self._poll)

    def _poll(self) -> None:
        self.polls += 1

    def keep(self, *, mirror: str = "", runs: bool = True) -> None:
        element = self.element.replace("</disk>", f"{mirror}</disk>")
        xml = f"<domain><uuid>{self.domain_id}</uuid><devices>{element}</devices></domain>"
        definition = DomainDefinition.parse(xml)
        uses = definition.our_disks
        domain = RunningDomain(self.domain_id, 1, "d", uses, True, False, frozenset(), definition)
        self._number += 1
        self.watch.keep(InventorySnapshot(self._number, (domain,) if runs else ()))

    def job(self, *statuses: str, job: str = "copy-vda-libvirt-3-format", domain: UUID | None = None) -> None:
        for status in statuses:
            self.watch.changed(domain or self.domain_id, job, status)


@pytest.fixture
def watched(root: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Watched]:
    images.require("qemu-img", "cryptsetup")
    caplog.set_level(logging.INFO, "virt_sse.agent")
    with Backend.open(root) as backend:
        initialise(backend.host)
        yield Watched(backend)


@pytest.mark.parametrize("job", ["copy-vda-libvirt-3-format", "backup-vda-libvirt-1-format"])
def test_a_job_that_ended_unseen_is_reported_once(
    watched: Watched, caplog: pytest.LogCaptureFixture, job: str
) -> None:
    watched.job("created", "running", "ready", "concluded", "null", job=job)
    assert watched.polls == 5, "each event polls libvirt"
    watched.keep(runs=False)
    watched.keep()
    watched.keep()
    assert caplog.messages == ["copy-unseen"]


def test_a_job_whose_target_was_seen_is_no_news(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.job("created", "running")
    watched.keep(mirror="<mirror type='file' job='copy'><source file='/copy'/></mirror>")
    watched.job("concluded")
    watched.keep()
    watched.job("null")
    watched.keep()
    watched.keep()
    assert caplog.messages == [], "the last event is of the same job"


def test_a_job_of_a_domain_that_ended_is_reported(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.keep()
    watched.job("created", "running")
    watched.keep()
    assert caplog.messages == [], "the job may still be seen"
    watched.keep(runs=False)
    watched.keep(runs=False)
    assert caplog.messages == ["copy-unseen"]


def test_jobs_without_a_target_or_of_other_disks_are_no_news(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    for job in (
        "commit-vda-libvirt-1-format",
        "create-libvirt-2-storage",
        "copy-vdb-libvirt-4-format",
        "job0",
    ):
        watched.job("created", "null", job=job)
    watched.job("created", "null", domain=uuid4())
    for _ in range(3):
        watched.keep()
    assert caplog.messages == []


def test_a_copy_by_virt_sse_itself_is_no_news(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    source: Disk = watched.disk
    watched.backend.disks.create(NewDisk(name="copy", size=M, kind=DiskKind.SNAPSHOT, source=source))
    watched.job("created", "null")
    watched.keep()
    watched.keep()
    assert caplog.messages == []


def test_a_job_is_live_from_its_first_event_to_its_last(watched: Watched) -> None:
    watched.keep()
    watched.job("created", "running", "concluded", job="pull-vda-libvirt-1-format")
    watched.keep()
    assert watched.watch.has_jobs(watched.domain_id)
    watched.job("null", job="pull-vda-libvirt-1-format")
    assert not watched.watch.has_jobs(watched.domain_id)
    for end in (watched.watch.forget, lambda: watched.keep(runs=False)):
        watched.keep()
        watched.job("created")
        assert watched.watch.has_jobs(watched.domain_id)
        end()
        assert not watched.watch.has_jobs(watched.domain_id)
