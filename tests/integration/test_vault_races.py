"""Concurrent changes of a served vault: each acknowledged change is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.faults import EVERY_KILL
from support.vault_tools import Answer, Raw, new_name
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.credential_file import new_assertion_key
from virt_sse.vault_client.permissions import Permission

RACES = 200 if EVERY_KILL else 40


@pytest.fixture(scope="module")
def vault() -> Iterator[LabVault]:
    """A vault of these tests' own."""
    with LabVault() as vault:
        yield vault


@pytest.fixture
def pair(vault: LabVault) -> Iterator[tuple[Raw, Raw]]:
    """Two connections of the administrator."""
    token = VaultCredential(vault.administrator_path).token()
    with Raw(vault, token) as one, Raw(vault, token) as other:
        yield one, other


def at_once(first: Callable[[], Answer], second: Callable[[], Answer]) -> None:
    """Run two requests at the same moment; both must be acknowledged."""
    start = threading.Barrier(2)

    def run(request: Callable[[], Answer]) -> int:
        start.wait(10)
        return request().status

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (first, second))) == [200, 200]


def new_key(raw: Raw) -> str:
    path = f"/keys/{new_name()}"
    assert raw("POST", f"{path}/create", {"kty": "RSA"}).status == 200
    return path


@pytest.mark.slow
def test_no_disable_is_lost_in_a_race_with_a_change_of_tags(pair: tuple[Raw, Raw]) -> None:
    one, other = pair
    path, lost = new_key(one), 0
    for number in range(RACES):
        assert one("PATCH", path, {"attributes": {"enabled": True}}).status == 200
        tags = {"n": str(number)}
        at_once(
            lambda: one("PATCH", path, {"attributes": {"enabled": False}}),
            lambda tags=tags: other("PATCH", path, {"tags": tags}),  # type: ignore[misc]
        )
        found = one("GET", path).body
        lost += found["attributes"]["enabled"] or found["tags"] != tags
    assert lost == 0


@pytest.mark.slow
def test_no_disable_of_a_principal_is_lost_in_a_race_with_a_change_of_its_expiry(
    pair: tuple[Raw, Raw],
) -> None:
    one, other = pair
    name, lost = new_name("web"), 0
    path = f"/identity/principals/{name}"
    document = {"name": name, "public_key": new_assertion_key()[1]}
    assert one("POST", "/identity/principals", document).status == 201
    for number in range(RACES):
        assert one("PATCH", path, {"enabled": True, "expires": None}).status == 200
        expires = 2_000_000_000 + number
        at_once(
            lambda: one("PATCH", path, {"enabled": False}),
            lambda expires=expires: other("PATCH", path, {"expires": expires}),  # type: ignore[misc]
        )
        found = one("GET", path).body
        lost += found["enabled"] or found["expires"] != expires
    assert lost == 0


@pytest.mark.slow
def test_no_revocation_is_lost_in_a_race_with_a_grant(vault: LabVault) -> None:
    name, lost = new_name("web"), 0
    with VaultClient(vault.administrator_path) as one, VaultClient(vault.administrator_path) as other:
        one.create_principal(name, new_assertion_key()[1])
        for _ in range(RACES):
            one.set_permissions(name, [Permission.UNWRAP_KEY])
            start = threading.Barrier(2)

            def change(what: Callable[[], object], start: threading.Barrier = start) -> None:
                start.wait(10)
                what()

            with ThreadPoolExecutor(2) as pool:
                list(
                    pool.map(
                        change,
                        (
                            lambda: one.revoke(name, [Permission.UNWRAP_KEY]),
                            lambda: other.grant(name, [Permission.GET]),
                        ),
                    )
                )
            lost += one.permissions(name) != {Permission.GET}
    assert lost == 0


@pytest.mark.slow
def test_no_restriction_of_a_key_is_lost_in_a_race_with_its_rotation(pair: tuple[Raw, Raw]) -> None:
    """Whichever comes first: the newest version is restricted."""
    one, other = pair
    lost = 0
    for _ in range(20):
        path = new_key(one)
        rotation = threading.Thread(target=other, args=("POST", f"{path}/rotate", {}))
        rotation.start()
        assert one("PATCH", path, {"tags": {"owner": "new"}, "key_ops": ["unwrapKey"]}).status == 200
        rotation.join(30)
        found = one("GET", path).body
        lost += found["key"]["key_ops"] != ["unwrapKey"] or found["tags"] != {"owner": "new"}
    assert lost == 0
