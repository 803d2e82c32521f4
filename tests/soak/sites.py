"""The files of a host on which operations are killed, with a vault and an HSM token."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soak.kill_points import Ended, run
from support.command_line import PROGRAM
from support.customer_keys import RIGHTS, CustomerKeys
from support.leftovers import Leftovers
from virt_sse.backend import Backend
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.permissions import Role

M = 1 << 20
PATTERN = b"virt-sse-soak-plaintext\n"
"""The plaintext on every disk, again and again."""


def content(size: int = M) -> bytes:
    """What a disk of *size* bytes holds from the start."""
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of disk: encryption set and format."""

    encryption_set: str | None
    format: str

    @property
    def name(self) -> str:
        return f"{self.encryption_set or 'single'}-{self.format}"


KINDS = tuple(
    Kind(each, image_format)
    for each in (None, "double", "customer", "hsm")
    for image_format in ("qcow2", "raw")
)
PLAIN = KINDS[:2]


class FileSite:
    """A host under a folder, in one of several prepared states, with a vault and an HSM token.

    libvirt is libvirt's test driver: commands that ask for domains get an answer.

    :param folder: empty; all files go there.
    :ivar leftovers: the processes left by the current attempt.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.images = self.root / "var/lib/libvirt/images"
        self.state = self.root / "var/lib/virt-sse"
        self.out = folder / "out"
        self.source = folder / "source.raw"
        self.source.write_bytes(content())
        os.environ |= {"VIRT_SSE_ROOT": str(self.root), "LIBVIRT_DEFAULT_URI": "test:///default"}
        self.environment = dict(os.environ)
        self.vault = stack.enter_context(LabVault())
        self.keys = stack.enter_context(CustomerKeys(self.vault, folder / "identities"))
        self.administrator = self.vault.administrator_path
        self.leftovers = Leftovers()

    def cli(self, *arguments: str | Path, status: int = 0) -> str:
        """Run ``virt-sse``: its output."""
        ended = self.run(*arguments)
        assert ended.status == status, f"{arguments}: {ended}"
        return ended.output

    def run(self, *arguments: str | Path) -> Ended:
        return run([PROGRAM, *arguments], environment=self.environment)

    def bring(self, state: str, prepare: Callable[[], object]) -> None:
        """Put the host into a state, which *prepare* makes from nothing at the first time."""
        kept = self.folder / f"state-{state}"
        if not kept.exists():
            self.wipe()
            self.images.mkdir(parents=True)
            prepare()
            shutil.copytree(self.root, kept, symlinks=True)
        self.wipe()
        shutil.copytree(kept, self.root, symlinks=True)
        self.out.mkdir()

    def wipe(self) -> None:
        for path in (self.root, self.out):
            shutil.rmtree(path, ignore_errors=True)

    def bring_host(self, *kinds: Kind) -> None:
        """An initialised host with encryption sets, and with a disk of each kind."""
        self.bring("-".join(kind.name for kind in kinds) or "no-disk", lambda: self._prepare(kinds))

    def _prepare(self, kinds: tuple[Kind, ...]) -> None:
        self.cli("host", "init")
        both = "EncryptionAtRestWithPlatformAndCustomerKeys"
        arguments = ("--provider", "platform-managed", "--key", "default", "--encryption-type", both)
        self.cli("des", "create", "double", *arguments)
        wanted = {kind.encryption_set for kind in kinds}
        operator = self.root / "etc/virt-sse/identity-operator.json"
        operator.parent.mkdir(parents=True, exist_ok=True)
        self.keys.administration.new_credential_file(
            operator, f"host-{uuid.uuid4().hex[:8]}", role=Role.IDENTITY_OPERATOR
        )
        for name in ("other", "customer") if "customer" in wanted or not kinds else ("other",):
            self.cli("des", "create", name, "--key", self.keys.new_key())
            self.grant(name)
        if "hsm" in wanted:
            self.cli("host", "hsm", "init")
            self.cli("host", "hsm", "create", "disks", "--size", "2048")
            self.cli("des", "create", "hsm", "--provider", "hsm-simulated", "--key", "disks")
        for kind in kinds:
            chosen = ["--des", kind.encryption_set] if kind.encryption_set else []
            arguments = ("--source-format", "raw", "--format", kind.format, *chosen)
            self.cli("disk", "import", kind.name, self.source, *arguments)

    def grant(self, name: str) -> None:
        """Let the identity of a set use keys."""
        with Backend.open(self.root) as backend:
            identity = backend.sets.get(name).identity
        assert identity
        self.keys.administration.set_permissions(identity, RIGHTS)

    def await_quiet(self) -> None:
        """Wait until no process of a killed command is left.

        :raise AssertionError: When some are left.
        """
        self.leftovers.check(seconds=60)
