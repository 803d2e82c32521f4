"""Access to the Ceph cluster: by QEMU's driver rbd, and by rbd(8).

The user's key is read from the keyring when needed, and reaches programs by pipes and files only.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Iterator, Sequence

from virt_sse.errors import CephError, ConfigError, ToolError
from virt_sse.model.ceph import CephCluster
from virt_sse.system.permissions import readable_permission
from virt_sse.system.rbd_names import RbdName
from virt_sse.system.tools import passphrase_descriptor, run

_SECRETS = "ceph"
"""First part of the ids of secret objects with the user's key in QEMU's programs."""
SECRET = f"{_SECRETS}0"
"""The id of :func:`secret_object`."""
_TIMEOUT = 30.0
_KEY = re.compile(rb"^\s*key\s*=\s*(\S+)\s*$", re.MULTILINE)
_used: list[CephCluster] = []


def use(cluster: CephCluster | None) -> None:
    """Take the configured cluster for all images of this process."""
    _used[:] = [cluster] if cluster else []


def cluster() -> CephCluster:
    """The configured cluster.

    :raise ConfigError: When none is configured.
    """
    if not _used:
        raise ConfigError(
            "no Ceph cluster is configured",
            hint="set 'monitors', 'user' and 'keyring' in [ceph]; see the guide",
        )
    return _used[0]


def user_key() -> bytes:
    """The user's key, in base64.

    :raise ConfigError: When the keyring cannot be read, may be read by others, or has no key of the user.
    """
    used = cluster()
    try:
        if found := readable_permission(used.keyring, used.keyring.stat()):
            raise ConfigError(found.problem, hint=found.remedy)
        content = used.keyring.read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read the Ceph keyring {used.keyring}: {exc.strerror}") from exc
    sections = re.split(rb"^\s*\[([^\]\n]*)\]\s*$", content, flags=re.MULTILINE)
    of_user = [
        body for name, body in zip(sections[1::2], sections[2::2], strict=True) if name == _client(used)
    ]
    keys = _KEY.findall(of_user[0]) if len(of_user) == 1 else []
    with contextlib.suppress(binascii.Error, IndexError):
        base64.b64decode(keys[0], validate=True)
        return bytes(keys[0])
    raise ConfigError(f"the Ceph keyring {used.keyring} has no key of client.{used.user}")


def _client(used: CephCluster) -> bytes:
    return f"client.{used.user}".encode()


def node(name: RbdName, number: int = 0) -> dict[str, object]:
    """QEMU's description of an image; the program needs the secret object *number* of :func:`secret`."""
    used = cluster()
    return {
        "driver": "rbd",
        "pool": name.pool,
        "image": name.image,
        "user": used.user,
        "key-secret": f"{_SECRETS}{number}",
        "auth-client-required": ["cephx"],
        "server": [{"host": host, "port": str(port)} for host, port in used.monitors],
    }


def secret_object() -> dict[str, object]:
    """Arguments of QMP's ``object-add`` that define the secret object for :func:`node`."""
    return {"qom-type": "secret", "id": SECRET, "format": "base64", "data": user_key().decode()}


@contextlib.contextmanager
def secret(number: int = 0) -> Iterator[tuple[list[str], list[int]]]:
    """Arguments and descriptors that define the secret object for :func:`node` for a QEMU tool."""
    with passphrase_descriptor(user_key()) as descriptor:
        described = f"secret,id={_SECRETS}{number},format=base64,file=/proc/self/fd/{descriptor}"
        yield ["--object", described], [descriptor]


def rbd(arguments: Sequence[str]) -> str:
    """Run rbd(8) as the configured user: its output.

    :raise CephError: When the cluster does not answer, or refuses.
    """
    used = cluster()
    monitors = ",".join(
        f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in used.monitors
    )
    command = [
        "rbd",
        "--conf",
        "/dev/null",
        "--mon-host",
        monitors,
        "--id",
        used.user,
        "--keyring",
        str(used.keyring),
    ]
    user_key()  # names what is wrong with the keyring
    try:
        return run([*command, *arguments], confinement=None, timeout=_TIMEOUT)
    except ToolError as exc:
        hint = "install the package ceph-common" if "is not installed" in str(exc) else None
        is_silent = "did not finish" in str(exc)
        raise CephError(f"{'Ceph does not answer: ' * is_silent}{_reason(str(exc))}", hint=hint) from exc


def _reason(message: str) -> str:
    """The message of rbd(8) without times, threads and sources."""
    return re.sub(r"\d{4}-\d\d-\d\dT\S+ [0-9a-f]+ +-?\d+ ", "", message)
