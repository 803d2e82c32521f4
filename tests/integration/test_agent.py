"""The agent on a lab host: it serves the hook, keeps libvirt's secrets, lets nobody in, and ends well."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.agent_site import CONFIG, Site, prepared
from support.loaded_commands import PROGRAM, run_command
from support.waiting import wait_until
from virt_sse.agent_client import ask
from virt_sse.errors import AgentUnavailableError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.host import LabHost
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import set_secret
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu.formatting import Volume, make

SERVED = 'virt_sse_agent_hooks_total{event="prepare",result="served"}'
REFUSED = 'virt_sse_agent_hooks_total{event="prepare",result="refused"}'


@pytest.fixture(scope="module")
def running_site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[Site]:
    how = acceleration("boot-sector")
    with (
        prepared(lab_host, CONFIG + "poll-seconds = 0.4\ntimeout = 2\n") as backend,
        LabAgent(lab_host) as agent,
    ):
        yield Site(lab_host, backend, agent, how)


@pytest.fixture
def site(running_site: Site) -> Iterator[Site]:
    yield running_site
    running_site.forget_domains()


def virt_sse(site: Site, *arguments: str, status: int = 0) -> str:
    done = run_command(arguments, site.host.environment)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_agent_serves_the_hook(site: Site) -> None:
    before = site.agent.metrics().get(SERVED, 0)
    guest, disk = site.guest()
    guest.start()
    guest.wait_for("verified 8 sectors, ok")
    metrics = site.agent.metrics()
    assert metrics[SERVED] == before + 1
    assert metrics['virt_sse_agent_hook_seconds_count{event="prepare"}'] >= 1
    assert metrics["virt_sse_agent_unwrap_seconds_count"] >= 1
    site.wait_until_watched(guest)
    status = site.agent.status()
    assert status["libvirt-connected"] is True
    metrics = site.agent.metrics()
    assert metrics["virt_sse_agent_libvirt_connected"] == 1
    assert metrics["virt_sse_agent_domains"] == 1
    assert metrics["virt_sse_agent_keys_watched"] == 1
    assert time.time() - metrics["virt_sse_agent_last_watch_timestamp_seconds"] < 5
    assert guest.name in virt_sse(site, "agent", "status")
    assert json.loads(virt_sse(site, "agent", "status", "--output", "json"))["pid"] == site.agent.own_pid
    lines = (site.host.root / "var/log/virt-sse/audit.jsonl").read_text().splitlines()
    uses = [use for line in lines if (use := json.loads(line))["disk"] == str(disk.id)]
    unwraps = [use for use in uses if use["action"] == "unwrap"]
    assert {(use["component"], use["domain"]) for use in unwraps} == {("agent", guest.name)}
    guest.destroy()
    assert site.secrets() == []


def test_a_refusal_by_the_agent_reads_as_one_by_the_hook(site: Site) -> None:
    guest, _ = site.guest()
    keyring = site.backend.host.config.state_directory / "platform-managed"
    keyring.rename(keyring.with_name("elsewhere"))
    try:
        before = site.agent.metrics().get(REFUSED, 0)
        by_agent = site.refusal(guest)
        assert site.agent.metrics()[REFUSED] == before + 1
        site.agent.kill()
        by_hook = site.refusal(guest)
    finally:
        keyring.with_name("elsewhere").rename(keyring)
    assert "virt-sse: error: " in by_agent
    assert by_agent == by_hook
    site.agent.start()


def test_without_an_agent_the_hook_serves_in_its_own_process(site: Site) -> None:
    guest, _ = site.guest()
    site.agent.kill()
    assert site.agent.socket.exists(), "a killed agent leaves its socket"
    guest.start()
    guest.wait_for("verified")
    guest.destroy()
    assert site.secrets() == []
    site.agent.start()
    guest.start()
    site.wait_until_watched(guest)


def test_the_hook_waits_for_a_hanging_agent_and_then_serves_by_itself(site: Site) -> None:
    guest, _ = site.guest()
    site.agent.suspend()
    try:
        began = time.monotonic()
        guest.start()
        assert 2 < time.monotonic() - began < 10
        guest.wait_for("verified")
    finally:
        site.agent.resume()
    site.wait_until_watched(guest)


def test_the_agent_ends_at_once_and_removes_its_socket(site: Site) -> None:
    guest, _ = site.guest()
    guest.start()
    site.wait_until_watched(guest)
    for number in (signal.SIGTERM, signal.SIGINT):
        began = time.monotonic()
        os.kill(site.agent.pid, number)
        assert site.agent.wait() == 0
        assert time.monotonic() - began < 5
        assert not site.agent.socket.exists()
        assert guest.is_active()
        site.agent.start()
    assert site.agent.log()[-1]["event"] != "watch-failed"
    with pytest.raises(AgentUnavailableError):
        ask(site.agent.socket.with_name("none"), "GET", "/status", timeout=1)


def test_a_second_agent_is_refused(site: Site) -> None:
    said = virt_sse(site, "agent", "run", status=1)
    assert "another agent serves" in said
    assert site.agent.status()["pid"] == site.agent.own_pid


def test_another_user_is_refused_by_the_agent(site: Site) -> None:
    """Nor would be if the modes of folder and socket let him."""
    client = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(sys.argv[1]);"
        "s.sendall(b'GET /status HTTP/1.0\\r\\n\\r\\n'); sys.exit(bool(s.recv(10)))"
    )
    command = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        client,
    ]
    path = site.agent.socket

    def attempt() -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=20)

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert "PermissionError" in attempt().stderr
    path.parent.chmod(0o755)
    path.chmod(0o666)
    try:
        said = attempt()
        assert said.returncode == 0 or "BrokenPipe" in said.stderr or "ConnectionReset" in said.stderr
    finally:
        path.chmod(0o600)
        path.parent.chmod(0o700)
    site.wait_for_event("client-refused", user=65534)


def test_a_restart_of_libvirtd_restores_secrets_in_use_and_drops_the_rest(site: Site) -> None:
    """The agent restores what the hook could not, and drops what nobody has any more."""
    (guest, _), (other, disk) = site.guest(), site.guest()
    guest.start()
    other.start()
    site.wait_until_watched(guest)
    site.wait_until_watched(other)
    before = site.secrets()
    assert len(before) == 2
    hook = site.backend.host.config.hook_path
    script = hook.read_text()
    hook.write_text("#!/bin/sh\nexit 0\n")
    try:
        site.host.restart_libvirtd()
        wait_until(lambda: site.secrets() == before, "libvirt has the same secrets as before")
        site.wait_for_event("secrets-restored", domain=guest.name)
        for each in (guest, other):
            logs = [f"qemu/{each.name}.log", "libvirtd.log"]
            assert each.is_active(), [
                (site.host.root / f"var/log/libvirt/{log}").read_text()[-2000:] for log in logs
            ]
        other.destroy()
        wait_until(lambda: len(site.secrets()) == 1, "libvirt has one secret of ours")
    finally:
        hook.write_text(script)
    site.wait_until_watched(guest)
    site.wait_for_event("secret-dropped", usage=f"virt-sse:{disk.id}:service")


def test_secrets_of_no_domain_are_dropped(site: Site) -> None:
    connection = site.host.connect()
    try:
        set_secret(connection, SecretName(uuid.uuid4(), "service"), Dek.generate())
    finally:
        connection.close()
    assert len(site.secrets()) == 1
    wait_until(lambda: site.secrets() == [], "libvirt has no secret of ours")


def test_an_odd_secret_attached_to_a_running_domain_does_not_blind_the_agent(site: Site) -> None:
    """A disk of the administrator's own, with a secret whose usage id only looks like one of ours."""
    guest, _ = site.guest()
    guest.start()
    site.wait_until_watched(guest)
    image, dek = site.host.images / "odd.raw", Dek.generate()
    make(image, DiskFormat.RAW, 1 << 20, [Volume(AES_256_XTS, dek)])
    connection = site.host.connect()
    try:
        secret = connection.secretDefineXML(
            "<secret ephemeral='yes' private='yes'>"
            "<usage type='volume'><volume>virt-sse:zzz</volume></usage></secret>"
        )
        secret.setValue(dek.passphrase)
        domain = connection.lookupByName(guest.name)
        domain.attachDevice(
            f"<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'>"
            "<encryption format='luks'><secret type='passphrase' usage='virt-sse:zzz'/></encryption></source>"
            "<target dev='vdz' bus='virtio'/></disk>"
        )
        wait_until(
            lambda: site.agent.metrics()["virt_sse_agent_unreadable_parts"] == 2, "both parts are counted"
        )
        site.wait_for_event("domain-unclear", domain=guest.name)
        metrics = site.agent.metrics()
        assert (metrics["virt_sse_agent_domains"], metrics["virt_sse_agent_keys_watched"]) == (1, 1)
        guest.destroy()
        assert site.secrets() == ["virt-sse:zzz"]
        secret.undefine()
        wait_until(lambda: site.agent.metrics()["virt_sse_agent_unreadable_parts"] == 0, "nothing is odd")
    finally:
        connection.close()


