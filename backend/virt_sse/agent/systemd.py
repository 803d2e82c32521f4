"""systemd's units for the agent and the embedded key vault (systemd.unit(5))."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

from virt_sse.config import Config
from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.system.files import shared_folder, write_shared

NAMES = ("virt-sse-agent.socket", "virt-sse-agent.service", "virt-sse-vault.service")

_UNFIT = re.compile(r"[\x00-\x1f\x7f\"\\$]")


def write_units(directory: Path, config: Config) -> list[Path]:
    """Write the units for this installation and host into *directory*; return the files written.

    :raise InvalidValueError: When a path has characters that units cannot hold.
    :raise ConfigError: When a file cannot be written.
    """
    values = {
        "PYTHON": sys.executable,
        "PROGRAM": str(Path(sys.executable).with_name("virt-sse")),
        "ROOT": str(config.root),
        "URI": config.libvirt_uri,
        "SOCKET": str(config.agent_socket),
        "VAULT": str(config.state_directory / "vault"),
    }
    written = []
    try:
        shared_folder(directory)
        for name in NAMES:
            text = resources.files("virt_sse.agent").joinpath("units", name).read_text("utf-8")
            for word, value in values.items():
                text = text.replace(f"@{word}@", _escaped(value))
            path = directory / name
            write_shared(path, text.encode())
            written.append(path)
    except OSError as exc:
        raise ConfigError(f"cannot write units into {directory}: {exc.strerror}") from exc
    return written


def installed_units(config: Config) -> list[Path]:
    """The units in ``/etc/systemd/system``, and the links that enable them."""
    folder = config.root / "etc/systemd/system"
    folders = [*folder.glob("*.wants"), folder]
    found = [each / name for each in folders for name in NAMES]
    return [path for path in found if path.is_symlink() or path.exists()]


def _escaped(value: str) -> str:
    """Escape *value* for a unit file: ``%`` begins a specifier."""
    if _UNFIT.search(value):
        raise InvalidValueError(f"invalid characters for a unit file: {value[:80]!r}")
    return value.replace("%", "%%")
