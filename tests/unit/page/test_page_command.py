"""``virt-sse agent page``."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import CommandLine
from virt_sse.page.access import Sessions, provided_token


def test_the_command_prints_a_link_that_opens_the_page(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    config, token = tmp_path / "etc/virt-sse/config.toml", tmp_path / "var/lib/virt-sse/page-token"
    assert str(tmp_path / "run/virt-sse-page/page.sock") in cli("agent", "page")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('[page]\nlisten = "127.0.0.1:8088"\n')
    assert "page-token is missing" in cli.refuses("agent", "page")
    secret = provided_token(token)
    link = cli("agent", "page").strip()
    place, _, code = link.partition("?token=")
    assert place == "http://127.0.0.1:8088/"
    assert secret not in link
    assert Sessions(secret).redeem(code)
    assert json.loads(cli("agent", "page", "-o", "json"))["listen"] == "127.0.0.1:8088"
    token.chmod(0o644)
    assert "is open to other users" in cli.refuses("agent", "page")
    token.chmod(0o600)
    token.write_text("short\n")
    assert "holds no token" in cli.refuses("agent", "page")
