"""Verifies domains: what runs, or is defined, against what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.domains import temp_disks
from virt_sse.domains.data_on_host import HostData
from virt_sse.domains.settings import VmSettings
from virt_sse.domains.start import DomainStart
from virt_sse.errors import VirtSseError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import Disk
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import GuestNode, HostCaching
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.model.vms import temp_disk_id
from virt_sse.qemu import img
from virt_sse.system.files import canonical
from virt_sse.verification.chains import plaintext_links, serial
from virt_sse.verification.graph import place_of
from virt_sse.verification.image_evidence import check_image, check_temporary, check_within
from virt_sse.verification.monitor import block_graph
from virt_sse.verification.processes import qemu_process
from virt_sse.verification.running_disks import GUEST_QEMU, RunningDisks
from virt_sse.verification.stage_evidence import StageEvidence
from virt_sse.verification.verdict import AtRestFinding, DataPlace, DiskVerdict, Layer, Verdict

_LONGEST_CHAIN = 32
TEMPORARY = "(temporary)"


@dataclass(frozen=True, slots=True)
class _Subject:
    """A domain that is looked at.

    :ivar disks: all of ours on this host.
    :ivar refuses_plaintext: whether disks that are not ours must be encrypted, too.
    """

    id: UUID
    name: str
    definition: DomainDefinition
    encryption_at_host: bool
    refuses_plaintext: bool
    disks: Sequence[Disk]

    def disk_of(self, chain: DiskChain) -> Disk | None:
        """The disk of ours that a domain has or, as the guest still knows it by its serial, had."""
        if chain.disk_id is not None:
            return next((disk for disk in self.disks if disk.id == chain.disk_id), None)
        return next((disk for disk in self.disks if serial(disk.id) == chain.serial), None)


class Verification:
    """Looks, and changes nothing."""

    def __init__(self, host: Host, start: DomainStart, vms: VmSettings) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._stages = host.stages
        self._start = start
        self._evidence = StageEvidence(host.config, host.stages)
        self._vms = vms

    def verify(self, name: str, *, strict: bool = False) -> Verdict:
        """Look at a domain: at what runs or, when it does not, at its definition and its images.

        :param strict: whether a disk in plaintext that is not ours is a problem also without encryption at
            host.
        :raise LibvirtError: When there is no such domain.
        :raise MonitorError: When its QEMU does not say what it does.
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
        problems = [str(view.problem)] if view.problem else []
        rest = [each for each in view.at_rest if not each.name.startswith("disk ")]  # seen better here
        problems += [
            f"{each.name} is in plaintext: {each.reason}" for each in rest if at_host and each.is_refused
        ]
        return Verdict(
            domain=name,
            runs=runs,
            encryption_at_host=at_host,
            disks=tuple(disks),
            places=(DataPlace("the guest's memory, and its QEMU's", True),) if runs else (),
            at_rest=tuple(_found(each) for each in rest),
            problems=tuple(dict.fromkeys(problems)),
        )

    def _running(self, subject: _Subject, domain: libvirt.virDomain) -> Iterator[DiskVerdict]:
        pid = qemu_process(self._config, subject.name, subject.id)
        running = RunningDisks(block_graph(domain), pid)
        seen = set()
        for chain in subject.definition.disk_chains(domains.running_backup(domain)):
            disk = subject.disk_of(chain)
            verdict = DiskVerdict(chain.target or "-")
            if _is_temporary(chain):
                self._check_temporary(verdict, subject, chain, running)
            elif disk:
                seen.add(disk.id)
                self._check_running(verdict, subject, chain, disk, running)
            elif not _expect_known(verdict, chain):
                pass
            elif running.check_others(verdict, chain):
                _refuse_plaintext(verdict, subject, chain)
            yield verdict
        places = {canonical(place) for place in running.places()}
        for disk in subject.disks:
            known = {disk.path, canonical(self._stages.guest_socket(disk.id))}
            if disk.id not in seen and places & known:
                verdict = DiskVerdict("-", disk.name)
                verdict.expect(False, f"its QEMU has disk {disk.name!r} open, which is none of the domain's")
                yield verdict

    def _check_running(
        self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain, disk: Disk, running: RunningDisks
    ) -> None:
        plan = self._start.plan(disk)
        self._asked(verdict, subject, disk)
        guest, *below = plan.stages
        assert isinstance(guest, GuestNode)  # noqa: S101 -- the contract of layers
        entry = disk.dek(guest.slot)
        place = self._stages.guest_socket(disk.id) if below else disk.path
        layer = Layer(GUEST_QEMU, None, entry.slot, str(entry.wrapped.key), str(place))
        running.check_ours(verdict, chain, place, layer, entry.cipher, is_all=not below)
        if below:
            verdict.places.append(DataPlace(f"the socket {place}", False))
            direct = running.stored_at(disk.path)
            verdict.expect(not direct, "the guest's QEMU has the image itself open, past what is below it")
        else:
            running.check_open(verdict, disk.path)
        self._evidence.check(verdict, disk, plan, subject.id)
        check_image(verdict, disk)

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
        links = plaintext_links(subject.definition)
        for chain in subject.definition.disk_chains():
            disk = subject.disk_of(chain)
            verdict = DiskVerdict(chain.target or "-")
            if _is_temporary(chain):
                verdict.disk = TEMPORARY  # it is made when the domain starts
            elif disk:
                self._check_defined(verdict, subject, chain, disk)
            elif _expect_known(verdict, chain):
                self._check_other_definition(verdict, subject, chain)
            for link in links:
                if link.target == chain.target:
                    verdict.places.append(DataPlace(f"{link.kind.value} {link.place}", True))
                    verdict.expect(False, f"{link.kind.value} {link.place} is not encrypted")
            yield verdict

    def _check_defined(self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain, disk: Disk) -> None:
        self._asked(verdict, subject, disk)
        source, position = self._start.source(disk), chain.ours
        link = chain.links[position if position is not None else 0]
        verdict.expect(position is not None, f"its definition has {link.place}, which is not encrypted by us")
        if position is not None:
            is_there = link.path is not None and canonical(link.path) == canonical(source.place)
            verdict.expect(is_there, f"its definition has it at {link.place}, not at {source.place}")
            verdict.expect(link.slot == source.slot, f"its definition has the DEK in slot {link.slot!r}")
        record = self._stages.record(disk.id)
        is_used = record is not None and record.domain_id == subject.id
        verdict.expect(not is_used, "what was below its QEMU has not been ended")
        check_image(verdict, disk)
        if not is_used:
            check_within(verdict, disk, self._keys, subject.name)

    def _check_other_definition(self, verdict: DiskVerdict, subject: _Subject, chain: DiskChain) -> None:
        """One that is not ours, as far as libvirt says; its image may have one of ours as backing file."""
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
                    False, f"{top.place} is an overlay of disk {disk.name!r}, and is not encrypted"
                )

    def _asked(self, verdict: DiskVerdict, subject: _Subject, disk: Disk) -> None:
        verdict.disk, verdict.asked = disk.name, disk.encryption_type.value
        verdict.caching = disk.caching.value
        is_covered = disk.caching is HostCaching.NONE or subject.encryption_at_host
        verdict.expect(is_covered, "it is to be cached by the host, which has no encryption at host for it")
        planned = [(spec.slot, spec.cipher, spec.key) for spec in self._start.plan(disk).deks]
        kept = [(e.slot, e.cipher, KeyRef(e.wrapped.key.provider, e.wrapped.key.name)) for e in disk.deks]
        verdict.expect(planned == kept, "the store has other layers for it than its encryption type asks for")