def test_a_request_that_is_no_event_is_refused(site: Site) -> None:
    def post(body: str, *extra: str) -> tuple[int, str]:
        done = subprocess.run(
            ["curl", "-s", "-w", "\n%{http_code}", "--unix-socket", site.agent.socket, *extra]
            + ["http://agent/hook", "--data-binary", "@-"],
            input=body,
            capture_output=True,
            text=True,
            timeout=20,
        )
        answer, _, status = done.stdout.rpartition("\n")
        return int(status), answer

    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    for body in ("", "x", "[]", "{}", '{"event": "prepare"}', '{"event": "x", "domain": "d", "xml": ""}'):
        status, answer = post(body)
        assert status == 400
        assert "not an event of the libvirt hook" in json.loads(answer)["error"]
    assert post("{}", "-H", "Content-Length: 99999999999")[0] == 400
    event = {"event": "prepare", "domain": "d", "xml": "<domain"}
    status, answer = post(json.dumps(event))
    assert status == 409
    assert "invalid domain XML" in json.loads(answer)["error"]
    assert site.agent.status()["pid"] == site.agent.own_pid


def test_the_agent_may_start_before_libvirtd(site: Site) -> None:
    site.agent.stop()
    pid = int((site.host.directory / "run/libvirt/libvirtd.pid").read_text())
    guest, _ = site.guest()
    send = 'kill -s "$1" "$2"'
    # Stopped, it is as good as absent: it answers nobody.
    site.host.run(["sh", "-c", send, "sh", "STOP", str(pid)], check=True)
    try:
        site.agent.start()
        assert site.agent.status()["libvirt-connected"] is False
    finally:
        site.host.run(["sh", "-c", send, "sh", "CONT", str(pid)], check=True)
    guest.start()
    site.wait_until_watched(guest)


