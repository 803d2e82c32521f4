"""Set-up of a host by ``virt-sse host init``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from virt_sse.config import Config
from virt_sse.errors import ConfigError
from virt_sse.keys.host import Host
from virt_sse.libvirt import hook_script
from virt_sse.model.disks import PLATFORM_KEY
from virt_sse.system import acceleration
from virt_sse.system.files import private_folder, shared_folder, write_private, write_shared

APPARMOR_ABSTRACTION = "etc/apparmor.d/abstractions/libvirt-qemu"
"""The AppArmor profile of every QEMU process started by libvirt, on Debian and Ubuntu."""
APPARMOR_LOCAL = "etc/apparmor.d/local/abstractions/libvirt-qemu"
"""The site's local additions, included by that profile."""


def initialise(host: Host) -> list[str]:
    """Create the missing parts of a host: keyring, host key, libvirt hook, AppArmor rule.

    The library for guests, if wanted, is replaced by this version's.

    :return: the created parts, in words.
    :raise KeyringError: When part of the keyring is missing, or disks are under a missing keyring: a keyring
        is never created again.
    :raise HostKeyError: When the host key cannot be written.
    :raise ConfigError: When a file cannot be written.
    """
    made = []
    config, store = host.config, host.store
    folder = configuration_folder(config)
    with _naming(folder):
        if not folder.exists():
            private_folder(folder)
            made.append(f"folder {folder} for configuration and credentials")
    provider = host.plugins.key_provider(PLATFORM_KEY.provider)
    in_use = [*(key for key, _ in store.keys_in_use()), *store.vms.keys_in_use()]
    if any(key.provider == PLATFORM_KEY.provider for key in in_use):
        provider.current_key(PLATFORM_KEY.name)
    elif provider.provision():
        made.append(f"keyring {config.key_provider(PLATFORM_KEY.provider).directory}")
    if host.freshness.host_key.provision():
        made.append(f"host key {host.freshness.host_key.path}")
    with _naming(config.hook_path):
        if not config.hook_path.exists():
            private_folder(config.state_directory)
            write_private(hook_marker(config), b"")
        if hook_script.install(config.hook_path, *hook_parameters(config)):
            made.append(f"libvirt hook {config.hook_path}")
    with _naming(config.image_paths):
        host.image_paths.replace(lambda: [disk.path for disk in store.all()])
    library = config.guest_library
    if library.is_wanted and acceleration.library():
        with _naming(library.path):
            if library.install():
                made.append(f"library {library.path}")
    local = config.root / APPARMOR_LOCAL
    with _naming(local):
        if (config.root / APPARMOR_ABSTRACTION).exists() and _allow(local, config.socket_directory):
            made.append(f"AppArmor rule in {local}")
    return made


def configuration_folder(config: Config) -> Path:
    """The folder of ``config.toml`` and of the credentials that a key administrator hands out."""
    return config.root / "etc/virt-sse"


def hook_marker(config: Config) -> Path:
    """An empty file, written when the hook is installed where there was none; libvirtd sees it at a start."""
    return config.state_directory / "hook-installed"


def hook_parameters(config: Config) -> tuple[dict[str, str], Path, Path]:
    """The parameters of the hook script. libvirtd does not pass on its own environment."""
    environment = {"VIRT_SSE_ROOT": str(config.root), "LIBVIRT_DEFAULT_URI": config.libvirt_uri}
    return environment, config.stage_directory, config.image_paths


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def apparmor_rule(sockets: Path) -> str:
    """The AppArmor rule for QEMU's connections to stages; gates limit each QEMU to its own disks."""
    return f'"{sockets}/*/guest/nbd" rw,'


def _allow(local: Path, sockets: Path) -> bool:
    """Add the rule to the site's local profile, for QEMU processes started later: whether new."""
    before = local.read_text() if local.exists() else ""
    rule = apparmor_rule(sockets)
    if rule in before.splitlines():
        return False
    shared_folder(local.parent)
    end = "\n" if before and not before.endswith("\n") else ""
    write_shared(local, f"{before}{end}{rule}\n".encode())
    return True
