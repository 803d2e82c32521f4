"""Where things lie, and what the site has chosen.

``VIRT_SSE_ROOT`` moves all that would lie in /etc, /var/lib, /var/log and /run under another root.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from virt_sse.errors import ConfigError
from virt_sse.keys import ProviderConfig

_TABLES = {
    "store": {"url"},
    "libvirt": {"uri"},
    "disks": {"directory"},
    "plugins": {"required"},
}


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one host.

    :ivar root: the folder that stands for ``/``.
    :ivar store_url: an SQLAlchemy URL; may hold a password, therefore not in the repr.
    :ivar libvirt_uri: where libvirt answers.
    :ivar disk_directory: where new images go unless a path or a pool is given.
    :ivar required_plugins: entry points without which nothing may run, e.g. a site's policy.
    :ivar provider_options: by provider name, its table ``[key-providers.NAME]``.
    """

    root: Path
    store_url: str = field(repr=False)
    libvirt_uri: str
    disk_directory: Path
    required_plugins: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, object]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, root: Path | None = None) -> Self:
        """Read ``etc/virt-sse/config.toml`` under *root*; all of it is optional.

        :param root: default ``VIRT_SSE_ROOT``, else ``/``.
        :raise ConfigError: When the file cannot be read or holds what is unknown.
        """
        root = root if root is not None else Path(os.environ.get("VIRT_SSE_ROOT") or "/")
        path = root / "etc/virt-sse/config.toml"
        try:
            document = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            document = {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise ConfigError(f"cannot read {path}: {exc}") from exc
        _check(path, document)
        uri = (
            os.environ.get("LIBVIRT_DEFAULT_URI")
            or document.get("libvirt", {}).get("uri")
            or "qemu:///system"
        )
        store = document.get("store", {}).get("url") or _sqlite_url(root / "var/lib/virt-sse/store.sqlite")
        return cls(
            root=root,
            store_url=store,
            libvirt_uri=uri,
            disk_directory=Path(
                document.get("disks", {}).get("directory") or root / "var/lib/libvirt/images"
            ),
            required_plugins=tuple(document.get("plugins", {}).get("required", ())),
            provider_options=document.get("key-providers", {}),
        )

    @property
    def state_directory(self) -> Path:
        """The store, the keyring and locks; 0700."""
        return self.root / "var/lib/virt-sse"

    @property
    def log_directory(self) -> Path:
        """The audit log; 0700."""
        return self.root / "var/log/virt-sse"

    @property
    def hook_path(self) -> Path:
        """The libvirt qemu hook that ``virt-sse host init`` installs."""
        return self.root / "etc/libvirt/hooks/qemu.d/virt-sse"

    @property
    def agent_socket(self) -> Path:
        """Where the per-host agent answers, if one runs."""
        return self.root / "run/virt-sse/agent.sock"

    def key_provider(self, name: str) -> ProviderConfig:
        """What the provider *name* is made from."""
        return ProviderConfig(self.state_directory / name, self.provider_options.get(name, {}))


def _sqlite_url(path: Path) -> str:
    """SQLAlchemy's URL of an SQLite file; ``?`` and ``%`` have a meaning in it."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def _check(path: Path, document: Mapping[str, object]) -> None:
    """Refuse what is misspelt: an option that is silently ignored is a policy that does not hold."""
    for table, content in document.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {table!r} must be a table")
        if table == "key-providers":
            if not all(isinstance(options, dict) for options in content.values()):
                raise ConfigError(f"{path}: [key-providers] holds one table per provider")
            continue
        if table not in _TABLES:
            raise ConfigError(f"{path}: unknown table [{table}]")
        unknown = sorted(set(content) - _TABLES[table])
        if unknown:
            raise ConfigError(f"{path}: unknown option {unknown[0]!r} in [{table}]")
        for option, value in content.items():
            if option == "required":
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise ConfigError(f"{path}: 'required' in [plugins] must be a list of names")
            elif not isinstance(value, str):
                raise ConfigError(f"{path}: {option!r} in [{table}] must be a string")
