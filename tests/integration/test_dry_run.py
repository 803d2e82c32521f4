"""``--dry-run`` of every command that destroys: says what would be done or refuses, and changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support import images
from support.command_tree import commands
from support.command_tree import root as tree
from support.customer_keys import RIGHTS, CustomerKeys
from support.hosts import initialised_backend
from support.stores import execute
from virt_sse.backend import Backend
from virt_sse.cli import command_tree, session
from virt_sse.cli.main import build
from virt_sse.config import Config
from virt_sse.disks.copies import new_copy
from virt_sse.errors import VirtSseError
from virt_sse.lab.tokens import LabHsm
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import NewDisk
from virt_sse.model.hosts import SILENT_SECONDS, HostIdentity
from virt_sse.model.layers import EncryptionType
from virt_sse.model.scale_sets import Instance, ScaleSet
from virt_sse.plugins import PluginHost
from virt_sse.vault_client.permissions import Role

M = 1 << 20
PRINCIPAL, VAULT_KEY, DELETED_KEY = (f"dry-{word}-{uuid.uuid4().hex[:8]}" for word in ("run", "key", "gone"))

WOULD: dict[str, tuple[list[str], str]] = {
    "des delete": (["empty"], "would delete disk encryption set empty"),
    "disk delete": (["web"], "recoverable until 20"),
    "disk delete --purge": (["web"], "would erase disk web (/"),
    "disk erase-backup": (["point"], "would erase restore point point (/"),
    "disk purge": (["gone"], "would erase disk gone (/"),
    "disk purge --due": ([], "would erase disk gone (/"),
    "disk resize": (["web", "2M"], "would resize disk web from 1048576 to 2097152 bytes\n"),
    "disk resize --shrink": (["web", "512K"], "to 524288 bytes, and lose all data beyond\n"),
    "host evacuate": (["dead"], "DOMAIN"),
    "host fence": (["dead"], "would fence host dead ("),
    "host hsm destroy --all-versions": (["disks"], "would destroy key hsm-simulated:disks:"),
    "host hsm disable": (["disks"], "would disable key hsm-simulated:disks:"),
    "host uninstall --keep-disks": ([], "would remove libvirt hook /"),
    "image delete": (["base:1"], "would erase image base:1 (/"),
    "image delete --force": (["linked:1"], "would erase linked clone clone (/"),
    "key delete": ([VAULT_KEY], "would shut domain orders down, and destroy it after 60 s\n"),
    "key disable": ([VAULT_KEY], "would leave these disks and copies without a usable key: vaulted\n"),
    "key purge": ([DELETED_KEY], f"would purge key {DELETED_KEY} (https:"),
    "snapshot delete": (["snap"], "would erase snapshot snap (/"),
    "snapshot restore --in-place": (["snap", "web"], "would replace the content of disk web with"),
    "vault access remove": ([PRINCIPAL], f"would take from principal {PRINCIPAL} ("),
    "vault principal delete": ([PRINCIPAL], f"would delete principal {PRINCIPAL} ("),
    "vault principal disable": ([PRINCIPAL], f"would disable principal {PRINCIPAL} ("),
    "vmss delete": (["set"], "would remove domain set-1 and erase its disk\nwould delete scale set set\n"),
    "vmss scale": (["set", "0"], "would remove domain set-1 and erase its disk\n"),
}
"""By command and options: arguments, and a part of what a dry run says."""

REFUSED: dict[str, list[str]] = {
    "des delete": ["used"],
    "disk delete": ["vaulted"],
    "disk erase-backup": ["web"],
    "disk purge": ["web"],
    "disk resize": ["web", "512K"],
    "host fence": ["living"],
    "host evacuate": ["living"],
    "image delete": ["linked:1"],
    "key disable": ["nowhere"],
    "key delete": ["nowhere"],
    "key purge": [VAULT_KEY],
    "snapshot delete": ["web"],
    "vault principal delete": ["nobody"],
    "vmss delete": ["nowhere"],
    "vmss scale": ["set", "1001"],
}
"""By command: arguments that the command refuses."""

_UNCOUNTED = re.compile(r"audit|\.lock$|-shm$|^token\.object$")


class Site:
    """A host with something of every kind, and a vault with keys."""

    def __init__(self, root: Path, keys: CustomerKeys) -> None:
        self.root = root
        self.keys = keys

    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
        """Run a command in this process.

        :raise VirtSseError: When the command fails.
        """
        monkeypatch.setattr(sys, "argv", ["virt-sse", *arguments])
        config = Config.load(self.root)
        with contextlib.closing(PluginHost(config)) as plugins, session.use(config, plugins):
            assert command_tree.run(build(plugins, {arguments[0]})) == 0

    def before(self, case: str) -> dict[str, object]:
        """The state before the first test, without the vault's objects unless *case* needs these."""
        return self._with_vault if _is_of_vault(case) else self._files

    def note_state(self) -> None:
        """Note the state that no dry run may change."""
        self._files, self._with_vault = self.state("disk"), self.state("vault")

    def state(self, case: str) -> dict[str, object]:
        """Digests of the files; for a command on the vault, also the vault's objects.

        Without locks, the audit log, whose records tell of key uses, and what logins note in a token.
        """
        found: dict[str, object] = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and not _UNCOUNTED.search(path.name)
        }
        if _is_of_vault(case):
            administration, client = self.keys.administration, self.keys.client
            found["principals"] = [each.name for each in administration.principals() if each.enabled]
            found["access"] = administration.access()
            found["keys"] = [(each.id, each.enabled) for each in client.list_properties_of_keys()]
            found["deleted keys"] = [each.id for each in client.list_deleted_keys()]
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, lab_vault: LabVault, lab_hsm: LabHsm) -> Iterator[Site]:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    assert lab_hsm.module
    root = tmp_path_factory.mktemp("dry-run")
    with (
        initialised_backend(root) as backend,
        CustomerKeys(lab_vault, root / "credentials") as keys,
        pytest.MonkeyPatch.context() as monkeypatch,
    ):
        monkeypatch.setenv("VIRT_SSE_VAULT_CREDENTIAL", str(lab_vault.administrator_path))
        made = Site(root, keys)
        _fill_vault(backend, keys)
        _fill(backend)
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")
        with Backend.open(root) as again:
            again.soft_deletion.delete("gone")
        for arguments in (["host", "hsm", "init"], ["host", "hsm", "create", "disks", "--size", "2048"]):
            made.run(monkeypatch, *arguments)
        node = root / "node.xml"
        element = backend.domains.disk_element("vaulted")
        node.write_text(
            "<node><domain type='test'><name>orders</name><memory>8192</memory><os><type>hvm</type></os>"
            f"<devices>{element}</devices></domain></node>"
        )
        url = backend.host.config.store_url
        execute(url, "UPDATE disks SET scheduled_purge = deleted")
        assert backend.host.leases.identity.name
        for name in ("dead", "living"):
            backend.host.store.hosts.enter(HostIdentity(uuid.uuid4(), name, uuid.uuid4()))
        execute(url, "UPDATE hosts SET seen = seen - :age WHERE name = 'dead'", age=SILENT_SECONDS)
        execute(url, "UPDATE hosts SET seen = seen + 86400 WHERE name = 'living'")
        made.note_state()
        yield made


