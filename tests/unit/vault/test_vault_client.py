"""The client's view of a vault's answers: decoded, or refused with the field's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from virt_sse.errors import VaultError
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.permissions import Permission, Role

PRINCIPAL: dict[str, object] = {
    "client_id": "c",
    "object_id": "o",
    "tenant": "t",
    "name": "web",
    "role": "none",
    "enabled": True,
    "expires": None,
    "created": 1,
    "created_by": None,
}


@pytest.fixture
def answering(
    directory: VaultDirectory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Mapping[str, object]], VaultClient]:
    """A client whose requests get this answer."""

    def client(answer: Mapping[str, object]) -> VaultClient:
        monkeypatch.setattr(VaultClient, "_ask", lambda *_: answer)
        return VaultClient(directory.administrator_path)

    return client


def test_answers_of_newer_vaults_are_understood(
    answering: Callable[[Mapping[str, object]], VaultClient],
) -> None:
    (found,) = answering({"value": [PRINCIPAL | {"new": 1}], "next": None}).principals()
    assert (found.name, found.role, found.expires) == ("web", Role.NONE, None)
    policy = {"client_id": "c", "name": "web", "permissions": ["wrapKey"]}
    (found_policy,) = answering({"value": [policy]}).access()
    assert (found_policy.name, found_policy.permissions) == ("web", {Permission.WRAP_KEY})
    assert answering(policy).permissions("web") == {Permission.WRAP_KEY}


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({}, "`value`"),
        ({"value": {}}, "`$.value`"),
        ({"value": [PRINCIPAL | {"created": "1"}]}, "`$.value[0].created`"),
        ({"value": [PRINCIPAL | {"role": "king"}]}, "`$.value[0].role`"),
        ({"value": [{"name": "web"}]}, "`client_id`"),
    ],
)
def test_other_answers_are_refused_by_field(
    answering: Callable[[Mapping[str, object]], VaultClient], answer: Mapping[str, object], field: str
) -> None:
    with pytest.raises(VaultError, match="unexpected answer of the key vault") as caught:
        answering(answer).principals()
    assert field in str(caught.value)
