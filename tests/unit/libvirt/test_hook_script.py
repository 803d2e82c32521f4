"""The hook script that libvirt runs, and what it does before any code of ours is loaded."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from support.command_line import no_libvirt
from virt_sse.libvirt import hook_script
from virt_sse.libvirt.migration_token import MIGRATION_NAMESPACE
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.vm_metadata import VM_NAMESPACE
from virt_sse.store.image_paths import ImagePaths

OURS = f"<domain><uuid>{uuid.uuid4()}</uuid><devices><disk><source file='/x'><encryption format='luks'><secret type='passphrase' usage='{SecretName(uuid.uuid4(), 'service').usage}'/></encryption></source><target dev='vda'/></disk></devices></domain>"  # noqa: E501 -- XML
DISK = (
    f"<disk type='network'><source protocol='nbd' name='virt-sse:{uuid.uuid4()}'/><target dev='vda'/></disk>"
)
OURS_BELOW_QEMU = f"<domain><uuid>{uuid.uuid4()}</uuid><devices>{DISK}</devices></domain>"
THEIRS = "<domain><devices><disk><source file='/x'/><target dev='vda'/></disk></devices></domain>"
PREPARE, RECONNECT = ("prepare", "begin", "-"), ("reconnect", "begin", "-")


class Hook:
    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self.path = path
        self.stages = Path(environment["VIRT_SSE_ROOT"]) / "run/virt-sse/stages"
        self.images = ImagePaths(Path(environment["VIRT_SSE_ROOT"]) / "var/lib/virt-sse/image-paths")
        hook_script.install(path, environment, self.stages, self.images.file)

    def __call__(self, xml: str, *event: str, status: int = 0) -> str:
        """What is said in the environment that libvirtd gives its hooks, which is next to none."""
        done = subprocess.run(
            [self.path, "a domain", *event],
            input=xml,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == status, done.stderr
        assert done.stdout == ""
        return done.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Hook:
    root = tmp_path / "a root's $HOME"
    return Hook(
        tmp_path / "hooks/qemu.d/virt-sse",
        {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)},
    )


def test_the_hook_is_installed_once(tmp_path: Path) -> None:
    path, files = tmp_path / "hooks/qemu.d/virt-sse", (tmp_path / "stages", tmp_path / "image-paths")
    assert hook_script.install(path, {"A": "1"}, *files)
    assert path.stat().st_mode & 0o777 == 0o755
    assert not hook_script.install(path, {"A": "1"}, *files)
    assert hook_script.install(path, {"A": "2"}, *files)
    path.chmod(0o644)
    assert hook_script.install(path, {"A": "2"}, *files)
    assert list(path.parent.iterdir()) == [path]


def test_a_domain_of_others_passes_whatever_state_we_are_in(installed: Hook, tmp_path: Path) -> None:
    (tmp_path / "a root's $HOME").write_text("no folder")
    installed.path.write_text(installed.path.read_text().replace(sys.executable, "/nowhere/python"))
    for xml in (THEIRS, "", "no XML", "<a>" * 100_000, "usage='virt"):
        for event in (
            PREPARE,
            RECONNECT,
            ("release", "end", "-"),
            ("start", "begin", "-"),
            ("migrate", "begin", "-"),
        ):
            assert installed(xml, *event) == ""


def test_a_domain_of_others_passes_at_once(installed: Hook) -> None:
    """At most 60 ms, each; the best of some, since this is a busy machine. Likewise beside many images."""
    for images, seconds in ((0, 0.06), (10_000, 0.15)):
        installed.images.replace(
            lambda images=images: [Path("/images", str(uuid.uuid4())) for _ in range(images)]
        )
        times = []
        for _ in range(5):
            start = time.monotonic()
            installed(THEIRS, *PREPARE)
            times.append(time.monotonic() - start)
        assert min(times) < seconds


def test_leftovers_of_an_unplugged_disk_are_removed_at_the_end(installed: Hook) -> None:
    """The domain's XML names nothing of ours by then, but its stages' record names the domain."""
    domain_id = uuid.uuid4()
    theirs = THEIRS.replace("<devices>", f"<uuid>{domain_id}</uuid><devices>")
    record = installed.stages / str(uuid.uuid4()) / "stages.json"
    record.parent.mkdir(parents=True)
    record.write_text(f'{{"domain-id": "{uuid.uuid4()}"}}')
    release = ("release", "end", "-")
    assert installed(theirs, *release) == ""
    record.write_text(f'{{"domain-id": "{domain_id}"}}')
    assert installed(theirs, *PREPARE) == ""
    assert "libvirt does not answer" in installed(theirs, *release, status=1)


@pytest.mark.parametrize("xml", [OURS, OURS_BELOW_QEMU, OURS_BELOW_QEMU.replace("'", '"')])
def test_a_domain_of_ours_that_cannot_be_served_is_refused_with_the_reason(installed: Hook, xml: str) -> None:
    said = installed(xml, *PREPARE, status=1)
    assert said.startswith("virt-sse: error: vda names disk ")
    assert "which the store does not have" in said
    assert "virt-sse: hint: " in said
    assert "Traceback" not in said


def test_a_domain_with_settings_of_ours_is_served_even_without_a_disk_of_ours(
    installed: Hook,
) -> None:
    element = f'<virt-sse:vm xmlns:virt-sse="{VM_NAMESPACE}" encryption-at-host="perhaps"/>'
    asked = THEIRS.replace("<devices>", f"<uuid>{uuid.uuid4()}</uuid><metadata>{element}</metadata><devices>")
    assert "metadata is invalid" in installed(asked, *PREPARE, status=1)


def test_a_migration_is_refused_before_it_starts(installed: Hook) -> None:
    said = installed(OURS, "migrate", "begin", "-", status=1)
    assert "which the store does not have" in said
    assert installed(OURS, "started", "begin", "-") == ""
    incoming = OURS.replace("<devices>", f"<!-- {MIGRATION_NAMESPACE} --><devices>")
    installed.path.write_text(installed.path.read_text().replace(sys.executable, "/nowhere/python"))
    assert "/nowhere/python is gone" in installed(incoming, "started", "begin", "-", status=1)


def test_an_invalid_secret_is_refused(installed: Hook) -> None:
    said = installed(OURS.replace(":service", ""), *PREPARE, status=1)
    assert "names an unknown secret" in said


def test_a_broken_store_refuses_the_domain(installed: Hook, tmp_path: Path) -> None:
    (tmp_path / "a root's $HOME/var/lib/virt-sse/store.sqlite").mkdir(parents=True)
    assert "virt-sse: error: cannot open the store" in installed(OURS, *PREPARE, status=1)


def test_reconnect_never_fails(installed: Hook, tmp_path: Path) -> None:
    """Else libvirt would kill the running guest."""
    assert "the store does not have" in installed(OURS, *RECONNECT)
    (tmp_path / "a root's $HOME/var/lib/virt-sse/store.sqlite").write_text("nonsense" * 100)
    assert "cannot open the store" in installed(OURS, *RECONNECT)
    installed.path.write_text(installed.path.read_text().replace(sys.executable, "/nowhere/python"))
    assert "/nowhere/python is gone" in installed(OURS, *RECONNECT)
    assert "/nowhere/python is gone" in installed(OURS, *PREPARE, status=1)


def test_other_events_pass_without_work(installed: Hook, tmp_path: Path) -> None:
    for event in (("start", "begin", "-"), ("started", "begin", "-"), ("stopped", "end", "-")):
        assert installed(OURS, *event) == ""
    assert not (tmp_path / "a root's $HOME").exists()


@pytest.mark.parametrize("named", ["file='/images/a &amp; b.raw'", "pool='default' volume='a &amp; b.raw'"])
def test_only_a_domain_with_an_image_of_ours_reaches_python(installed: Hook, named: str) -> None:
    """With its key or without: Python asks the store."""
    with_image = THEIRS.replace("file='/x'", named).replace(
        "<devices>", f"<uuid>{uuid.uuid4()}</uuid><devices>"
    )
    installed.path.write_text(installed.path.read_text().replace(sys.executable, "/nowhere/python"))
    assert installed(with_image, *PREPARE) == "", "no image is known yet"
    installed.images.add(Path("/images/a & b.raw"))
    assert "/nowhere/python is gone" in installed(with_image, *PREPARE, status=1)
    assert installed(with_image, *RECONNECT) == ""
    assert installed(with_image.replace("b.raw", "b.raw.bak"), *PREPARE) == ""
    assert installed(THEIRS, *PREPARE) == ""
    installed.images.replace(list)
    assert installed(with_image, *PREPARE) == ""