def test_systemd_starts_the_agent_at_the_first_request(site: Site) -> None:
    activate = shutil.which("systemd-socket-activate")
    if not activate:
        pytest.skip("systemd-socket-activate is not installed")
    site.agent.stop()
    path = site.agent.socket
    with subprocess.Popen(
        [activate, f"--listen={path}", "--setenv=VIRT_SSE_ROOT", "--setenv=LIBVIRT_DEFAULT_URI"]
        + [str(PROGRAM), "agent", "run"],
        env=site.host.environment,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(path.exists, "systemd listens at the agent's socket")
            guest, _ = site.guest()
            guest.start()
            assert json.loads(ask(path, "GET", "/status", timeout=10))["pid"] == process.pid
            process.terminate()
            assert process.wait(timeout=10) == 0
            assert path.exists(), "the socket is systemd's to remove"
        finally:
            process.kill()
    site.agent.start()


def test_the_systemd_units_are_valid(site: Site, tmp_path: Path) -> None:
    said = virt_sse(site, "agent", "units", str(tmp_path / "units"))
    units = sorted((tmp_path / "units").iterdir())
    assert all(f"made {unit}" in said for unit in units)
    assert f"ListenStream={site.agent.socket}" in (tmp_path / "units/virt-sse-agent.socket").read_text()
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
