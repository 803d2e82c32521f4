"""The dashboard and the alert rules in the documents name metrics that the agent has."""

from __future__ import annotations

import json
import re
import subprocess

from support.documents import CHECKOUT
from support.images import require
from virt_sse.agent.metrics import Metrics
from virt_sse.model.events import KeyAction, KeyEvent
from virt_sse.model.keys import KeyId, KeyState

FOLDER = CHECKOUT / "backend/docs/monitoring"
RULES, DASHBOARD = FOLDER / "alerts.yml", FOLDER / "grafana-dashboard.json"
_NAME = re.compile(r"\bvirt_sse_agent_\w+")


def exposed() -> set[str]:
    """The names of all samples of an agent, after each of its labelled metrics was used."""
    metrics = Metrics()
    metrics.show_keys([("p:k:1", "", KeyState.ENABLED)])
    metrics.virt_sse_key_event(KeyEvent(KeyAction.UNWRAP, KeyId("p", "k", "1")))
    with metrics.hook("prepare"):
        pass
    for counter in (metrics.actions, metrics.failed_actions, metrics.plaintext_links_found):
        counter.labels("any").inc()
    return set(_NAME.findall("\n".join(re.findall(r"^\w+", metrics.render().decode(), re.MULTILINE))))


def test_the_dashboard_names_existing_metrics() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    assert all(_NAME.search(expression) for expression in expressions)
    names = set(_NAME.findall(DASHBOARD.read_text("utf-8")))
    assert names - exposed() == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_alert_rules_name_existing_metrics() -> None:
    text = RULES.read_text("utf-8")
    names = set(_NAME.findall(text))
    assert len(names) > 5
    assert names - exposed() == set()
    assert len(re.findall(r"- alert: VirtSse\w+\n +expr: ", text)) == text.count("- alert:") > 5
    assert text.count("severity: ") == text.count("- alert:") == text.count("summary: ")


def test_prometheus_accepts_the_alert_rules() -> None:
    require("promtool")
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
