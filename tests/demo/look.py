"""Last act: the page of the host, with the disks and keys of the acts before."""

from __future__ import annotations

import http.client
import socket
import sys
from urllib.parse import urlsplit

from stage import Stage, heading, quote
from virt_sse.errors import LabError
from virt_sse.lab.agents import LabAgent


def play(stage: Stage) -> None:
    """Play the act; on a terminal, the page stays until the reader ends the demo.

    :raise LabError: On an unexpected result.
    """
    heading("A page about the host, served by a process without rights")
    path = stage.host.root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[page]\nlisten = "127.0.0.1:{_free_port()}"\n')
    with LabAgent(stage.host):
        stage.virsh("start", "books")
        if "books" not in _seen(stage.run("virt-sse", "agent", "page").strip(), "/domains"):
            raise LabError("the page does not show the running domain")
        stage.virt_sse("agent", "page")
        if sys.stdin.isatty():
            quote("open the link in a browser on this machine; Enter ends the demo")
            sys.stdin.readline()
        stage.virsh("destroy", "books")
    path.unlink()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _seen(link: str, target: str) -> str:
    """What a browser sees at *target* after it has opened the link."""
    address = urlsplit(link)
    cookie = _answer(address.netloc, f"/?{address.query}", {}).headers["Set-Cookie"] or ""
    return _answer(address.netloc, target, {"Cookie": cookie.partition(";")[0]}).read().decode()


def _answer(place: str, target: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(place, timeout=30)
    connection.request("GET", target, headers=headers)
    return connection.getresponse()
