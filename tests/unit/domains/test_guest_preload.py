"""No domain gets a key whose QEMU would load code that another user may change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_sse.domains.guest_preload import foreign, is_accelerated, library_problem, refuse_unsafe
from virt_sse.errors import PolicyError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.qemu_environment import QEMU_NAMESPACE
from virt_sse.system import acceleration
from virt_sse.system.guest_library import GuestLibrary, LibraryInUse


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def library(root: Path) -> GuestLibrary:
    return GuestLibrary.of(root, root / "state")


def domain(value: object, variable: str = "LD_PRELOAD") -> DomainDefinition:
    return DomainDefinition.parse(
        f"<domain xmlns:qemu='{QEMU_NAMESPACE}'><qemu:commandline>"
        f"<qemu:env name='{variable}' value='{value}'/></qemu:commandline></domain>"
    )


def refusal(library: GuestLibrary, definition: DomainDefinition) -> str:
    with pytest.raises(PolicyError) as caught:
        refuse_unsafe(library, definition)
    return f"{caught.value}; {caught.value.hint}"


def test_a_missing_library_of_ours_is_no_reason_to_refuse(library: GuestLibrary) -> None:
    definition = domain(library.path)
    assert is_accelerated(library, definition)
    assert foreign(library, definition.loaded_code) == []
    refuse_unsafe(library, definition)


def test_only_a_library_that_virt_sse_has_installed_is_loaded(library: GuestLibrary) -> None:
    if reason := acceleration.obstacle():
        pytest.skip(f"the XTS library: {reason}")
    definition = domain(library.path)
    library.install()
    refuse_unsafe(library, definition)
    library.path.chmod(0o666)
    assert "other users may write" in refusal(library, definition)
    library.path.chmod(0o644)
    library.path.write_bytes(b"x")
    assert "not a library that virt-sse has installed" in refusal(library, definition)
    library.path.unlink()
    library.path.parent.chmod(0o777)
    assert "other users may write" in refusal(library, definition)


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH"])
def test_foreign_code_must_be_safe_from_other_users(library: GuestLibrary, root: Path, variable: str) -> None:
    folder = root / "folder"
    folder.mkdir(mode=0o755)
    file = folder / "a.so"
    file.touch(mode=0o644)
    wanted = folder if variable == "LD_LIBRARY_PATH" else file
    definition = domain(wanted, variable)
    refuse_unsafe(library, definition)
    assert [each.name for each in foreign(library, definition.loaded_code)] == [str(wanted)]
    folder.chmod(0o777)
    assert f"'{wanted}' ({variable}): other users may write {folder}" in refusal(library, definition)
    assert f"chmod go-w {folder}" in refusal(library, definition)


def test_a_missing_file_that_another_user_may_create_is_refused(library: GuestLibrary) -> None:
    assert "other users may write /tmp" in refusal(library, domain("/tmp/no-such-folder/no-such.so"))  # noqa: S108
    assert "other users may write /tmp" in refusal(library, domain("tmp/no-such.so"))


@pytest.mark.root
def test_a_file_of_another_user_is_refused(library: GuestLibrary, root: Path) -> None:
    file = root / "a.so"
    file.touch(mode=0o644)
    os.chown(file, 65534, -1)
    assert "belongs to user 65534" in refusal(library, domain(file))


def test_a_library_of_a_system_folder_and_other_variables_pass(library: GuestLibrary) -> None:
    refuse_unsafe(library, domain("libm.so.6"))
    refuse_unsafe(library, domain("/tmp/x", "PULSE_SERVER"))  # noqa: S108


def test_a_difference_from_the_request_is_a_problem() -> None:
    silent = (LibraryInUse.CURRENT, LibraryInUse.EARLIER)
    for found in LibraryInUse:
        assert (library_problem(found, is_asked=True) is None) == (found in silent)
        assert (library_problem(found, is_asked=False) is None) == (found is not LibraryInUse.UNKNOWN)
