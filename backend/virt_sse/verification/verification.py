"""Verifies the running or defined state of domains against the requested encryption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.disks.creation import incomplete_image
from virt_sse.domains import temp_disks
from virt_sse.domains.data_on_host import HostData
from virt_sse.domains.keyless_images import described
from virt_sse.domains.settings import VmSettings
from virt_sse.domains.start import DomainStart
from virt_sse.errors import OtherFileError, PolicyError, VirtSseError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import GuestNode, HostCaching, Placement
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.model.vms import temp_disk_id
from virt_sse.qemu import img
from virt_sse.system.files import canonical
from virt_sse.system.running_process import qemu_process
from virt_sse.verification.chains import plaintext_links
from virt_sse.verification.code import code_problems, stage_processes
from virt_sse.verification.graph import place_of
from virt_sse.verification.image_evidence import BASE, check_image, check_temporary, check_within
from virt_sse.verification.monitor import block_graph, secret_objects
from virt_sse.verification.running_disks import GUEST_QEMU, CopyTarget, RunningDisks
from virt_sse.verification.stage_evidence import StageEvidence
from virt_sse.verification.verdict import (
    AtRestFinding,
    DataPlace,
    DiskVerdict,
    DomainVerdict,
    Layer,
    ProcessCode,
)

_LONGEST_CHAIN = 32
TEMPORARY = "(temporary)"


@dataclass(frozen=True, slots=True)
class _Subject:
    """The domain to verify.

    :ivar disks: all disks of virt-sse on this host.
    :ivar refuses_plaintext: whether foreign disks must be encrypted, too.
    """

    id: UUID
    name: str
    definition: DomainDefinition
    encryption_at_host: bool
    refuses_plaintext: bool
    disks: Sequence[Disk]

    @property
    def copies(self) -> list[Disk]:
        """The copies of disks under way."""
        return [disk for disk in self.disks if disk.source_id and disk.state is DiskState.CREATING]

    def base_of(self, disk: Disk) -> Disk | None:
        """The image below a linked clone; ``None`` for any other disk, or if the store lacks the image."""
        found = (each for each in self.disks if each.id == disk.base_id)
        return next(found, None) if disk.is_linked_clone else None

    def keyless(self, chain: DiskChain) -> Disk | None:
        """Find the disk of virt-sse whose image the domain has without the disk's key."""
        paths = {canonical(link.path) for link in chain.written_as_plain if link.path}
        return next((disk for disk in self.disks if disk.path in paths), None)

    def disk_of(self, chain: DiskChain) -> Disk | None:
        """Find the disk of virt-sse in a chain: by disk id or, if the image was replaced, by serial."""
        if chain.disk_id is not None:
            return next((disk for disk in self.disks if disk.id == chain.disk_id), None)
        return next((disk for disk in self.disks if disk.guest_serial == chain.serial), None)


