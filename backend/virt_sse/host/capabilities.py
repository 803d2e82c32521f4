"""The capabilities of a host, found by probing."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from virt_sse.config import Config
from virt_sse.errors import ToolError, VirtSseError
from virt_sse.host.setup import APPARMOR_ABSTRACTION, APPARMOR_LOCAL, apparmor_rule
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.users import User
from virt_sse.model import ciphers
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.plugins import PluginHost
from virt_sse.qemu import luks, unlocking
from virt_sse.stages import launch, seccomp
from virt_sse.stages.storage_user import is_mapped, storage_user
from virt_sse.system import acceleration
from virt_sse.system.confinement import Confinement
from virt_sse.system.files import write_at
from virt_sse.system.tools import run

_RECONNECTING_LIBVIRT = 9_005_000
"""First libvirt version with NBD reconnection (``<reconnect>``)."""
_WRONG_KEY = "cannot unlock any keyslot"


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability of a host.

    :ivar detail: the version of the tool, or the reason for the absence.
    """

    name: str
    available: bool
    detail: str


def probe(config: Config) -> list[Capability]:
    """Probe all capabilities; takes about a second."""
    found = [
        _tool("disks", "qemu-img"),
        _tool("confined tools", "bwrap"),
        _tool("double encryption", "qemu-storage-daemon"),
        _tool("host caches", "nbdkit", "--filter=cache", "null"),
        _tool("encrypted TPM state", "swtpm"),
    ]
    with ThreadPoolExecutor() as pool:
        found += pool.map(cipher_capability, ciphers.KNOWN)
    return [
        *found,
        xts_capability(),
        guest_capability(config),
        *_libvirt(config),
        seccomp_capability(),
        _landlock(),
        *_apparmor(config),
        cloud_profile(config),
    ]


def cloud_profile(config: Config) -> Capability:
    """The cloud's rules that the host follows, and the date of their source."""
    name = "cloud profile"
    plugins = PluginHost(config)
    try:
        profile = plugins.cloud_profile()
    except VirtSseError as exc:
        return Capability(name, available=False, detail=str(exc))
    finally:
        plugins.close()
    dated = f", of {profile.date}" if profile.date else ""
    off = "" if config.enforce_policy else "; not enforced"
    return Capability(name, available=True, detail=f"{profile.name}{dated}{off}")


def _tool(name: str, tool: str, *arguments: str) -> Capability:
    try:
        said = run([tool, *arguments, "--version"], confinement=None, timeout=20)
    except VirtSseError as exc:
        return Capability(name, available=False, detail=str(exc))
    return Capability(name, available=True, detail=said.splitlines()[0] if said else tool)


def cipher_capability(cipher: Cipher) -> Capability:
    """Whether QEMU supports *cipher*: a LUKS header then fails for its wrong key only."""
    name = f"cipher {cipher}"
    try:
        header = bytearray(luks.make_header(AES_256_XTS, dek := Dek.generate()))
    except ToolError as exc:
        return Capability(name, available=False, detail=str(exc))
    luks.set_cipher(header, cipher)
    image = os.memfd_create("cipher")
    try:
        write_at(image, bytes(header) + bytes(luks.SECTOR), 0)
        with unlocking.secrets_for([dek]) as (secrets, descriptors):
            run(
                ["qemu-io", "--read-only", *secrets, "-c", "read -q 0 512", "--image-opts"]
                + [unlocking.image_options(Path(f"/proc/self/fd/{image}"), DiskFormat.RAW, 1)],
                confinement=Confinement(),
                pass_fds=[*descriptors, image],
            )
    except ToolError as exc:
        if _WRONG_KEY not in str(exc):
            return Capability(name, available=False, detail=str(exc))
    finally:
        os.close(image)
    return Capability(name, available=True, detail="QEMU")


def xts_capability() -> Capability:
    """Whether QEMU's tools and storage processes encrypt XTS with virt-sse's library."""
    name = "accelerated XTS"
    if reason := acceleration.obstacle():
        return Capability(name, available=False, detail=reason)
    try:
        path = acceleration.path_in_qemu()
    except VirtSseError as exc:
        return Capability(name, available=False, detail=str(exc))
    if path is None:
        return Capability(name, available=False, detail="QEMU does not use nettle, or a self-test failed")
    return Capability(name, available=True, detail=path)


def guest_capability(config: Config) -> Capability:
    """Whether guests' QEMU processes can preload virt-sse's library."""
    name, library = "accelerated XTS in guests", config.guest_library
    if not library.is_wanted:
        return Capability(name, available=False, detail="off; 'virt-sse host init --accelerate' turns it on")
    reason = library.obstacle()
    return Capability(name, available=reason is None, detail=reason or str(library.path))


def _libvirt(config: Config) -> list[Capability]:
    try:
        with connected(config.libvirt_uri) as connection:
            version = connection.getLibVersion()
            qemu = HostCapabilities.of(connection).qemu_user
    except VirtSseError as exc:
        return [Capability("libvirt", available=False, detail=str(exc))]
    said = f"{version // 1_000_000}.{version // 1000 % 1000}.{version % 1000}"
    return [
        Capability("libvirt", available=True, detail=said),
        Capability(
            "guests survive a storage daemon",
            available=version >= _RECONNECTING_LIBVIRT,
            detail=said if version >= _RECONNECTING_LIBVIRT else f"needs libvirt 9.5, this is {said}",
        ),
        users_capability(config, qemu),
    ]


def users_capability(config: Config, qemu: User) -> Capability:
    """Whether each storage process has a user of its own."""
    name = "a user per storage process"
    if config.storage_user is None:
        uids = config.storage_uids
        text = f"uids {uids[0]}-{uids[-1]}"
        available = is_mapped(uids)
        return Capability(name, available, text if available else f"the user namespace has no {text}")
    try:
        user = storage_user(config.storage_user)
    except VirtSseError as exc:
        return Capability(name, available=False, detail=str(exc))
    also = ", the same as QEMU" if user.uid == qemu.uid else ""
    return Capability(name, available=False, detail=f"uid {user.uid} for all ('storage-user'){also}")


def seccomp_capability() -> Capability:
    """Whether storage processes run under a seccomp filter."""
    name = "seccomp filter for storage processes"
    try:
        seccomp.stage_filter()
    except ToolError as exc:
        return Capability(name, available=False, detail=str(exc))
    return Capability(name, available=True, detail="libseccomp")


def _landlock() -> Capability:
    version = launch.landlock_version(ctypes.CDLL(None, use_errno=True))
    found = version >= 1
    detail = f"version {version}" if found else "the kernel has no Landlock, or it is disabled"
    return Capability("Landlock for storage processes", available=found, detail=detail)


def _apparmor(config: Config) -> list[Capability]:
    if not (config.root / APPARMOR_ABSTRACTION).exists():
        return []
    local = config.root / APPARMOR_LOCAL
    allowed = local.exists() and apparmor_rule(config.socket_directory) in local.read_text().splitlines()
    detail = str(local) if allowed else "'virt-sse host init' adds the rule"
    return [Capability("AppArmor rule for QEMU and its stages", available=allowed, detail=detail)]
