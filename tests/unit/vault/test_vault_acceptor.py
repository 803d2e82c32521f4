"""The vault's limits of connections and of log lines, without a server."""

from __future__ import annotations

import logging
import resource

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from support.vault_doubles import Clock, Records
from virt_sse.errors import InvalidValueError
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.http import connections, server
from virt_sse.vault.http.app import VaultApplication
from virt_sse.vault.http.limits import Limits
from virt_sse.vault.http.log_limit import LogLimit
from virt_sse.vault.vault import open_vault


def test_headers_are_read_by_h11_whatever_is_installed(directory: VaultDirectory, records: Records) -> None:
    with open_vault(directory, records) as vault:
        application = VaultApplication(vault, Limits())
        try:
            config = server._configuration(directory, application, Limits())
            config.load()
        finally:
            application.close()
    assert isinstance(config, uvicorn.Config)
    assert issubclass(config.http_protocol_class, H11Protocol)
    assert (config.h11_max_incomplete_event_size or 0) <= 64 << 10


@pytest.mark.parametrize(("soft", "most"), [(1 << 20, 1024), (1000, 872), (200, 72), (64, 16), (2, 1)])
def test_connections_leave_descriptors_for_other_uses(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (soft, soft))
    assert connections.most_connections(1024) == most


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::5", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:ffff::6", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_clients_are_counted_by_address_or_network(address: str, client: str) -> None:
    assert connections._client(address) == client


@pytest.mark.parametrize(
    "wrong",
    [
        {"connections": 0},
        {"connections_per_address": 0},
        {"request_seconds": 0.0},
        {"idle_seconds": float("inf")},
    ],
)
def test_impossible_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidValueError):
        Limits(**wrong)  # type: ignore[arg-type] # wrong on purpose


def test_a_message_is_logged_once_a_minute_with_the_number_suppressed(clock: Clock) -> None:
    limit = LogLimit(clock)

    def said(message: str, *arguments: str) -> str | None:
        record = logging.LogRecord("x", logging.WARNING, "x", 1, message, arguments, None)
        return record.getMessage() if limit.filter(record) else None

    assert said("from %s", "a") == "from a"
    assert said("from %s", "b") is None
    assert said("of %s", "b") == "of b"
    assert said("from %s", "c") is None
    clock.now += 60
    assert said("from %s", "d") == "from d (2 more since the last line)"
    clock.now += 60
    assert said("from %s", "e") == "from e"
