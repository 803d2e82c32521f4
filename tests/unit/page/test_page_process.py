"""The page's sockets and its confined process, as the agent runs both."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import require
from support.page_client import UnixConnection, get
from support.page_overview import busy_host, overview
from support.processes import children
from support.waiting import wait_until
from virt_sse.agent import page_service
from virt_sse.agent.page_service import PAGE_ID, PageService
from virt_sse.config import Config
from virt_sse.config.file import PageConfig
from virt_sse.page.access import new_code, read_token
from virt_sse.page.document import Overview
from virt_sse.system import extras

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Collected:
    """A collector that counts."""

    def __init__(self) -> None:
        self.count = 0
        self.overview: Overview = busy_host()

    def collect(self) -> Overview:
        self.count += 1
        return self.overview


@contextlib.contextmanager
def served(config: Config, collected: Collected) -> Iterator[PageService]:
    service = PageService(config, lambda: collected)
    service.start()
    try:
        wait_until(config.page_socket.exists, "the page's socket exists")
        yield service
    finally:
        service.stop()


def configured(root: Path, page: PageConfig) -> Config:
    folder = root / "etc/virt-sse"
    folder.mkdir(parents=True, exist_ok=True)
    listen = f'listen = "{page.listen}"\n' if page.listen else ""
    group = f'group = "{page.group}"\n' if page.group else ""
    (folder / "config.toml").write_text(f"[page]\n{listen}{group}")
    return Config.load(root)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes() -> list[int]:
    """The page's processes that this process has started."""
    return [
        pid for pid, command in children(os.getpid()).items() if "virt_sse.page.process" in " ".join(command)
    ]


@pytest.mark.slow
def test_the_page_is_served_by_a_process_without_rights(short_folder: Path) -> None:
    port = free_port()
    config = configured(short_folder, PageConfig(listen=f"127.0.0.1:{port}"))
    collected = Collected()
    with served(config, collected):
        assert processes() == []
        assert collected.count == 0
        assert (config.page_socket.stat().st_mode & 0o777, config.page_token.stat().st_mode & 0o777) == (
            0o600,
            0o600,
        )
        answer = get(UnixConnection(config.page_socket), "/keys")
        assert answer.status == 200
        assert "vault-west" in answer.body
        (pid,) = processes()
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        if os.geteuid() == 0:
            assert f"Uid:\t{PAGE_ID}\t{PAGE_ID}\t{PAGE_ID}\t{PAGE_ID}" in status
            for line in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert f"{line}:\t0000000000000000" in status
            assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        command = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        token = read_token(config.page_token)
        assert token.encode() not in command

        def on_loopback(target: str = "/", **headers: str) -> tuple[int, str]:
            answer = get(http.client.HTTPConnection("127.0.0.1", port, timeout=20), target, **headers)
            return answer.status, answer.headers.get("set-cookie", "")

        assert on_loopback()[0] == 401
        link = f"/?token={new_code(token)}"
        status_code, cookie = on_loopback(link)
        assert status_code == 303
        assert on_loopback(link)[0] == 401
        assert on_loopback("/audit", Cookie=cookie.partition(";")[0])[0] == 200
        assert on_loopback("/audit", Authorization=f"Bearer {token}")[0] == 200
    assert processes() == []
    assert not config.page_socket.exists()


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_many_readers_cost_one_document(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_service, "_PAUSE_SECONDS", 0.1)
    config = configured(short_folder, PageConfig())
    collected = Collected()
    with served(config, collected):
        began = time.monotonic()
        for _ in range(20):
            assert get(UnixConnection(config.page_socket)).status == 200
        assert collected.count <= 2 + time.monotonic() - began
        (pid,) = processes()
        os.kill(pid, 9)
        wait_until(lambda: not processes(), "the process has ended")
        assert get(UnixConnection(config.page_socket)).status == 200
        assert processes() != [pid]


@pytest.mark.root
@pytest.mark.slow
@as_root
def test_users_of_the_group_are_served_and_others_are_not(short_folder: Path) -> None:
    require("curl")
    config = configured(short_folder, PageConfig(group="games"))
    for folder in (short_folder, *short_folder.parents[:-1]):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)

    def status_for(user: int, group: int, groups: list[int]) -> str:
        done = subprocess.run(
            ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20"]
            + ["--unix-socket", config.page_socket, "http://localhost/"],
            user=user,
            group=group,
            extra_groups=groups,
            capture_output=True,
            text=True,
        )
        return done.stdout if done.returncode == 0 else f"curl exits {done.returncode}"

    games = 60
    with served(config, Collected()):
        wait_until(lambda: config.page_socket.stat().st_gid == games, "the group has the socket")
        wait_until(lambda: config.page_socket.stat().st_mode & 0o777 == 0o660, "the group may connect")
        assert status_for(12345, games, []) == "200"
        assert status_for(12345, 12345, [games]) == "200"
        assert status_for(12345, 12345, []) == "curl exits 7"  # cannot connect
        config.page_socket.parent.chmod(0o755)
        config.page_socket.chmod(0o666)
        assert status_for(12345, 12345, []).startswith("curl exits")  # connected, and closed unread
        assert status_for(0, 0, []) == "200"


def test_faults_of_the_configuration_do_not_end_the_agent(
    short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    for page in (PageConfig(group="no-such-group"),):
        service = PageService(configured(short_folder, page), Collected)
        service.start()
        wait_until(lambda: bool(caplog.records), "the fault is logged")
        service.stop()
        assert [record.getMessage() for record in caplog.records] == ["page-not-served"]
        assert "no-such-group" in str(caplog.records[0].__dict__)
        caplog.clear()


def test_an_absent_library_is_one_clear_line(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(extras._MODULES, "page", ("starlette", "no_such_library"))
    service = PageService(configured(short_folder, PageConfig()), lambda: Collected())
    service.start()
    wait_until(lambda: bool(caplog.records), "the missing library is logged")
    service.stop()
    details = str(caplog.records[0].__dict__)
    assert "the page needs no_such_library" in details
    assert "pip install 'virt-sse[page]'" in details
    assert overview().disks == ()


_AGENT = """
import sys, time
from pathlib import Path
from support.page_overview import busy_host
from virt_sse.agent.page_service import PageService
from virt_sse.config import Config

class Collected:
    def collect(self):
        return busy_host()

PageService(Config.load(Path(sys.argv[1])), Collected).start()
time.sleep(60)
"""


@pytest.mark.slow
def test_the_process_ends_with_a_killed_agent_and_the_next_agent_serves(short_folder: Path) -> None:
    config = configured(short_folder, PageConfig())
    tests = Path(__file__).parents[2]
    agent = subprocess.Popen([sys.executable, "-c", _AGENT, short_folder], cwd=tests)
    try:
        wait_until(config.page_socket.exists, "the page's socket exists")
        assert get(UnixConnection(config.page_socket)).status == 200
        (pid,) = children(agent.pid)
    finally:
        agent.kill()
        agent.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the page's process ends with the agent")
    with served(config, Collected()):
        wait_until(lambda: _connects(config.page_socket), "the next agent listens")
        assert get(UnixConnection(config.page_socket)).status == 200


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
