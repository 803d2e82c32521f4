"""A vault that is killed, starved of disk, or asked for more than it takes."""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from support.vault_tools import OAEP, Raw, new_name
from support.waiting import is_gone, wait_until
from virt_sse.audit.log import AuditLog
from virt_sse.errors import KeyProviderUnavailableError, LabError, VaultError
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.permissions import USE

DEK = base64.urlsafe_b64encode(bytes(64)).decode().rstrip("=")


@contextmanager
def served(*arguments: str) -> Iterator[LabVault]:
    """A vault of the test's own, whose administrator may use keys."""
    with LabVault(arguments=arguments) as vault:
        with VaultClient(vault.administrator_path) as client:
            client.grant("administrator", USE)
        yield vault


def token_of(vault: LabVault) -> str:
    return VaultCredential(vault.administrator_path).token()


def new_key(raw: Raw, vault: LabVault) -> str:
    answer = raw("POST", f"/keys/{new_name()}/create", {"kty": "RSA"})
    assert answer.status == 200
    return str(answer.body["key"]["kid"]).removeprefix(vault.url)


@pytest.mark.slow
def test_killed_under_load_a_vault_has_kept_what_it_promised() -> None:
    with served() as vault:
        token = token_of(vault)
        with Raw(vault, token) as raw:
            key = new_key(raw, vault)
            wrapped = raw("POST", f"{key}/wrapkey", {"alg": OAEP, "value": DEK}).body["value"]
        for _ in range(2):
            promised = promises_until_killed(vault, token)
            assert promised
            database = vault.directory / "vault.sqlite"
            with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            vault.start()
            with Raw(vault, token) as raw:
                for path, tag in promised.items():
                    # The last change may have been stored, too, though its answer was lost.
                    assert int(raw("GET", path).body["tags"]["n"]) - tag in (0, 1)
                answer = raw("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": wrapped})
                assert answer.body["value"] == DEK
        vault.stop()
        log = AuditLog(vault.directory / "audit.jsonl")
        assert log.verify().broken is None


def promises_until_killed(vault: LabVault, token: str) -> dict[str, int]:
    """What the vault said it had stored, by the keys' paths, when it was killed while it stored more."""
    promised: dict[str, int] = {}
    enough = threading.Event()

    def change() -> None:
        with Raw(vault, token) as raw:
            try:
                path = new_key(raw, vault)
                for number in range(1000):
                    if raw("PATCH", path, {"tags": {"n": str(number)}}).status == 200:
                        promised[path] = number
                    if number == 5:
                        enough.set()
            except (OSError, http.client.HTTPException, ValueError):
                return  # it was killed in the midst of an answer

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(30)
    time.sleep(0.05)
    vault.kill()
    for thread in threads:
        thread.join(30)
    return promised


@pytest.mark.slow
def test_a_full_disk_refuses_and_loses_nothing() -> None:
    with served() as vault:
        token = token_of(vault)
        with Raw(vault, token) as raw:
            key = new_key(raw, vault)
            wrapped = raw("POST", f"{key}/wrapkey", {"alg": OAEP, "value": DEK}).body["value"]
            before = resource.prlimit(vault.pid, resource.RLIMIT_FSIZE)
            full = (vault.directory / "audit.jsonl").stat().st_size
            resource.prlimit(vault.pid, resource.RLIMIT_FSIZE, (full, before[1]))
            # Not even an unwrap, which stores nothing: it could not be recorded.
            for method, path, body in (
                ("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": wrapped}),
                ("POST", f"/keys/{new_name()}/create", {"kty": "RSA"}),
                ("PATCH", key, {"attributes": {"enabled": False}}),
                ("DELETE", key.rsplit("/", 1)[0], None),
            ):
                answer = raw(method, path, body)
                assert (answer.status, answer.code) == (503, "ServiceUnavailable")
                assert "retry-after" in answer.headers
            assert raw("GET", key).body["attributes"]["enabled"] is True
            resource.prlimit(vault.pid, resource.RLIMIT_FSIZE, before)
            assert raw("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": wrapped}).body["value"] == DEK
        assert "Traceback" not in vault.log_path.read_text()


@pytest.mark.slow
def test_beyond_its_rate_a_vault_answers_429_at_once() -> None:
    with served("--rate", "10") as vault:
        token = token_of(vault)
        time.sleep(0.5)
        statuses, slowest, started = [], 0.0, time.monotonic()
        with Raw(vault, token) as raw:
            for _ in range(100):
                asked = time.monotonic()
                answer = raw("GET", "/keys")
                slowest = max(slowest, time.monotonic() - asked)
                statuses.append(answer.status)
                if answer.status == 429:
                    assert answer.headers["retry-after"] == "1"
                    assert answer.code == "Throttled"
        assert set(statuses) == {200, 429}
        assert 5 <= statuses.count(200) <= 11 + 10 * (time.monotonic() - started)
        assert slowest < 1
        with (
            VaultClient(vault.administrator_path) as client,
            pytest.raises(KeyProviderUnavailableError, match="429"),
        ):
            [client.status() for _ in range(100)]
        time.sleep(0.5)
        with Raw(vault, token) as raw:
            assert raw("GET", "/keys").status == 200
            assert [raw("GET", "/healthz").status for _ in range(20)] == [200] * 20


