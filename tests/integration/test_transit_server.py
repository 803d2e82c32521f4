"""The transit provider at a real OpenBao server: what becomes of a key, a policy, a login and the server."""

from __future__ import annotations

import json
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.transit_keys import ROTATION, RULES, TransitKeys
from support.waiting import wait_until
from virt_sse.errors import (
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyProviderError,
    KeyProviderUnavailableError,
    UnwrapError,
)
from virt_sse.lab.openbao import LabOpenBao
from virt_sse.model.events import correlated
from virt_sse.model.keys import Dek, DekContext, KeyState
from virt_sse.system.files import write_private

CONTEXT = DekContext(uuid.uuid4(), "service")


@pytest.fixture
def keys(lab_openbao: LabOpenBao, tmp_path: Path) -> Iterator[TransitKeys]:
    with TransitKeys(lab_openbao, tmp_path / "host") as keys:
        yield keys


class Disk:
    """A DEK wrapped with the newest version of a key, by a host that may do no more than is needed."""

    def __init__(self, keys: TransitKeys, key: str | None = None, **options: object) -> None:
        self.name = key or keys.new_key()
        self.provider = keys.open_provider(**options)
        self.key = self.provider.current_key(self.name)
        self.dek = Dek.generate()
        self.wrapped = self.provider.wrap(self.dek, self.key, context=CONTEXT)
        self._keys = keys

    @property
    def state(self) -> KeyState:
        return self.provider.key_state(self.key)

    def opens(self) -> bool:
        return self.provider.unwrap(self.wrapped, context=CONTEXT) == self.dek

    def assert_refused(self, state: KeyState, error: type[KeyProviderError], message: str) -> None:
        """At once, in every way, and again."""
        began = time.monotonic()
        for _ in range(2):
            assert self.state is state
            for use in (self.opens, lambda: self.provider.wrap(self.dek, self.key, context=CONTEXT)):
                with pytest.raises(error, match=message) as caught:
                    use()
                assert type(caught.value) is error
                text = "".join(traceback.format_exception(caught.value)) + repr(caught.value.hint)
                assert self._keys.secret_id not in text
        assert time.monotonic() - began < 3

    def assert_usable(self) -> None:
        assert self.state is KeyState.ENABLED
        assert self.opens()


@pytest.fixture
def disk(keys: TransitKeys) -> Disk:
    return Disk(keys)


# --- What the key's administrator does


def test_a_version_below_the_minimum_is_disabled_until_the_minimum_is_lowered(
    keys: TransitKeys, disk: Disk
) -> None:
    keys.disable_before(disk.name, 2)
    disk.assert_refused(KeyState.DISABLED, KeyDisabledError, "min_decryption_version is 2")
    assert disk.provider.current_key(disk.name).version == "2"
    keys.configure(disk.name, min_decryption_version=1)
    disk.assert_usable()


def test_a_version_that_no_longer_encrypts_still_unwraps(keys: TransitKeys, disk: Disk) -> None:
    keys.rotate(disk.name)
    keys.configure(disk.name, min_encryption_version=2)
    disk.assert_usable()
    with pytest.raises(KeyDisabledError, match="min_encryption_version is 2"):
        disk.provider.wrap(disk.dek, disk.key, context=CONTEXT)


def test_a_trimmed_version_is_gone_for_good(keys: TransitKeys, disk: Disk) -> None:
    keys.rotate(disk.name)
    keys.configure(disk.name, min_decryption_version=2, min_encryption_version=2)
    keys.server.request("POST", f"{disk.name}/trim", {"min_available_version": 2})
    disk.assert_refused(KeyState.DELETED, KeyNotFoundError, "has no version 1")


def test_a_soft_deleted_key_is_refused_until_restored(keys: TransitKeys, disk: Disk) -> None:
    keys.configure(disk.name, deletion_allowed=True)
    keys.server.request("DELETE", f"{disk.name}/soft-delete")
    disk.assert_refused(KeyState.DELETED, KeyNotFoundError, "is deleted")
    keys.server.request("POST", f"{disk.name}/soft-delete-restore", {})
    disk.assert_usable()


def test_a_deleted_key_is_not_made_anew(keys: TransitKeys, disk: Disk) -> None:
    """OpenBao's 'encrypt' makes an absent key if the policy has the capability 'create'."""
    keys.allow('path "transit/*" { capabilities = ["create", "read", "update"] }')
    keys.delete(disk.name)
    disk.assert_refused(KeyState.DELETED, KeyNotFoundError, r"refused the reading of the key \(404\)")
    with pytest.raises(KeyNotFoundError):
        disk.provider.rotate(disk.name)


