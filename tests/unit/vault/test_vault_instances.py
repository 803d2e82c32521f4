"""Two instances of one vault in PostgreSQL: each change happens once, and both know of each change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support.postgresql import PostgresqlServer
from support.vault_doubles import DAY, Clock, Records
from support.vault_tools import OAEP, new_name
from virt_sse.errors import StoreError, VaultError
from virt_sse.lab.tokens import LabHsm
from virt_sse.store.store import Store
from virt_sse.vault.backup import back_up, restore
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.settings import Tier
from virt_sse.vault.identity.tokens import ASSERTION_TYPE, GRANT, OAuthError
from virt_sse.vault.initialise import initialise
from virt_sse.vault.keys.records import NewKey
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.root_export import Recipient, export_root, import_root
from virt_sse.vault.trail import Trail
from virt_sse.vault.upkeep import upkeep
from virt_sse.vault.vault import Vault, open_vault
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key
from virt_sse.vault_client.permissions import Permission, Role

RACES = 5
MOMENT = 5
"""In seconds: 0.25 are promised, and a busy machine may take its time."""
SECRET = Recipient.new_key_pair()
FOUR_DAYS = {
    "lifetimeActions": [{"trigger": {"timeAfterCreate": "P4D"}, "action": {"type": "Rotate"}}],
}


def instance_of(directory: VaultDirectory, path: Path) -> VaultDirectory:
    """A further instance of a vault."""
    export_root(directory, path.with_suffix(".root"), SECRET)
    return import_root(path.with_suffix(".root"), path, SECRET)


def database_of(directory: VaultDirectory) -> str:
    """The name of a vault's database."""
    return (directory.settings().database or "").split("/")[3].split("?")[0]


@pytest.fixture(scope="module")
def folders(postgresql: PostgresqlServer) -> Iterator[tuple[VaultDirectory, VaultDirectory]]:
    with postgresql.database(template="template0") as name, TemporaryDirectory() as folder:
        first = initialise(Path(folder) / "one", database=postgresql.url(name))
        yield first, instance_of(first, Path(folder) / "other")


@pytest.fixture
def records() -> tuple[Records, Records]:
    return Records(), Records()


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def pair(
    folders: tuple[VaultDirectory, VaultDirectory], records: tuple[Records, Records], clock: Clock
) -> Iterator[tuple[Vault, Vault]]:
    with (
        open_vault(folders[0], records[0], clock=clock, shortest_rotation=DAY) as one,
        open_vault(folders[1], records[1], clock=clock, shortest_rotation=DAY) as other,
    ):
        yield one, other


def race(*requests: Callable[[], object]) -> list[object]:
    """Run requests at the same moment; their results, or refusals."""
    start = threading.Barrier(len(requests))

    def run(request: Callable[[], object]) -> object:
        start.wait(20)
        try:
            return request()
        except (Refusal, OAuthError) as refusal:
            return refusal

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(run, requests))


def refusals(outcomes: list[object]) -> list[Refusal]:
    return [each for each in outcomes if isinstance(each, Refusal)]


def seconds_until_refused(vault: Vault, use: Callable[[], object]) -> float:
    """How long an instance goes on with a use of a key."""
    began = time.monotonic()
    while time.monotonic() - began < 20:
        vault.freshness.check()
        try:
            use()
        except Refusal:
            return time.monotonic() - began
    raise AssertionError("the instance goes on")


def test_a_change_at_one_instance_holds_at_the_other_within_a_second(pair: tuple[Vault, Vault]) -> None:
    one, other = pair
    name = new_name()
    version = one.keys.create(name, "RSA", 2048, NewKey()).version

    def wrap() -> object:
        return other.keys.encrypt("wrapKey", name, version, OAEP, b"dek")

    sealed = one.keys.encrypt("wrapKey", name, version, OAEP, b"dek")[1]
    assert other.keys.decrypt("unwrapKey", name, version, OAEP, sealed)[1] == b"dek"
    one.keys.update(name, version, attributes={"enabled": False}, operations=None, tags=None)
    assert seconds_until_refused(other, wrap) < MOMENT
    one.keys.update(name, version, attributes={"enabled": True}, operations=None, tags=None)
    wrap()  # at once: a refusal never rests on a cache
    one.keys.delete(name)
    assert seconds_until_refused(other, wrap) < MOMENT
    one.keys.purge(name)
    with pytest.raises(Refusal, match="was not found"):
        other.keys.get_deleted(name)


