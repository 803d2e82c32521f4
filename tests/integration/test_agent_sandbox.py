"""The agent under the restrictions of its systemd unit, with all that serves a guest."""

from __future__ import annotations

import sys
from pathlib import Path

from support import unit_sandbox
from support.images import require
from support.page_client import UnixConnection, get
from support.stage_site import StageSite, stage_site_fixtures
from virt_sse import agent
from virt_sse.audit.log import AuditLog
from virt_sse.lab.agents import LabAgent

M = 1 << 20
UNIT = Path(agent.__file__).parent / "units/virt-sse-agent.service"

running_site, site = stage_site_fixtures()


def test_the_sandboxed_agent_serves_a_domain_with_stages(site: StageSite) -> None:
    require("systemd-analyze")
    disk, cached = site.disk("qcow2", size=M), site.single_disk("raw", size=M)
    guest = site.guest(disk, cached)
    at_host = ("--encryption-at-host", "on", "--temp-disk-size", "1M", "--disk-caching", "vdb=ReadWrite")
    site.virt_sse("vm", "update", guest.name, *at_host)
    with LabAgent(site.host, within=[sys.executable, unit_sandbox.__file__, UNIT]) as served:
        status = Path(f"/proc/{served.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        site.start_paused(guest)
        for number in range(2):
            assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 0 4096", disk=number)
        log = AuditLog.of_host(site.backend.host.config)
        assert {record.document["component"] for record in log.tail(3)} == {"agent"}
        site.virt_sse("vm", "verify", guest.name)
        page = site.backend.host.config.page_socket
        asked = get(UnixConnection(page), f"/disks/{disk.id}")
        assert asked.status == 200
        assert f"/dev/vda in {guest.name}" in asked.body
        assert "Storage daemon" in asked.body
        guest.destroy()
        assert site.left() == {}
        assert "denied" not in served.log_path.read_text().lower()