def _is_temporary(chain: DiskChain) -> bool:
    return any(link.slot == TEMP_SLOT for link in chain.links)


def _expect_known(verdict: DiskVerdict, chain: DiskChain) -> bool:
    """Whether a disk that is none of the store's does not claim to be."""
    if chain.disk_id is None:
        return True
    verdict.disk = str(chain.disk_id)
    return verdict.expect(False, "the store does not have it")


def _refuse_plaintext(verdict: DiskVerdict, subject: _Subject, chain: DiskChain) -> None:
    """What the guest cannot write to, e.g. a CD, has nothing of the guest."""
    verdict.expect(chain.read_only or not subject.refuses_plaintext, "it is not virt-sse's, and in plaintext")


def _backing_files(path: Path) -> Iterator[Path]:
    """The files, or sockets, that the image at *path* draws on, as far as they can be read without a key."""
    seen = {path}
    pending = [path]
    while pending and len(seen) < _LONGEST_CHAIN:
        try:
            others = img.info(pending.pop(), shared=True).other_files
        except VirtSseError:
            continue
        for found in (place_of(other).path for other in others):
            if found and found not in seen:
                seen.add(found)
                pending.append(found)
                yield found


def _found(rest: HostData) -> AtRestFinding:
    return AtRestFinding(rest.name, rest.place, rest.state.value, rest.reason)