class Verification:
    """Verifies domains; read-only."""

    def __init__(self, host: Host, start: DomainStart, vms: VmSettings) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._freshness = host.freshness
        self._stages = host.stages
        self._start = start
        self._evidence = StageEvidence(host.stages)
        self._vms = vms

    def verify(self, name: str, *, strict: bool = False) -> DomainVerdict:
        """Verify a domain: the running state or, for a stopped domain, definition and images.

        :param strict: whether foreign disks in plaintext are a problem also without encryption at host.
        :raise LibvirtError: When the domain does not exist.
        :raise MonitorError: When QEMU does not report the block graph.
        """
        view = self._vms.show(name)
        vm = self._store.vms.find(view.id)
        at_host = vm.properties.encryption_at_host if vm else view.properties.encryption_at_host
        with connected(self._config.libvirt_uri) as connection:
            domain = connection.lookupByUUID(view.id.bytes)
            runs = bool(domain.isActive())
            definition = domains.definition(domain, inactive=not runs)
            subject = _Subject(view.id, name, definition, at_host, strict or at_host, self._store.all())
            disks = list(self._running(subject, domain) if runs else self._defined(subject))
            pid = qemu_process(self._config.qemu_pid_file(name), view.id) if runs else None
        library = self._config.guest_library
        processes = list(stage_processes(self._stages, library, definition)) if runs else []
        if pid and view.library:
            processes.insert(0, ProcessCode(GUEST_QEMU, pid, view.library.value))
        problems = [str(view.problem)] if view.problem else []
        problems += code_problems(view, library, definition, pid)
        # The survey's disks are left out: their verdicts are more precise.
        host_data = [each for each in view.at_rest if not each.name.startswith("disk ")]
        problems += [
            f"{each.name} is in plaintext: {each.reason}"
            for each in host_data
            if at_host and each.is_avoidable
        ]
        return DomainVerdict(
            domain=name,
            runs=runs,
            encryption_at_host=at_host,
            disks=tuple(disks),
            places=(DataPlace("the guest's memory, and its QEMU's", True),) if runs else (),
            at_rest=tuple(_finding(each) for each in host_data),
            problems=tuple(dict.fromkeys(problems)),
            accelerate=view.is_accelerated,
            processes=tuple(processes),
        )

    def _running(self, subject: _Subject, domain: libvirt.virDomain) -> Iterator[DiskVerdict]:
        pid = qemu_process(self._config.qemu_pid_file(subject.name), subject.id)
        running = RunningDisks(block_graph(domain), secret_objects(domain), pid)
        listed = set()
        for chain in subject.definition.disk_chains(domains.running_backup(domain)):
            disk = subject.disk_of(chain)
            verdict = DiskVerdict(chain.target or "-")
            if _is_temporary(chain):
                self._check_temporary(verdict, subject, chain, running)
            elif disk:
                listed.add(disk.id)
                self._check_running(verdict, subject, chain, disk, running)
                verdict.expect(
                    disk.state in (DiskState.READY, DiskState.COPYING), f"the disk is {disk.state.value}"
                )
            elif keyless := subject.keyless(chain):
                listed.add(keyless.id)
                _refuse_keyless(verdict, keyless)
            elif not _expect_known(verdict, chain):
                pass
            elif running.check_foreign(verdict, chain):
                _refuse_plaintext(verdict, subject, chain)
            yield verdict
            if new := self._copy_target(subject, chain):
                listed.add(new.id)
                yield self._check_copy_target(subject, new)
        places = {canonical(place) for place in running.places()}
        for disk in subject.disks:
            if disk in subject.copies and disk.source_id in listed:
                continue
            known = {disk.path, canonical(self._stages.guest_socket(disk.id))}
            if disk.id not in listed and places & known:
                verdict = DiskVerdict("-", disk.name)
                verdict.expect(
                    False,
                    f"the guest's QEMU has disk {disk.name!r} open, which does not belong to the domain",
                )
                yield verdict

    def _check_running(
        self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain, disk: Disk, running: RunningDisks
    ) -> None:
        self._check_request(verdict, subject, disk)
        link = chain.links[chain.ours or 0]
        placement = Placement.STORAGE if link.disk_id and link.slot is None else Placement.GUEST
        wanted = self._start.placement(disk)
        verdict.expect(
            placement is wanted,
            f"the domain was started with placement {placement.value}, {wanted.value} was asked for",
        )
        try:
            plan = self._start.plan(disk, placement)
        except PolicyError as exc:
            verdict.expect(False, str(exc))
            return
        guest, *below = plan.stages
        is_plain = not isinstance(guest, GuestNode)
        place = self._stages.guest_socket(disk.id) if below or is_plain else disk.path
        copies = {
            canonical(self._place_of_copy(each, is_plain=is_plain))
            for each in subject.copies
            if each.source_id == disk.id
        }
        if isinstance(guest, GuestNode):
            entry = disk.dek(guest.slot)
            layer = Layer(GUEST_QEMU, None, entry.slot, str(entry.wrapped.key), str(place))
            new = self._copy_target(subject, chain)
            running.check_ours(
                verdict,
                chain,
                place,
                layer,
                entry.cipher,
                is_all=not below,
                copies=copies,
                increments={
                    f"socket {canonical(self._stages.guest_socket(each.id))}"
                    for each in subject.copies
                    if each.source_id == disk.id and each.base_id
                },
                copied_to=self._place_of(new) if new else None,
            )
        else:
            running.check_plain(verdict, chain, place, copies=copies)
        if below or is_plain:
            verdict.places.append(DataPlace(f"the socket {place}", is_plain))
            direct = running.stored_at(disk.path)
            verdict.expect(not direct, "the guest's QEMU has the image open directly, bypassing the stages")
        else:
            running.check_open(verdict, disk.path)
        self._evidence.check(verdict, disk, plan, subject.id, base=subject.base_of(disk))
        check_image(verdict, disk, self._freshness)
        check_within(verdict, disk, self._keys, self._freshness, subject.name)
        self._check_base(verdict, subject, disk)

    def _place_of_copy(self, copy: Disk, *, is_plain: bool) -> Path:
        """Where the guest's QEMU writes a copy under way.

        :param is_plain: whether the copy is encrypted below the guest's QEMU.
        """
        return (
            self._stages.guest_socket(copy.id) if is_plain or len(copy.deks) > 1 else incomplete_image(copy)
        )

    def _check_base(self, verdict: DiskVerdict, subject: _Subject, disk: Disk) -> None:
        """Check the image below a linked clone, if *disk* is one."""
        base = subject.base_of(disk)
        if base is not None:
            verdict.expect(base.state is DiskState.READY, f"the image below is {base.state.value}")
            check_image(verdict, base, self._freshness, where=BASE)
        else:
            problem = f"the store does not have the image below, {disk.base_id}"
            verdict.expect(not disk.is_linked_clone, problem)

    def _copy_target(self, subject: _Subject, chain: DiskChain) -> Disk | None:
        """The new disk into which virt-sse copies a disk of a running domain, if any."""
        for link in chain.mirror:
            copy = self._store.replacements.find(link.disk_id) if link.disk_id else None
            if copy and copy.disk_id == link.disk_id and copy.domain_id == subject.id:
                return next((disk for disk in subject.disks if disk.id == copy.disk_id), None)
        return None

    def _place_of(self, new: Disk) -> CopyTarget:
        guest = self._start.plan(new).stages[0]
        assert isinstance(guest, GuestNode)  # noqa: S101 -- the contract of layers
        return CopyTarget(self._start.source(new).place, new.dek(guest.slot).cipher)

    def _check_copy_target(self, subject: _Subject, new: Disk) -> DiskVerdict:
        """Check the new disk of a copy; its layer in QEMU is checked with the disk that is copied."""
        verdict = DiskVerdict("-", new.name)
        self._check_request(verdict, subject, new)
        plan = self._start.plan(new)
        self._evidence.check(verdict, new, plan, subject.id)
        check_image(verdict, new, self._freshness)
        return verdict

    def _check_temporary(
        self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain, running: RunningDisks
    ) -> None:
        (spec,) = self._plugins.host_layer().temporary_disk().deks
        path = temp_disks.image(self._config, subject.id)
        verdict.disk = TEMPORARY
        image = check_temporary(verdict, path, temp_disk_id(subject.id), str(spec.cipher))
        layer = Layer(GUEST_QEMU, None, spec.slot, image.key, str(path))
        running.check_ours(verdict, chain, path, layer, spec.cipher)
        running.check_open(verdict, path)
        verdict.layers.append(image)

    def _defined(self, subject: _Subject) -> Iterator[DiskVerdict]:
        links = plaintext_links(subject.definition, guest_socket=self._stages.guest_socket)
        for chain in subject.definition.disk_chains():
            disk = subject.disk_of(chain)
            verdict = DiskVerdict(chain.target or "-")
            if _is_temporary(chain):
                verdict.disk = TEMPORARY  # made when the domain starts
            elif disk:
                self._check_defined(verdict, subject, chain, disk)
            elif keyless := subject.keyless(chain):
                _refuse_keyless(verdict, keyless)
            elif _expect_known(verdict, chain):
                self._check_foreign_definition(verdict, subject, chain)
            for link in links:
                if link.target == chain.target:
                    verdict.places.append(DataPlace(f"{link.kind.value} {link.place}", True))
                    verdict.expect(False, f"{link.kind.value} {link.place} is not encrypted")
            yield verdict

    def _check_defined(self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain, disk: Disk) -> None:
        self._check_request(verdict, subject, disk)
        try:
            source, position = self._start.source(disk), chain.ours
        except PolicyError as exc:
            verdict.expect(False, str(exc))
            return
        link = chain.links[position if position is not None else 0]
        verdict.expect(
            position is not None, f"the definition has {link.place}, which is not encrypted by virt-sse"
        )
        if position is not None and (link.slot is None) != (source.slot is None):
            wanted = self._start.placement(disk).value
            verdict.expect(False, f"the definition is not for placement {wanted}, as asked for")
        elif position is not None:
            is_in_place = link.path is not None and canonical(link.path) == canonical(source.place)
            verdict.expect(is_in_place, f"the definition has the disk at {link.place}, not at {source.place}")
            verdict.expect(
                link.slot == source.slot,
                f"the definition has the DEK in slot {link.slot!r}, not {source.slot!r}",
            )
        is_used = self._evidence.check_ended(verdict, disk, subject.id)
        check_image(verdict, disk, self._freshness)
        if not is_used:
            check_within(verdict, disk, self._keys, self._freshness, subject.name)
        self._check_base(verdict, subject, disk)

    def _check_foreign_definition(self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain) -> None:
        """Check a foreign disk in a definition, and disks of virt-sse among the image's backing files."""
        top = chain.links[0]
        verdict.layers.append(
            Layer("definition", "not known" if top.is_encrypted else None, detail=top.place)
        )
        verdict.places.append(DataPlace(top.place, not top.is_encrypted))
        if not top.is_encrypted:
            _refuse_plaintext(verdict, subject, chain)
        ours = {disk.path: disk for disk in subject.disks}
        ours |= {self._stages.guest_socket(disk.id): disk for disk in subject.disks}
        for path in _backing_files(top.path) if top.is_file and top.path else ():
            if disk := ours.get(canonical(path)):
                verdict.expect(
                    False, f"{top.place} is an overlay of disk {disk.name!r}, but is not encrypted"
                )

    def _check_request(self, verdict: DiskVerdict, subject: _Subject, disk: Disk) -> None:
        verdict.disk, verdict.asked = disk.name, disk.encryption_type.value
        verdict.caching = disk.caching.value
        verdict.placement = self._start.placement(disk).value
        is_covered = disk.caching is HostCaching.NONE or subject.encryption_at_host
        verdict.expect(is_covered, "host caching is requested, but the VM has no encryption at host")
        try:
            plan = self._start.plan(disk)
        except PolicyError as exc:
            verdict.expect(False, str(exc))
            return
        planned = [(spec.slot, spec.cipher, spec.key) for spec in plan.deks]
        kept = [(e.slot, e.cipher, KeyRef(e.wrapped.key.provider, e.wrapped.key.name)) for e in disk.deks]
        verdict.expect(
            planned == kept, "the layers in the store differ from the layers of the encryption type"
        )


