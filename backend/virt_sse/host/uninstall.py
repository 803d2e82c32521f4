"""Removal of what ``virt-sse host init`` has installed; keys, images, records and the store stay.

Each step can be repeated: after a kill, the next run removes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.agent_client import ask
from virt_sse.config import Config
from virt_sse.errors import AgentUnavailableError, ConfigError, DiskInUseError
from virt_sse.host.setup import APPARMOR_LOCAL, apparmor_rule, configuration_folder, hook_marker
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.system.files import sync_folder, write_shared


@dataclass(frozen=True, slots=True)
class InstalledPart:
    """An installed part of virt-sse.

    :ivar what: in words, with the path.
    """

    what: str
    remove: Callable[[], object]


def refuse_if_needed(host: Host, *, keep_disks: bool) -> None:
    """Check that nothing needs the installed parts.

    :param keep_disks: whether disks may stay, which cannot be started afterwards.
    :raise ConfigError: When the agent runs, or disks exist and may not stay.
    :raise DiskInUseError: When domains with disks run, or processes of such domains.
    :raise LibvirtUnavailableError: When disks exist and libvirt does not answer.
    """
    disks = host.store.all()
    in_use = {record.domain for record in host.stages.records()}
    if disks:
        with connected(host.config.libvirt_uri) as connection:
            for domain in connection.listAllDomains():
                with domains.gone_is_fine():
                    if domains.is_active(domain) and domains.definition(domain).our_disks:
                        in_use.add(domain.name())
    if in_use:
        names = ", ".join(sorted(in_use))
        raise DiskInUseError(
            f"domains with disks of virt-sse run: {names}", hint="shut the domains down first"
        )
    if disks and not keep_disks:
        raise ConfigError(
            f"{len(disks)} disks and copies exist, which no domain can use without virt-sse",
            hint="export or purge the disks, or pass --keep-disks: images and keys stay as they are",
        )
    try:
        ask(host.config.agent_socket, "GET", "/status", timeout=host.config.agent.timeout)
    except AgentUnavailableError:
        return
    raise ConfigError(
        "the agent is running",
        hint="systemctl disable --now virt-sse-agent.socket virt-sse-agent (and virt-sse-vault, if unused)",
    )


def installed_parts(config: Config) -> Iterator[InstalledPart]:
    """What is installed: hook, AppArmor rule, library for guests, empty folder. The hooks of others stay."""
    hook, local, library = config.hook_path, config.root / APPARMOR_LOCAL, config.guest_library
    if hook.exists():
        yield InstalledPart(f"libvirt hook {hook}", lambda: _unlink(hook))
    if hook_marker(config).exists():
        marker = hook_marker(config)
        yield InstalledPart(f"record of the hook {marker}", lambda: _unlink(marker))
    if _has_rule(config, local):
        yield InstalledPart(f"AppArmor rule in {local}", lambda: _remove_rule(config, local))
    if library.path.exists() or library.is_wanted:
        yield InstalledPart(f"library {library.path}", library.remove)
    folder = configuration_folder(config)
    if folder.is_dir() and not any(folder.iterdir()):
        yield InstalledPart(f"empty folder {folder}", folder.rmdir)


def remaining(host: Host) -> Iterator[str]:
    """What stays on the host, in words."""
    config = host.config
    count = len(host.store.all())
    if count:
        yield f"{count} images of disks and copies"
    for path, what in (
        (config.state_directory, "keys, store and records"),
        (config.log_directory, "audit log"),
        (configuration_folder(config), "configuration"),
        (config.cache_directory, "caches"),
    ):
        if path.exists():
            yield f"{what} in {path}"


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def _has_rule(config: Config, local: Path) -> bool:
    return local.exists() and apparmor_rule(config.socket_directory) in local.read_text().splitlines()


def _remove_rule(config: Config, local: Path) -> None:
    """Remove the rule from the site's local profile, and the profile if nothing else is in it."""
    rule = apparmor_rule(config.socket_directory)
    rest = [line for line in local.read_text().splitlines() if line != rule]
    if rest:
        write_shared(local, "".join(f"{line}\n" for line in rest).encode())
    else:
        _unlink(local)
