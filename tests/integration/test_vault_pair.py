"""Two served instances of one vault in PostgreSQL, as clients and hosts see them."""

from __future__ import annotations

import base64
import http.client
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure.keyvault.keys import KeyClient

from support.customer_keys import RIGHTS, CustomerKeys
from support.postgresql import PostgresqlServer
from support.vault_tools import OAEP, Answer, Raw, new_name, sdk_options
from support.waiting import wait_until
from virt_sse.audit.log import AuditLog
from virt_sse.lab.vaults import LabVault
from virt_sse.model.keys import Dek, DekContext, KeyState
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.permissions import USE

CONTEXT = DekContext(uuid.uuid4(), "service")
DEK = base64.urlsafe_b64encode(bytes(64)).decode().rstrip("=")


@pytest.fixture(scope="module")
def pair(postgresql: PostgresqlServer) -> Iterator[tuple[LabVault, LabVault]]:
    """Two instances, whose administrator may use keys."""
    with (
        postgresql.database(template="template0") as name,
        LabVault(database=postgresql.url(name)) as a,
        LabVault(instance_of=a) as b,
    ):
        with VaultClient(a.administrator_path) as client:
            client.grant("administrator", USE)
        yield a, b


@pytest.fixture(scope="module")
def token(pair: tuple[LabVault, LabVault]) -> str:
    """A token of the first instance."""
    return VaultCredential(pair[0].administrator_path).token()


def wrap(raw: Raw, key: str) -> Answer:
    return raw("POST", f"{key}/wrapkey", {"alg": OAEP, "value": DEK})


def seconds_until(raw: Raw, key: str, status: int) -> float:
    """How long an instance takes to answer wraps with another status."""
    return wait_until(lambda: wrap(raw, key).status == status, f"a wrap is answered {status}")


def test_a_stock_client_disables_a_key_at_both_instances(pair: tuple[LabVault, LabVault], token: str) -> None:
    a, b = pair
    credential = VaultCredential(a.administrator_path)
    with KeyClient(a.url, credential, **sdk_options(credential)) as client, Raw(b, token) as at_b:
        name = new_name()
        made = client.create_rsa_key(name, size=2048)
        key = f"/keys/{name}/{made.properties.version}"
        assert wrap(at_b, key).status == 200
        seconds = []
        for _ in range(5):
            client.update_key_properties(name, enabled=False)
            seconds.append(seconds_until(at_b, key, 403))
            client.update_key_properties(name, enabled=True)
            seconds_until(at_b, key, 200)
    print("refused by the other instance after", seconds)  # noqa: T201 -- a measurement, for pytest -rP
    assert min(seconds) < 1  # the others may have waited for a busy machine
    logs = [AuditLog(vault.directory / "audit.jsonl") for vault in pair]
    assert all(log.verify().broken is None for log in logs)
    wraps = [sum(entry.record.key.endswith(name) for entry in log.records()) for log in logs]
    assert all(wraps)


def test_what_one_instance_has_permitted_the_other_does_not_refuse(
    pair: tuple[LabVault, LabVault], token: str, tmp_path: Path
) -> None:
    """Not for a moment: a refusal ends guests."""
    a, b = pair
    with Raw(a, token) as at_a, Raw(b, token) as warm, VaultClient(a.administrator_path) as client:
        made = at_a("POST", f"/keys/{new_name()}/create", {"kty": "RSA"}).body
        key = str(made["key"]["kid"]).removeprefix(a.url)
        for number in range(3):
            assert wrap(warm, key).status == 200  # the caches of the other instance are filled
            assert at_a("PATCH", key, {"attributes": {"enabled": False}}).status == 200
            seconds_until(warm, key, 403)
            assert at_a("PATCH", key, {"attributes": {"enabled": True}}).status == 200
            assert wrap(warm, key).status == 200
            file = client.new_credential_file(tmp_path / f"{number}.json", new_name("host"))
            new_token = VaultCredential(tmp_path / f"{number}.json").token()
            with Raw(b, new_token) as at_b:
                assert wrap(at_b, key).code == "ForbiddenByPolicy"
                client.grant(file.client_id, USE)
                assert wrap(at_b, key).status == 200


class Promises:
    """Changes at an instance, each in turn, and what the instance said it had stored.

    :ivar tags: the last tag of each key, by the key's path.
    """

    def __init__(self, vault: LabVault, token: str) -> None:
        self.tags: dict[str, int] = {}
        self.enough = threading.Event()
        self._vault, self._token = vault, token
        self._threads = [threading.Thread(target=self._change) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def _change(self) -> None:
        try:
            with Raw(self._vault, self._token) as raw:
                path = f"/keys/{new_name()}"
                for number in range(1000):
                    if number % 3 == 0:
                        done = raw("POST", f"{path}/create", {"kty": "RSA", "tags": {"n": str(number)}})
                    elif number % 3 == 1:
                        done = raw("POST", f"{path}/rotate", {})
                        number -= 1  # a rotation keeps the tags
                    else:
                        done = raw("PATCH", path, {"tags": {"n": str(number)}})
                    if done.status == 200:
                        self.tags[path] = number
                    if number == 6:
                        self.enough.set()
        except (OSError, http.client.HTTPException, ValueError):
            return  # the instance was killed in the midst of an answer

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)


def test_a_killed_instance_has_kept_its_promises_and_the_other_goes_on(
    pair: tuple[LabVault, LabVault], token: str
) -> None:
    a, b = pair
    promises = Promises(a, token)
    assert promises.enough.wait(30)
    a.kill()
    promises.join()
    try:
        with Raw(b, token) as raw:
            began = time.monotonic()
            assert raw("POST", f"/keys/{new_name()}/create", {"kty": "RSA"}).status == 200  # no lock is left
            assert time.monotonic() - began < 8
            for path, tag in promises.tags.items():
                # The change after the last one promised may have been stored, too.
                assert int(raw("GET", path).body["tags"]["n"]) - tag in (0, 1, 2)
    finally:
        a.start()
    with Raw(a, token) as raw:
        assert raw("GET", next(iter(promises.tags))).status == 200
    assert AuditLog(a.directory / "audit.jsonl").verify().broken is None


def test_a_host_uses_the_instance_that_answers_and_a_lost_database_is_no_revocation(
    pair: tuple[LabVault, LabVault], postgresql: PostgresqlServer, tmp_path: Path
) -> None:
    a, b = pair
    with CustomerKeys(a, tmp_path / "identities") as keys:
        addresses = {a.url: [a.url, b.url]}
        provider = keys.open_provider(keys.new_identity(*RIGHTS), addresses=addresses)
        key = provider.current_key(keys.new_key())
        dek = Dek.generate()
        wrapped = provider.wrap(dek, key, context=CONTEXT)
        a.kill()
        try:
            assert provider.unwrap(wrapped, context=CONTEXT) == dek
            assert provider.key_state(key) is KeyState.ENABLED
        finally:
            a.start()
        postgresql.stop()
        try:
            wait_until(
                lambda: provider.key_state(key) is KeyState.UNREACHABLE, "the loss of the database is noticed"
            )
        finally:
            postgresql.start()
        assert provider.unwrap(wrapped, context=CONTEXT) == dek
        keys.enable(key, enabled=False)
        wait_until(lambda: provider.key_state(key) is KeyState.DISABLED, "the key is disabled")
    assert "Traceback" not in a.log_path.read_text() + b.log_path.read_text()
