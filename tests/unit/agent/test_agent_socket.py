"""Both ends of the agent's socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virt_sse.agent.listener import listening
from virt_sse.agent.server import AgentServer, AgentService
from virt_sse.agent_client import SOCKET, TIMEOUT_SECONDS, ask, configured_timeout, serve_event
from virt_sse.config import Config
from virt_sse.config.file import AgentConfig
from virt_sse.errors import (
    AgentError,
    AgentUnavailableError,
    ConfigError,
    KeyProviderUnavailableError,
    VirtSseError,
)

Hook = Callable[[str, str, str], str | None]


@pytest.fixture
def root(short_folder: Path) -> Path:
    return short_folder


@pytest.fixture
def serve(root: Path) -> Iterator[Callable[[Hook], AgentServer]]:
    ends = []

    def start(hook: Hook) -> AgentServer:
        listener = listening(root / SOCKET)
        service = AgentService(hook, lambda: {"pid": 1}, lambda: b"# metrics\n")
        server = AgentServer(listener.__enter__(), service)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()

        def end() -> None:
            server.shutdown()
            thread.join()
            server.server_close()
            listener.__exit__(None, None, None)

        ends.append(end)
        return server

    yield start
    for end in ends:
        end()


def raising(error: Exception) -> Hook:
    def hook(event: str, domain: str, xml: str) -> None:
        raise error

    return hook


def test_an_event_arrives_unchanged(serve: Callable[[Hook], AgentServer], root: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def hook(*event: str) -> str:
        seen.append(event)
        return "<domain>changed</domain>"

    serve(hook)
    xml = "<domain>\udcff ü &amp;</domain>" * 10_000
    assert serve_event(root, "prepare", "a 'domain'", xml) == "<domain>changed</domain>"
    assert seen == [("prepare", "a 'domain'", xml)]
    assert json.loads(ask(root / SOCKET, "GET", "/status", timeout=5)) == {"pid": 1}
    assert ask(root / SOCKET, "GET", "/metrics", timeout=5) == b"# metrics\n"
    with pytest.raises(VirtSseError, match="no such page"):
        ask(root / SOCKET, "GET", "/secrets", timeout=5)
    with pytest.raises(VirtSseError, match="no such page"):
        ask(root / SOCKET, "POST", "/status", timeout=5)


def test_a_refusal_keeps_its_words_and_its_hint(serve: Callable[[Hook], AgentServer], root: Path) -> None:
    serve(raising(KeyProviderUnavailableError("the vault is silent", hint="wake it")))
    with pytest.raises(VirtSseError, match=r"^the vault is silent$") as caught:
        serve_event(root, "prepare", "d", "")
    assert caught.value.hint == "wake it"


def test_a_failure_of_the_agent_is_a_refusal_without_details(
    serve: Callable[[Hook], AgentServer], root: Path
) -> None:
    serve(raising(RuntimeError("secret")))
    with pytest.raises(VirtSseError, match=r"^the agent failed: RuntimeError$"):
        serve_event(root, "prepare", "d", "")


def test_without_an_agent_the_hook_is_on_its_own(root: Path) -> None:
    assert serve_event(root, "prepare", "d", "") is None
    path = root / SOCKET
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert serve_event(root, "prepare", "d", "") is None
    path.unlink()
    path.write_text("no socket")
    assert serve_event(root, "prepare", "d", "") is None


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.0 200", b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{}", b"x"]
)
def test_a_truncated_answer_counts_as_no_answer(root: Path, answer: bytes) -> None:
    path = root / SOCKET
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(AgentUnavailableError):
            ask(path, "GET", "/status", timeout=5)
        thread.join()


def test_a_silent_agent_is_given_up_in_time(root: Path) -> None:
    path = root / SOCKET
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(AgentUnavailableError, match=r"within 0.2 s"):
            ask(path, "GET", "/status", timeout=0.2)
        assert time.monotonic() - began < 2


def test_requests_under_way_are_answered_at_the_end(serve: Callable[[Hook], AgentServer], root: Path) -> None:
    begun, answered = threading.Event(), []

    def hook(event: str, domain: str, xml: str) -> None:
        begun.set()
        time.sleep(0.3)

    server = serve(hook)
    client = threading.Thread(target=lambda: answered.append(serve_event(root, "prepare", "d", "")))
    client.start()
    begun.wait()
    server.shutdown()
    server.server_close()
    client.join()
    assert answered == [""]


def test_a_socket_belongs_to_one_agent_and_goes_with_it(root: Path) -> None:
    path = root / SOCKET
    with listening(path) as listener:
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
        assert listener.get_inheritable() is False
        with pytest.raises(AgentError, match="another agent serves"), listening(path):
            pass
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with listening(path):
        assert path.exists()


def test_a_socket_of_another_listener_is_not_removed(root: Path) -> None:
    path = root / SOCKET
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(AgentError, match="listens at"), listening(path):
            pass
    assert path.exists()


def test_a_path_too_long_for_a_socket_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="cannot listen"), listening(tmp_path / ("x" * 120) / "agent.sock"):
        pass


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", TIMEOUT_SECONDS),
        ("[agent]\ntimeout = 1.5\n", 1.5),
        ("[agent]\ntimeout = 2\n", 2.0),
        ("[agent]\npoll-seconds = 2\n", TIMEOUT_SECONDS),
        ("[agent]\ntimeout = 'x'\n", TIMEOUT_SECONDS),
        ("[agent]\ntimeout = -1\n", TIMEOUT_SECONDS),
        ("[agent]\ntimeout = inf\n", TIMEOUT_SECONDS),
        (f"[agent]\ntimeout = {'9' * 400}\n", TIMEOUT_SECONDS),
        (f"[agent]\ntimeout = {'[' * 5000}\n", TIMEOUT_SECONDS),
        ("[agent\n", TIMEOUT_SECONDS),
        ("agent = 1\n# [agent]\n", TIMEOUT_SECONDS),
    ],
)
def test_the_hook_reads_its_timeout_by_itself(root: Path, text: str, seconds: float) -> None:
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert configured_timeout(root) == seconds


def test_the_agents_configuration_is_read_and_checked(root: Path) -> None:
    assert Config.load(root).agent == AgentConfig()
    assert Config.load(root).agent.timeout == TIMEOUT_SECONDS
    assert Config.load(root).agent_socket == root / SOCKET
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("[agent]\npoll-seconds = 0.5\nprobe-seconds = 10\n")
    assert Config.load(root).agent == AgentConfig(poll_seconds=0.5, probe_seconds=10.0)
    for value in ("0", "-1", "'2'", "true", "inf", "nan", "[]"):
        path.write_text(f"[agent]\npoll-seconds = {value}\n")
        with pytest.raises(ConfigError, match="number of seconds above 0"):
            Config.load(root)
    path.write_text("[agent]\npoll = 1\n")
    with pytest.raises(ConfigError, match="unknown option 'poll'"):
        Config.load(root)