@pytest.mark.slow
def test_beyond_its_concurrency_a_vault_answers_429_and_goes_on() -> None:
    with served("--concurrency", "4") as vault:
        token = token_of(vault)
        with Raw(vault, token) as raw:
            key = new_key(raw, vault)
            wrapped = raw("POST", f"{key}/wrapkey", {"alg": OAEP, "value": DEK}).body["value"]

        def client(_number: int) -> list[int]:
            with Raw(vault, token) as raw:
                body = {"alg": OAEP, "value": wrapped}
                return [raw("POST", f"{key}/unwrapkey", body).status for _ in range(10)]

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            statuses = [status for found in pool.map(client, range(40)) for status in found]
        assert set(statuses) == {200, 429}
        assert client(0) == [200] * 10


@pytest.mark.slow
def test_eight_clients_at_once_get_all_their_unwraps() -> None:
    with served() as vault:
        token = token_of(vault)
        with Raw(vault, token) as raw:
            key = new_key(raw, vault)
            wrapped = raw("POST", f"{key}/wrapkey", {"alg": OAEP, "value": DEK}).body["value"]

        def client(_number: int) -> int:
            with Raw(vault, token) as raw:
                body = {"alg": OAEP, "value": wrapped}
                return sum(raw("POST", f"{key}/unwrapkey", body).status == 200 for _ in range(75))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(client, range(8))) == 600


@pytest.mark.slow
def test_keys_are_rotated_by_their_policy() -> None:
    with served("--shortest-rotation", "1", "--upkeep-seconds", "0.1") as vault:
        with Raw(vault, token_of(vault)) as raw:
            key = new_key(raw, vault).rsplit("/", 1)[0]
            policy = {
                "lifetimeActions": [{"trigger": {"timeAfterCreate": "PT1S"}, "action": {"type": "Rotate"}}]
            }
            assert raw("PUT", f"{key}/rotationpolicy", policy).status == 200
            wait_until(
                lambda: len(raw("GET", f"{key}/versions").body["value"]) >= 3, "the key is rotated twice"
            )
        log = AuditLog(vault.directory / "audit.jsonl")
        rotations = [entry.record for entry in log.records() if entry.record.action == "rotate"]
        assert {record.actor for record in rotations} == {"vault"}


@pytest.mark.slow
def test_a_stop_is_clean_and_quick_with_clients_connected() -> None:
    with served() as vault:
        pid, token = vault.pid, token_of(vault)
        with Raw(vault, token) as raw:
            raw("GET", "/keys")
            started = time.monotonic()
            vault.stop()
            assert time.monotonic() - started < 3
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert vault.log_path.read_text() == ""
        vault.start()
        with Raw(vault, token) as raw:
            assert raw("GET", "/keys").status == 200


def test_a_vault_ends_with_its_owner() -> None:
    program = (
        "import time; from virt_sse.lab.vaults import LabVault\n"
        "vault = LabVault(); vault.__enter__()\n"
        "print(vault.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        pid = int(owner.stdout.readline())
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
        wait_until(lambda: is_gone(pid), "the vault has ended with its owner", seconds=10)


@pytest.mark.slow
def test_a_lab_vault_that_cannot_start_says_why() -> None:
    with served() as vault:
        with pytest.raises(LabError, match="already running"):
            vault.start()
        vault.stop()
        (vault.directory / "root.key").chmod(0o644)
        with pytest.raises(LabError) as refused:
            vault.start()
        assert "is open to others" in refused.value.__notes__[0]
    with pytest.raises(LabError):
        _ = vault.directory


def test_a_dead_vault_gives_no_verdict_about_keys() -> None:
    with served() as vault:
        credential = VaultCredential(vault.administrator_path, timeout=2)
        vault.kill()
        with pytest.raises(KeyProviderUnavailableError, match="does not answer"):
            credential.token()
        with VaultClient(credential.file, timeout=2) as client, pytest.raises(KeyProviderUnavailableError):
            client.status()


def test_a_certificate_of_another_authority_is_not_trusted(lab_vault: LabVault) -> None:
    with served() as other:
        file = VaultCredential(lab_vault.administrator_path).file
        fields = {name: getattr(file, name) for name in type(file).__struct_fields__}
        stranger = type(file)(**fields | {"ca_certificate": other.ca_path.read_text()})
    with pytest.raises(KeyProviderUnavailableError, match="not trusted"):
        VaultCredential(stranger).token()
    broken = type(file)(**fields | {"ca_certificate": "no certificate"})
    with pytest.raises(VaultError, match="CA certificate"):
        VaultCredential(broken).token()
