"""Which packages a command loads: the start and the end of a domain, and listings, wait for imports."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.command_line import no_libvirt
from virt_sse.agent.listener import listening
from virt_sse.agent.server import AgentServer, AgentService
from virt_sse.agent_client import SOCKET
from virt_sse.backend import Backend
from virt_sse.libvirt import hook_script
from virt_sse.model.disks import DiskState, NewDisk

DATABASE = {"sqlalchemy", "alembic"}
SERVER = {"http", "prometheus_client", "starlette", "uvicorn", "aiohttp"}
COMMAND_LINE = {"typer", "click", "rich"}
VAULT = {"azure", "jwt", "PyKCS11"}
QMP = {"asyncio", "qemu"}
SLOW = {"rich", "pydantic", "email", "importlib.metadata"}
NOUNS = {
    f"virt_sse.cli.{name}"
    for name in ("agent", "audit", "des", "disk", "host", "image", "key", "snapshot", "store", "vault", "vm")
}
PROVIDERS = {"virt_sse_plugins", "pluggy", "cryptography"}

COMMAND = "from virt_sse.cli.main import main\n"
HOOK = hook_script.program().removesuffix("sys.exit(main())")
_RUN = (
    "\nimport sys, atexit\natexit.register(lambda: print('LOADED', *sorted(sys.modules)))\nsys.exit(main())"
)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "cryptsetup")


@pytest.fixture
def domain(backend: Backend) -> str:
    """The definition of a domain with an encrypted disk named ``disk``."""
    backend.disks.create(NewDisk(name="disk", size=1 << 20))
    element = backend.domains.disk_element("disk")
    return (
        "<domain type='qemu'><name>web</name><uuid>0b2d2d1c-9d3c-4a83-9d0c-7a1d5a3f8f10</uuid>"
        f"<devices>{element}</devices></domain>"
    )


@pytest.fixture
def _agent(root: Path) -> Iterator[None]:
    """An agent that accepts every event."""
    with listening(root / SOCKET) as listener:
        service = AgentService(lambda *_: None, dict, lambda: b"")
        server = AgentServer(listener, service)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield
        server.shutdown()
        thread.join()
        server.server_close()


def loaded(root: Path, program: str, *arguments: str, stdin: str = "", status: int = 0) -> set[str]:
    """The packages loaded at the end of a program, and the modules of virt_sse."""
    done = subprocess.run(
        [sys.executable, "-I", *(["-S"] if program == HOOK else []), "-c", program + _RUN, *arguments],
        input=stdin,
        env=os.environ | {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    modules = done.stdout.splitlines()[-1].split()[1:]
    return {module.partition(".")[0] for module in modules} | {
        module for module in modules if module.startswith("virt_sse.")
    }


def test_help_loads_the_command_line_alone(root: Path, backend: Backend) -> None:
    packages = loaded(root, COMMAND, "--help")
    assert "typer" in packages
    assert not packages & (DATABASE | SERVER | VAULT | QMP | SLOW | {"libvirt", "cryptography"})
    assert packages & NOUNS == set()


@pytest.mark.usefixtures("domain")
def test_a_listing_loads_no_services(root: Path) -> None:
    packages = loaded(root, COMMAND, "disk", "list")
    assert "virt_sse.store.reader" in packages
    assert not packages & (DATABASE | SERVER | VAULT | QMP | SLOW | {"libvirt", "cryptography"})
    assert packages & NOUNS == {"virt_sse.cli.disk"}
    assert not packages & {"virt_sse.backend", "virt_sse.keys.host", "virt_sse.qemu.img"}


@pytest.mark.usefixtures("domain")
def test_a_look_at_a_disk_loads_no_services(root: Path) -> None:
    packages = loaded(root, COMMAND, "disk", "show", "disk")
    assert {"virt_sse.qemu.image_file", "libvirt"} <= packages
    assert not packages & (DATABASE | SERVER | VAULT | QMP | SLOW | {"virt_sse.backend"})


def test_a_start_without_an_agent_loads_what_it_uses(root: Path, domain: str) -> None:
    packages = loaded(root, HOOK, "web", "prepare", "begin", "-", stdin=domain, status=1)
    assert {"libvirt", "virt_sse.domains.start"} <= packages
    assert not packages & (DATABASE | SERVER | COMMAND_LINE | VAULT | QMP | SLOW | {"virt_sse.backend"})


def test_an_end_without_an_agent_loads_no_store(root: Path, domain: str) -> None:
    packages = loaded(root, HOOK, "web", "release", "end", "-", stdin=domain, status=1)
    assert "virt_sse.domains.release" in packages
    assert not packages & (DATABASE | SERVER | COMMAND_LINE | VAULT | QMP | PROVIDERS | {"sqlite3"})


@pytest.mark.usefixtures("_agent")
@pytest.mark.parametrize("event", ["prepare", "release", "reconnect"])
def test_with_an_agent_the_hook_is_a_thin_client(root: Path, domain: str, event: str) -> None:
    packages = loaded(root, HOOK, "web", event, "begin", "-", stdin=domain)
    assert {name for name in packages if name.startswith("virt_sse.")} == {
        "virt_sse.agent_client",
        "virt_sse.errors",
        "virt_sse.hook",
    }
    heavy = {"libvirt", "msgspec", "logging", "dataclasses", "sqlite3", "subprocess"}
    heavy |= {"site", "pathlib", "typing", "ctypes", "inspect"}
    assert not packages & (DATABASE | SERVER | COMMAND_LINE | VAULT | QMP | PROVIDERS | heavy)


@pytest.mark.parametrize("program", [COMMAND, HOOK])
def test_work_of_a_killed_command_is_finished_first(
    root: Path, domain: str, backend: Backend, program: str
) -> None:
    disk = backend.disks.create(NewDisk(name="killed", size=1 << 20))
    backend.host.store.set_state(disk.id, DiskState.DELETING)
    if program == COMMAND:
        packages = loaded(root, program, "disk", "list")
    else:
        packages = loaded(root, program, "web", "prepare", "begin", "-", stdin=domain, status=1)
    assert "virt_sse.backend" in packages
    assert [disk.name for disk in backend.disks.all()] == ["disk"]
    assert not disk.path.exists()
