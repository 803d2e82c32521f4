"""Transit keys in a lab's OpenBao server as their administrator handles them, and a host's login."""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from virt_sse.lab.openbao import LabOpenBao
from virt_sse.model.keys import ProviderConfig
from virt_sse_plugins.key_providers.vault_transit import VaultTransitKeyProvider

RULES = """\
path "transit/keys/{name}" {{ capabilities = ["read"] }}
path "transit/encrypt/{name}" {{ capabilities = ["update"] }}
path "transit/decrypt/{name}" {{ capabilities = ["update"] }}
"""
"""The least policy for the use of a key."""

ROTATION = """\
path "transit/keys/{name}/rotate" {{ capabilities = ["update"] }}
"""


class TransitKeys:
    """The administrator of *server*, and a host with an AppRole of its own.

    :ivar policy: name of the role's policy.
    :param folder: for the file with the secret_id; made when needed.
    """

    def __init__(self, server: LabOpenBao, folder: Path) -> None:
        self.server = server
        self.role = self.policy = f"host-{uuid.uuid4().hex[:8]}"
        self._rules: list[str] = []
        self._numbers = itertools.count(1)
        self._providers: list[VaultTransitKeyProvider] = []
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.secret_id_file = folder / f"secret-id-{self.role}"
        self.allow("")
        self.make_role()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for provider in self._providers:
            provider.close()

    def make_role(self, **settings: object) -> None:
        """Make or change the role, and give the host a new secret_id."""
        role = f"auth/approle/role/{self.role}"
        self.server.request("POST", role, {"token_policies": [self.policy], "token_ttl": "1h", **settings})
        self.role_id = str(self._data("GET", f"{role}/role-id")["role_id"])
        self.new_secret_id()

    def new_secret_id(self) -> None:
        """Give the host a new secret_id."""
        made = self._data("POST", f"auth/approle/role/{self.role}/secret-id", {})
        self.secret_id, self.secret_id_accessor = str(made["secret_id"]), str(made["secret_id_accessor"])
        self.secret_id_file.write_text(self.secret_id + "\n")
        self.secret_id_file.chmod(0o600)

    def destroy_secret_id(self) -> None:
        self.server.request(
            "POST",
            f"auth/approle/role/{self.role}/secret-id-accessor/destroy",
            {"secret_id_accessor": self.secret_id_accessor},
        )

    def delete_role(self) -> None:
        """Delete the role; its tokens stay valid until revoked."""
        self.server.request("DELETE", f"auth/approle/role/{self.role}")

    def revoke_tokens(self) -> None:
        """Revoke all tokens of the auth method."""
        self.server.request("POST", "sys/leases/revoke-prefix/auth/approle", {})

    def allow(self, rules: str) -> None:
        """Set the whole policy of the host."""
        self.server.request("POST", f"sys/policies/acl/{self.policy}", {"policy": rules or "# none"})

    def grant(self) -> None:
        """Let the host use all keys made here."""
        self.allow("".join(self._rules))

    def new_key(self, kind: str = "aes256-gcm96", *, rules: str = RULES, **settings: object) -> str:
        """Make a key that the host may use; its path."""
        name = f"{self.role}-{next(self._numbers)}"
        self.server.request("POST", f"transit/keys/{name}", {"type": kind, **settings})
        self._rules.append(rules.format(name=name))
        self.grant()
        return f"transit/keys/{name}"

    def rotate(self, path: str) -> None:
        self.server.request("POST", f"{path}/rotate", {})

    def configure(self, path: str, **settings: object) -> None:
        """Change a key's settings, e.g. ``min_decryption_version``."""
        self.server.request("POST", f"{path}/config", settings)

    def disable_before(self, path: str, version: int) -> None:
        """Disable all versions before *version*, which is made if it does not exist."""
        while int(str(self._data("GET", path)["latest_version"])) < version:
            self.rotate(path)
        self.configure(path, min_decryption_version=version)

    def delete(self, path: str) -> None:
        self.configure(path, deletion_allowed=True)
        self.server.request("DELETE", path)

    def options(self, **options: object) -> dict[str, object]:
        """The provider's table of the host's configuration."""
        return {
            "urls": self.server.urls[:1],
            "ca": str(self.server.ca_path),
            "role-id": self.role_id,
            "secret-id-file": str(self.secret_id_file),
            **options,
        }

    def open_provider(self, **options: object) -> VaultTransitKeyProvider:
        """The provider under test, with these options beside those needed; closed when this is."""
        return self.open_from(self.options(**options))

    def open_from(self, options: dict[str, object]) -> VaultTransitKeyProvider:
        """The provider under test, with these options alone; closed when this is."""
        config = ProviderConfig(self.secret_id_file.parent, options)
        self._providers.append(VaultTransitKeyProvider.from_config(config))
        return self._providers[-1]

    def _data(self, method: str, path: str, document: dict[str, object] | None = None) -> dict[str, object]:
        data = self.server.request(method, path, document)["data"]
        assert isinstance(data, dict)
        return data
