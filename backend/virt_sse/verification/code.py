"""Verifies the code in the processes with a domain's keys: the XTS library, and foreign libraries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from virt_sse.domains.guest_preload import foreign, library_problem
from virt_sse.domains.settings import VmView
from virt_sse.errors import StageError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.qemu_environment import loaded_code
from virt_sse.stages import Stages
from virt_sse.system.guest_library import GuestLibrary
from virt_sse.system.running_process import environment
from virt_sse.verification.verdict import ProcessCode


def stage_processes(
    stages: Stages, library: GuestLibrary, definition: DomainDefinition
) -> Iterator[ProcessCode]:
    """The library in each running stage process of a domain's disks."""
    targets = {use.disk_id: use.target for use in definition.our_disks}
    for disk_id, target in targets.items():
        try:
            record = stages.record(disk_id)
        except StageError:
            continue  # a problem of the disk
        for process in stages.processes(record) if record else ():
            if pid := process.process.pid():
                yield ProcessCode(f"{process.title} of {target}", pid, library.in_use(pid).value)


def code_problems(
    view: VmView, library: GuestLibrary, definition: DomainDefinition, pid: int | None
) -> Sequence[str]:
    """Differences between the request and the code in the domain's QEMU, and foreign libraries.

    :param pid: of the QEMU process; ``None`` if the domain does not run, or the process is not visible.
    """
    found = loaded_code(environment(pid)) if pid else ()
    problems = [
        f"the domain's QEMU loads {each}, which is not virt-sse's and sees the keys"
        for each in foreign(library, (*definition.loaded_code, *found))
    ]
    if view.library and (problem := library_problem(view.library, is_asked=view.is_accelerated)):
        problems.append(problem)
    return problems