def test_a_removed_secrets_engine_is_the_end_of_its_keys(keys: TransitKeys) -> None:
    mount = f"transit-{uuid.uuid4().hex[:8]}"
    keys.server.request("POST", f"sys/mounts/{mount}", {"type": "transit"})
    keys.allow(f'path "{mount}/*" {{ capabilities = ["read", "update"] }}')
    keys.server.request("POST", f"{mount}/keys/web", {})
    provider = keys.open_provider()
    key = provider.current_key(f"{mount}/keys/web")
    keys.server.request("DELETE", f"sys/mounts/{mount}")
    assert provider.key_state(key) is KeyState.DELETED
    with pytest.raises(KeyNotFoundError, match="404 no handler for route"):
        provider.wrap(Dek.generate(), key, context=CONTEXT)


def test_a_host_without_a_policy_is_denied_until_granted_again(keys: TransitKeys, disk: Disk) -> None:
    keys.allow("")
    disk.assert_refused(KeyState.DENIED, KeyDeniedError, r"refused the .* \(403 permission denied\)")
    keys.grant()
    disk.assert_usable()


def test_a_host_that_may_only_read_cannot_unwrap(keys: TransitKeys, disk: Disk) -> None:
    keys.allow(f'path "{disk.name}" {{ capabilities = ["read"] }}')
    assert disk.state is KeyState.ENABLED
    with pytest.raises(KeyDeniedError, match="refused the unwrap"):
        disk.opens()


def test_rotation_is_the_administrators_unless_granted(keys: TransitKeys, disk: Disk) -> None:
    with pytest.raises(KeyDeniedError, match=r"refused the rotation \(403 permission denied\)") as caught:
        disk.provider.rotate(disk.name)
    assert "task of the key's administrator" in str(caught.value.hint)
    name = keys.new_key(rules=RULES + ROTATION)
    assert disk.provider.rotate(name).version == "2"


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("kind", ["aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"])
def test_keys_of_every_type_bind_the_dek_in_the_server_too(
    keys: TransitKeys, kind: str, *, derived: bool
) -> None:
    """Even software that ignores the digest in the payload cannot unwrap for another disk."""
    disk = Disk(keys, keys.new_key(kind, derived=derived))
    assert disk.opens()
    elsewhere = DekContext(uuid.uuid4(), "service")
    with pytest.raises(UnwrapError, match=r"refused the unwrap \(400 authentication failed\)"):
        disk.provider.unwrap(disk.wrapped, context=elsewhere)


# --- What becomes of the login


@pytest.mark.parametrize("loss", [TransitKeys.destroy_secret_id, TransitKeys.delete_role])
def test_a_login_taken_away_is_denied_until_given_back(
    keys: TransitKeys, disk: Disk, loss: Callable[[TransitKeys], None]
) -> None:
    loss(keys)
    disk.assert_usable()  # the token is good until revoked
    keys.revoke_tokens()
    refused = r"refused the login by auth/approle \(400 invalid role or secret id\)"
    before = len(logins(keys))
    disk.assert_refused(KeyState.DENIED, KeyDeniedError, refused)
    assert len(logins(keys)) == before + 1  # more would lock the role out
    keys.make_role()
    if loss is TransitKeys.delete_role:
        disk.provider = keys.open_provider()  # with the new role_id
    disk.assert_usable()


def test_a_revoked_token_alone_is_replaced(keys: TransitKeys, disk: Disk) -> None:
    keys.revoke_tokens()
    disk.assert_usable()


def test_a_token_is_renewed_and_replaced_at_the_end_of_its_life(keys: TransitKeys) -> None:
    keys.make_role(token_ttl="1s", token_max_ttl="2s")  # noqa: S106 -- lifetimes
    disk = Disk(keys)
    before = len(logins(keys))
    end = time.monotonic() + 2.7
    while time.monotonic() < end:
        assert disk.opens()
        time.sleep(0.05)
    assert "auth/token/renew-self" in paths(keys)
    assert 1 <= len(logins(keys)) - before <= 2


def test_a_closed_provider_leaves_no_token(keys: TransitKeys, disk: Disk) -> None:
    disk.provider.close()
    assert paths(keys)[-1] == "auth/token/revoke-self"
    disk.assert_usable()  # with a new token


