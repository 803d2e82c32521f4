"""Hostile bytes at the edges: the terminal, the hook's standard input, a process in the agent's place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from support.parsers.vaults import new_credential
from virt_sse import agent_client
from virt_sse.cli.output import OutputFormat, print_fields, print_rows
from virt_sse.errors import AgentUnavailableError, ImageError, VaultError, report
from virt_sse.vault_client.credential_file import CredentialFile
from virt_sse.vault_client.https import VaultConnection

ESCAPE = "a\x1b[2J\nvirt-sse: error: forged\ud800\u2028"


def test_an_error_message_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    report(ImageError(ESCAPE, hint=ESCAPE))
    printed = capsys.readouterr().err
    assert printed == "".join(
        f"virt-sse: {kind}: a\\x1b[2J\\nvirt-sse: error: forged\\ud800\\u2028\n" for kind in ("error", "hint")
    )


def test_a_table_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"name": ESCAPE}], ["name"], OutputFormat.TABLE)
    print_fields({"name": ESCAPE, "list": [{"key": ESCAPE}]}, OutputFormat.TABLE)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 4
    assert printed.count("forged\\ud800\\u2028") == 3


@pytest.mark.parametrize("event", ["prepare", "release", "reconnect"])
def test_the_hook_gets_bytes_that_are_not_utf_8(root: Path, event: str) -> None:
    """In a locale other than C, Python decodes strictly; PYTHONIOENCODING stands for such a locale."""
    done = subprocess.run(
        [sys.executable, "-m", "virt_sse.hook", "web", event, "begin", "-"],
        input=b"<domain><name>\xff</name><!-- virt-sse:x --></domain>",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    if event == "prepare":
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"virt-sse: error: invalid domain XML: no valid UTF-8 at character 14" in done.stderr


def test_an_endless_answer_of_the_agent_is_cut_off(short_folder: Path) -> None:
    path = short_folder / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    while True:
                        connection.sendall(bytes(1 << 20))
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(AgentUnavailableError, match="more than 16 MiB"):
            agent_client.ask(path, "GET", "/status", timeout=30)
        thread.join()


def test_a_credential_file_without_a_ca_trusts_no_authority(tmp_path: Path) -> None:
    """OpenSSL trusts the system's authorities if no other is named."""
    path = tmp_path / "credential.json"
    path.touch(0o600)
    path.write_bytes(new_credential())
    file = CredentialFile.read(path)
    VaultConnection(file)._trust()
    for authority in ("", "\u00e9"):
        changed = msgspec.structs.replace(file, ca_certificate=authority)
        with pytest.raises(VaultError, match="CA certificate"):
            VaultConnection(changed)._trust()
