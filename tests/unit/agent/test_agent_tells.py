"""What the agent says: its log, its metrics and its units."""

from __future__ import annotations

import json
import logging
import re
import uuid
from pathlib import Path

import pytest

from virt_sse.agent.logs import JsonLines, Readable, fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.systemd import NAMES, write_units
from virt_sse.config import Config
from virt_sse.errors import ConfigError, InvalidValueError, PolicyError
from virt_sse.model.events import KeyAction, KeyEvent
from virt_sse.model.keys import Dek, KeyRef, KeyState


def record(event: str, values: dict[str, object], error: bool = False) -> logging.LogRecord:
    made = logging.LogRecord("virt_sse.agent", logging.WARNING, "", 0, event, None, None)
    for name, value in fields(values).items():
        setattr(made, name, value)
    if error:
        try:
            raise ValueError("wrong")
        except ValueError as exc:
            made.exc_info = (type(exc), exc, exc.__traceback__)
    return made


def test_log_lines_are_json_for_programs() -> None:
    number, dek = uuid.uuid4(), Dek.generate()
    text = JsonLines().format(record("domain-ended", {"domain": "a\nb", "id": number, "dek": dek}))
    assert "\n" not in text
    document = json.loads(text)
    assert document.pop("time").endswith("+00:00")
    assert document == {
        "level": "warning",
        "event": "domain-ended",
        "domain": "a\nb",
        "id": str(number),
        "dek": "Dek()",
    }
    failed = JsonLines().format(record("watch-failed", {}, error=True))
    assert "\n" not in failed
    assert "ValueError: wrong" in json.loads(failed)["traceback"]


def test_log_lines_are_text_for_people() -> None:
    assert (
        Readable().format(record("domain-ended", {"domain": "d"}))
        == "virt-sse: warning: domain-ended domain=d"
    )


def test_metrics_show_keys_events_and_hooks() -> None:
    metrics = Metrics()
    metrics.show_keys([("p:k:1", "", KeyState.ENABLED), ("p:k:2", "set", KeyState.DENIED)])
    metrics.show_keys([("p:k:2", "set", KeyState.DENIED)])
    metrics.virt_sse_key_event(KeyEvent(KeyAction.UNWRAP, KeyRef("p", "k"), seconds=0.002))
    metrics.virt_sse_key_event(KeyEvent(KeyAction.UNWRAP, KeyRef("p", "k"), error="no"))
    with metrics.hook("prepare"):
        pass
    with pytest.raises(PolicyError), metrics.hook("prepare"):
        raise PolicyError("no")
    lines = metrics.render().decode().splitlines()
    for line in (
        "virt_sse_agent_keys_watched 1.0",
        'virt_sse_agent_key_state{encryption_set="set",key="p:k:2",state="denied"} 1.0',
        'virt_sse_agent_key_state{encryption_set="set",key="p:k:2",state="enabled"} 0.0',
        'virt_sse_agent_key_uses_total{action="unwrap",result="allowed"} 1.0',
        'virt_sse_agent_key_uses_total{action="unwrap",result="refused"} 1.0',
        'virt_sse_agent_unwrap_seconds_bucket{le="0.0025"} 2.0',
        'virt_sse_agent_hooks_total{event="prepare",result="served"} 1.0',
        'virt_sse_agent_hooks_total{event="prepare",result="refused"} 1.0',
    ):
        assert line in lines
    assert not any("p:k:1" in line for line in lines)


def test_units_name_this_installation(tmp_path: Path) -> None:
    config = Config.load(tmp_path / "100% root")
    written = write_units(tmp_path / "units", config)
    assert [path.name for path in written] == list(NAMES)
    texts = {path.name: path.read_text() for path in written}
    lines = [line for text in texts.values() for line in text.splitlines()]
    assert not any(re.search(r"@(?!system|mount)", line) for line in lines)
    assert "100%% root/run/virt-sse/agent.sock" in texts["virt-sse-agent.socket"]
    assert 'virt-sse" agent run' in texts["virt-sse-agent.service"]
    assert 'virt-sse" vault serve' in texts["virt-sse-vault.service"]


def test_units_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="invalid characters"):
        write_units(tmp_path / "units", Config.load(tmp_path / 'a"b'))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write units"):
        write_units(tmp_path / "file", Config.load(tmp_path))