def test_a_host_logs_in_with_a_certificate(keys: TransitKeys) -> None:
    certificate, key = keys.server.client_certificate(keys.role)
    keys.server.request(
        "POST",
        f"auth/cert/certs/{keys.role}",
        {"certificate": keys.server.ca_path.read_text(), "allowed_common_names": [keys.role]}
        | {"token_policies": [keys.policy]},
    )
    name = keys.new_key()
    table = {
        each: value for each, value in keys.options().items() if each not in ("role-id", "secret-id-file")
    }
    options = {"login": "cert", "role": keys.role, "certificate": str(certificate), "private-key": str(key)}
    proper = [(path, path.read_bytes()) for path in (certificate, key)]
    for path, foreign in zip((certificate, key), keys.server.client_certificate("stranger"), strict=True):
        path.write_bytes(foreign.read_bytes())
    provider = keys.open_from({**table, **options})
    with pytest.raises(KeyDeniedError, match=r"refused the login by auth/cert \(400\)"):
        provider.current_key(name)
    for path, content in proper:  # a replaced certificate is taken up without a restart
        write_private(path, content)
    dek = Dek.generate()
    wrapped = provider.wrap(dek, provider.current_key(name), context=CONTEXT)
    assert provider.unwrap(wrapped, context=CONTEXT) == dek

    keys.server.request("DELETE", f"auth/cert/certs/{keys.role}")
    provider.close()
    assert provider.key_state(wrapped.key) is KeyState.DENIED
    key.chmod(0o640)
    with pytest.raises(KeyProviderUnavailableError, match="is open to others"):
        keys.open_from({**table, **options}).current_key(name)


def test_a_host_uses_keys_of_a_namespace(keys: TransitKeys) -> None:
    team = f"team-{uuid.uuid4().hex[:8]}"
    request = keys.server.request
    request("POST", f"sys/namespaces/{team}", {})
    request("POST", f"{team}/sys/mounts/transit", {"type": "transit"})
    request("POST", f"{team}/sys/auth/approle", {"type": "approle"})
    request("POST", f"{team}/sys/policies/acl/host", {"policy": RULES.format(name="web")})
    request("POST", f"{team}/auth/approle/role/host", {"token_policies": ["host"]})
    request("POST", f"{team}/transit/keys/web", {})
    role_id = request("GET", f"{team}/auth/approle/role/host/role-id")["data"]["role_id"]  # type: ignore[index]
    secret_id = request("POST", f"{team}/auth/approle/role/host/secret-id", {})["data"]["secret_id"]  # type: ignore[index]
    keys.secret_id_file.write_text(str(secret_id))
    provider = keys.open_provider(**{"namespace": team, "role-id": role_id})
    key = provider.current_key("transit/keys/web")
    assert provider.key_state(key) is KeyState.ENABLED
    request("DELETE", f"sys/namespaces/{team}")
    gone = (KeyState.DENIED, KeyState.DELETED)  # unreachable while the server is about it
    wait_until(lambda: provider.key_state(key) in gone, "the key is gone with its namespace")


# --- The server


def test_the_server_records_who_used_which_key_for_which_disk(keys: TransitKeys, disk: Disk) -> None:
    for header in ("X-Correlation-Id", "X-Virt-Sse-Disk"):
        keys.server.request("POST", f"sys/config/auditing/request-headers/{header}", {"hmac": False})
    with correlated() as correlation:
        assert disk.opens()
    (record,) = [
        each
        for each in records(keys)
        if each["type"] == "response" and [str(correlation)] in each["request"].get("headers", {}).values()
    ]
    assert record["request"]["path"] == disk.name.replace("keys", "decrypt")
    assert [str(CONTEXT.disk_id)] in record["request"]["headers"].values()
    assert record["auth"]["metadata"]["role_name"] == keys.role


def test_another_address_answers_for_a_dead_one_and_a_refusal_holds(keys: TransitKeys) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"https://127.0.0.1:{unused.getsockname()[1]}"
        disk = Disk(keys, urls=[dead, *keys.server.urls])
        disk.assert_usable()
        keys.disable_before(disk.name, 2)
        disk.assert_refused(KeyState.DISABLED, KeyDisabledError, "min_decryption_version")


@pytest.mark.slow
def test_a_sealed_or_stopped_server_is_unreachable_and_no_verdict(tmp_path: Path) -> None:
    with LabOpenBao() as server, TransitKeys(server, tmp_path / "host") as keys:
        disk = Disk(keys)
        server.seal()
        disk.assert_refused(
            KeyState.UNREACHABLE, KeyProviderUnavailableError, r"cannot answer now \(503 sealed\)"
        )
        server.unseal()
        disk.assert_usable()
        server.stop()
        disk.assert_refused(KeyState.UNREACHABLE, KeyProviderUnavailableError, "Connection refused")
        server.start()
        disk.assert_usable()


def records(keys: TransitKeys) -> list[dict[str, dict[str, object]]]:
    """The server's audit log."""
    return [json.loads(line) for line in keys.server.audit_path.read_text("utf-8").splitlines()]


def paths(keys: TransitKeys) -> list[str]:
    """The paths of all requests, in order."""
    return [str(each["request"]["path"]) for each in records(keys) if str(each["type"]) == "request"]


def logins(keys: TransitKeys) -> list[str]:
    return [path for path in paths(keys) if path == "auth/approle/login"]