def _fill_vault(backend: Backend, keys: CustomerKeys) -> None:
    operator = backend.host.config.operator_credential
    operator.parent.mkdir(parents=True, exist_ok=True)
    keys.administration.new_credential_file(operator, f"host-{PRINCIPAL}", role=Role.IDENTITY_OPERATOR)
    keys.administration.new_credential_file(operator.with_name("other.json"), PRINCIPAL)
    keys.administration.grant(PRINCIPAL, RIGHTS)
    for name in (DELETED_KEY, VAULT_KEY):
        url = str(keys.client.create_rsa_key(name, size=2048).id).rpartition("/")[0]
    keys.client.begin_delete_key(DELETED_KEY).wait()
    made = backend.sets.create("vaulted", provider="customer-managed", key=url)
    keys.administration.grant(str(made.identity), RIGHTS)


def _fill(backend: Backend) -> None:
    both = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
    for name in ("empty", "used"):
        backend.sets.create(name, provider="platform-managed", key="default", encryption_type=both)
    for name in ("gone", "web"):
        backend.disks.create(NewDisk(name=name, size=M))
    backend.disks.create(NewDisk(name="double", size=M, encryption_set="used"))
    vaulted = backend.disks.create(NewDisk(name="vaulted", size=M, encryption_set="vaulted"))
    web = backend.disks.get("web")
    for name, kind in (("snap", DiskKind.SNAPSHOT), ("point", DiskKind.RESTORE_POINT)):
        backend.copies.copy([new_copy(web, name, kind)])
    for image in ("base", "linked"):
        backend.images.create(image, "web")
    backend.images.new_clone("linked:1", NewDisk(name="clone"))
    moment = datetime.now(UTC)
    store = backend.host.store.scale_sets
    store.add(ScaleSet(uuid.uuid4(), "set", "<domain/>", vaulted.id, 0, False, moment))
    store.plan(store.get("set").id, [Instance(1, uuid.uuid4(), uuid.uuid4(), False)])
    store.update(store.get("set").id, size=1)


def _is_of_vault(case: str) -> bool:
    return case.startswith(("key", "vault"))


def _command(case: str) -> str:
    return case.partition(" --")[0]


def test_every_command_that_asks_has_a_dry_run() -> None:
    asking = {
        " ".join(path): {option for parameter in command.params for option in parameter.opts}
        for path, command in commands(tree())
        if any({"--yes", "--dry-run"} & set(parameter.opts) for parameter in command.params)
    }
    assert all({"--yes", "--dry-run"} <= options for options in asking.values())
    assert {_command(case) for case in WOULD} == set(asking)


@pytest.mark.parametrize("case", WOULD)
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(
    site: Site, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.startswith("key "):
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", f"test://{site.root / 'node.xml'}")
    arguments, expected = WOULD[case]
    site.run(monkeypatch, *case.split(), *arguments, "--dry-run")
    assert expected in capsys.readouterr().out
    assert site.state(case) == site.before(case)


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_as_the_command_does(
    site: Site, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", f"test://{site.root / 'node.xml'}")
    said = []
    for options in (["--dry-run"], ["--yes"]):
        with pytest.raises(VirtSseError) as caught:
            site.run(monkeypatch, *case.split(), *REFUSED[case], *options)
        said.append((type(caught.value), str(caught.value), caught.value.hint))
    assert said[0] == said[1]
    assert site.state(case) == site.before(case)
