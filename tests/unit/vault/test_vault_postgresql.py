"""A new vault in PostgreSQL: what a killed ``vault init`` leaves, and what is refused."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from support.postgresql import PostgresqlServer
from support.vault_doubles import Records
from virt_sse.errors import InvalidValueError, VaultError
from virt_sse.vault.home.settings import Tier
from virt_sse.vault.hsm.access import add_hsm
from virt_sse.vault.initialise import initialise
from virt_sse.vault.vault import open_vault


class Killed(BaseException):
    """Ends ``vault init`` at once, as kill -9 does: nothing handles this exception."""


STEPS = (
    "virt_sse.vault.initialise.new_signing_key",
    "virt_sse.vault.initialise._add_administrator",
    "pathlib.Path.replace",
)


def test_a_killed_init_is_repeated_and_another_vault_is_left_alone(
    postgresql: PostgresqlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql.database(template="template0") as name:
        url = postgresql.url(name)
        for step in STEPS:
            with monkeypatch.context() as patch:
                patch.setattr(step, Mock(side_effect=Killed))
                with pytest.raises(Killed):
                    initialise(tmp_path / "vault", database=url)
        made = initialise(tmp_path / "vault", database=url)
        with open_vault(made, Records()) as vault:
            assert [each.name for each in vault.principals.all()] == ["administrator"]
        with pytest.raises(VaultError, match="the database has a vault already") as refused:
            initialise(tmp_path / "second", database=url)
        assert "import-root" in (refused.value.hint or "")
        with open_vault(made, Records()):
            pass


def test_all_instances_need_one_hsm(postgresql: PostgresqlServer, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="all of its instances reach"):
        initialise(tmp_path / "vault", tier=Tier.PREMIUM, database=postgresql.url("postgres"))
    with postgresql.database(template="template0") as name:
        made = initialise(tmp_path / "standard", database=postgresql.url(name))
        with pytest.raises(InvalidValueError, match="all of its instances reach"):
            add_hsm(made, {})
    with pytest.raises(InvalidValueError, match="SQLite in its folder, or in PostgreSQL"):
        initialise(tmp_path / "vault", database="mysql://host/vault")
    with pytest.raises(VaultError, match="invalid URL of the vault's database"):
        initialise(tmp_path / "vault", database="postgresql://host:port/vault")


def test_an_unreachable_database_leaves_no_vault(postgresql: PostgresqlServer, tmp_path: Path) -> None:
    with pytest.raises(VaultError, match="cannot open the vault's database"):
        initialise(tmp_path / "vault", database=postgresql.url("missing"))
    assert not list((tmp_path / "vault").glob("*.key"))
    initialise(tmp_path / "vault")