def test_tokens_and_permissions_hold_at_both_instances(
    pair: tuple[Vault, Vault], folders: tuple[VaultDirectory, VaultDirectory]
) -> None:
    one, other = pair
    file = CredentialFile.read(folders[0].administrator_path)

    def form() -> dict[str, str]:
        return {
            "grant_type": GRANT,
            "client_id": file.client_id,
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": file.assertion(),
            "scope": f"{file.audience}/.default",
        }

    token = str(one.tokens.issue(form())[1]["access_token"])
    assert other.tokens.principal_of(token).name == "administrator"
    for _ in range(RACES):
        same = form()
        outcomes = race(lambda same=same: one.tokens.issue(same), lambda same=same: other.tokens.issue(same))  # type: ignore[misc]
        assert sum(isinstance(each, OAuthError) for each in outcomes) == 1
    made = one.principals.create(new_name("web"), new_assertion_key()[1])

    def require() -> None:
        principal = other.principals.find(made.client_id)
        if principal is not None and not principal.may(Permission.WRAP_KEY, ""):
            raise Refusal(403, "Forbidden", "no permission")

    one.principals.grant(made, [Permission.WRAP_KEY])
    other.freshness.check(time.monotonic())
    require()
    one.principals.revoke_all(made)
    assert seconds_until_refused(other, require) < MOMENT


def test_a_race_for_a_name_has_one_winner(pair: tuple[Vault, Vault]) -> None:
    one, other = pair
    for _ in range(RACES):
        name = new_name()
        outcomes = race(
            lambda name=name: one.keys.create(name, "RSA", 2048, NewKey()),  # type: ignore[misc]
            lambda name=name: other.keys.create(name.upper(), "RSA", 2048, NewKey()),  # type: ignore[misc]
        )
        # Whoever comes second either finds the key and makes a version of it, or has just missed it.
        assert all(refusal.reason == "KeyAlreadyExists" for refusal in refusals(outcomes))
        assert len(one.keys.versions(name)) == 2 - len(refusals(outcomes))
        outcomes = race(
            *(lambda v=v, name=name: v.principals.create(name, new_assertion_key()[1]) for v in pair)  # type: ignore[misc]
        )
        assert [refusal.reason for refusal in refusals(outcomes)] == ["PrincipalAlreadyExists"]


def test_the_last_administrator_stays_whoever_removes_administrators(pair: tuple[Vault, Vault]) -> None:
    one, other = pair
    for _ in range(RACES):
        second = one.principals.create(new_name("admin"), new_assertion_key()[1], role=Role.ADMINISTRATOR)
        first = one.principals.get("administrator")
        outcomes = race(
            lambda second=second: one.principals.change(second, enabled=False),  # type: ignore[misc]
            lambda first=first: other.principals.change(first, enabled=False),  # type: ignore[misc]
        )
        assert [refusal.reason for refusal in refusals(outcomes)] == ["LastAdministrator"]
        one.principals.change(first, enabled=True)
        one.principals.delete(second)


def test_due_work_is_done_once(
    pair: tuple[Vault, Vault], records: tuple[Records, Records], clock: Clock
) -> None:
    one, other = pair
    rotated, purged = new_name("rotated"), new_name("purged")
    one.keys.create(rotated, "RSA", 2048, NewKey())
    one.rotation.set_policy(rotated, FOUR_DAYS)
    one.keys.create(purged, "RSA", 2048, NewKey())
    one.keys.delete(purged)
    clock.now += 91 * DAY
    race(*(lambda v=v, r=r: upkeep(v, Trail(r)) for v, r in zip(pair, records, strict=True)))  # type: ignore[misc]
    assert len(other.keys.versions(rotated)) == 2
    done = [record for each in records for record in each.all if record.result.value == "allowed"]
    assert sorted(record.action for record in done) == ["purge", "rotate"]
    with pytest.raises(Refusal, match="was not found"):
        other.keys.get_deleted(purged)


def test_a_deleted_key_is_either_recovered_or_purged(pair: tuple[Vault, Vault]) -> None:
    one, other = pair
    for _ in range(RACES):
        name = new_name()
        one.keys.create(name, "RSA", 2048, NewKey())
        one.keys.delete(name)
        outcomes = race(
            lambda name=name: one.keys.recover(name),  # type: ignore[misc]
            lambda name=name: other.keys.purge(name),  # type: ignore[misc]
        )
        assert [refusal.status for refusal in refusals(outcomes)] == [404]
        present = isinstance(outcomes[1], Refusal)
        assert [each.name for each in one.keys.newest(after="", limit=1000) if each.name == name] == (
            [name] if present else []
        )