def _is_temporary(chain: DiskChain) -> bool:
    return any(link.slot == TEMP_SLOT for link in chain.links)


def _expect_known(verdict: DiskVerdict, chain: DiskChain) -> bool:
    """Check that a disk unknown to the store does not have a disk id of virt-sse."""
    if chain.disk_id is None:
        return True
    verdict.disk = str(chain.disk_id)
    return verdict.expect(False, "the store does not have the disk")


def _refuse_keyless(verdict: DiskVerdict, disk: Disk) -> None:
    verdict.disk = disk.name
    image = f"{disk.path}, {described(disk)}"
    verdict.expect(False, f"without its key, the domain has {image}: writes damage it")


def _refuse_plaintext(verdict: DiskVerdict, subject: _Subject, chain: DiskChain) -> None:
    """Report a foreign disk in plaintext. Read-only disks, e.g. CDs, hold no data of the guest."""
    verdict.expect(
        chain.read_only or not subject.refuses_plaintext, "not a disk of virt-sse, and in plaintext"
    )


def _backing_files(path: Path) -> Iterator[Path]:
    """List files and sockets in the backing chain of the image at *path*, if readable without a key."""
    found = {path}
    pending = [path]
    while pending and len(found) < _LONGEST_CHAIN:
        try:
            references = img.info(pending.pop(), shared=True).other_files
        except OtherFileError as exc:
            references = (exc.name,)
        except VirtSseError:
            continue
        for backing in (place_of(reference).path for reference in references):
            if backing and backing not in found:
                found.add(backing)
                pending.append(backing)
                yield backing


def _finding(data: HostData) -> AtRestFinding:
    return AtRestFinding(data.name, data.place, data.state.value, data.reason)