def test_material_that_an_instance_is_making_is_not_destroyed_by_the_other(
    postgresql: PostgresqlServer, lab_hsm: LabHsm, tmp_path: Path, clock: Clock
) -> None:
    with postgresql.database(template="template0") as name, lab_hsm.token() as token:
        options = {key: str(value) for key, value in token.options.items()}
        url = postgresql.url(name)
        first = initialise(tmp_path / "one", tier=Tier.PREMIUM, hsm=options, database=url)
        second = instance_of(first, tmp_path / "other")
        with (
            open_vault(first, Records(), clock=clock) as one,
            open_vault(second, Records(), clock=clock) as other,
        ):
            assert one.hsm
            generate = one.hsm.generate

            def slowly(bits: int, name: str, version: str) -> object:
                made = generate(bits, name, version)
                other.keys.sweep()
                return made

            def too_slowly(bits: int, name: str, version: str) -> object:
                made = generate(bits, name, version)
                clock.now += 3600
                other.keys.sweep()
                return made

            one.hsm.generate = slowly  # type: ignore[method-assign,assignment]
            made = one.keys.create("kek", "RSA-HSM", 2048, NewKey())
            assert other.keys.encrypt("wrapKey", "kek", made.version, OAEP, b"dek")
            one.hsm.generate = too_slowly  # type: ignore[method-assign,assignment]
            with pytest.raises(Refusal, match="taken too long"):
                one.keys.create("kek", "RSA-HSM", 2048, NewKey())
            assert [each.version for each in other.keys.versions("kek")] == [made.version]
        with closing(token.open()) as opened:
            assert len([key for key in opened.find() if key.label.endswith("/kek")]) == 1


# --- The database


def test_a_lost_database_refuses_requests_until_it_returns(
    postgresql: PostgresqlServer, pair: tuple[Vault, Vault]
) -> None:
    one, _ = pair
    name = new_name()
    one.keys.create(name, "RSA", 2048, NewKey())
    postgresql.stop()
    try:
        with pytest.raises(Refusal, match="cannot read or write its database now") as refused:
            one.freshness.check(time.monotonic())
        assert refused.value.status == 503
        upkeep(one, Trail(Records()))  # goes on, and says so in the log
    finally:
        postgresql.start()
    one.freshness.check()
    assert one.keys.encrypt("wrapKey", name, "", OAEP, b"dek")


def test_an_instance_that_stops_in_a_transaction_delays_changes_and_no_use(
    postgresql: PostgresqlServer, pair: tuple[Vault, Vault]
) -> None:
    one, other = pair
    name = new_name()
    one.keys.create(name, "RSA", 2048, NewKey())
    entered, leave = threading.Event(), threading.Event()

    def stop() -> None:
        with one.principals._changing():
            entered.set()
            leave.wait(20)

    stopped = threading.Thread(target=stop)
    stopped.start()
    try:
        assert entered.wait(20)
        other.freshness.check(time.monotonic())
        assert other.keys.encrypt("wrapKey", name, "", OAEP, b"dek")
        leave.set()
        other.keys.update(name, "", attributes={"enabled": False}, operations=None, tags=None)
    finally:
        leave.set()
        stopped.join(20)


@pytest.mark.parametrize("template", ["template0", "store_template"])
def test_the_database_of_something_else_is_refused(
    postgresql: PostgresqlServer,
    folders: tuple[VaultDirectory, VaultDirectory],
    tmp_path: Path,
    template: str,
) -> None:
    export_root(folders[0], tmp_path / "root", SECRET)
    with postgresql.database(template=template) as name:
        with pytest.raises(VaultError, match=r"not the database of a vault|belongs to another program"):
            import_root(tmp_path / "root", tmp_path / "new", SECRET, database=postgresql.url(name))
        assert not (tmp_path / "new/vault.json").exists()
        assert not (tmp_path / "new/root.key").exists()
    with pytest.raises(StoreError):
        Store(folders[0].settings().database or "")


def test_a_standby_is_refused(
    postgresql: PostgresqlServer, folders: tuple[VaultDirectory, VaultDirectory]
) -> None:
    """There, a disabled key might still be enabled."""
    name = database_of(folders[0])
    postgresql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    try:
        with pytest.raises(VaultError, match="read-only"), open_vault(folders[0], Records()):
            pass
    finally:
        postgresql.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


def test_backups_are_refused_and_name_the_other_way(
    folders: tuple[VaultDirectory, VaultDirectory], tmp_path: Path
) -> None:
    for command, instead in ((back_up, "pg_dump"), (restore, "pg_restore")):
        with pytest.raises(VaultError, match=instead) as refused:
            command(folders[0], tmp_path / "backup")
        assert "export-root" in (refused.value.hint or "")


def test_a_public_key_exchanged_in_the_database_wraps_nothing(
    postgresql: PostgresqlServer, pair: tuple[Vault, Vault], folders: tuple[VaultDirectory, VaultDirectory]
) -> None:
    one, other = new_name(), new_name()
    for name in (one, other):
        pair[0].keys.create(name, "RSA", 2048, NewKey())
    postgresql.execute(
        f"UPDATE versions SET n = (SELECT n FROM versions WHERE name = '{other}') WHERE name = '{one}'",  # noqa: S608
        database_of(folders[0]),
    )
    with pytest.raises(VaultError, match="another key's public key"):
        pair[1].keys.encrypt("wrapKey", one, "", OAEP, b"dek")
