"""The composition root: builds the services of a host and exposes them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from virt_sse.audit.record import Component
from virt_sse.config import Config
from virt_sse.disks.certificates import DeletionCertificates
from virt_sse.disks.copies import Copies
from virt_sse.disks.erasure import Erasure
from virt_sse.disks.images import Images
from virt_sse.disks.inspector import Inspector
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.receiving import Receiving
from virt_sse.disks.restore_points import RestorePoints
from virt_sse.disks.snapshots import Snapshots
from virt_sse.disks.soft_deletion import SoftDeletion
from virt_sse.disks.transfer import Transfer
from virt_sse.domains import temp_disks
from virt_sse.domains.host_encryption import HostEncryption
from virt_sse.domains.hotplug import Hotplug
from virt_sse.domains.live_copies import DomainCopies
from virt_sse.domains.new_domains import NewDomains
from virt_sse.domains.saved_states import SavedStates
from virt_sse.domains.scale_sets import ScaleSets
from virt_sse.domains.settings import VmSettings
from virt_sse.domains.start import DomainStart
from virt_sse.keys.encryption_sets import EncryptionSets
from virt_sse.keys.host import Host
from virt_sse.keys.rewrap import KeyRotation
from virt_sse.plugins import PluginHost
from virt_sse.replacement.in_place import InPlace
from virt_sse.replacement.reencryption import ReencryptionService
from virt_sse.replacement.restoration import Restoration
from virt_sse.replacement.settlement import Settlement
from virt_sse.verification.verification import Verification


class Backend:
    """The services of a host. Opening the backend finishes or undoes the work of killed commands.

    :ivar host: configuration, store, plugins, key access, locks, stages.
    :ivar disks: create, list, adopt, resize, check and delete disks.
    :ivar erasure: the end of disks and copies.
    :ivar soft_deletion: delete disks for a time, recover and purge deleted disks.
    :ivar copies: copy disks.
    :ivar receiving: disks for the content of domains that migrate here.
    :ivar live_copies: copies of disks of running domains.
    :ivar snapshots: take, restore and delete snapshots.
    :ivar restore_points: make, verify, restore and erase restore points.
    :ivar images: make and delete images, and disks of images.
    :ivar transfer: import and export.
    :ivar certificates: certificates about deleted disks.
    :ivar reencryption: new DEKs and volume keys for disks.
    :ivar restoration: restoration of disks in place.
    :ivar in_place: encryption of plaintext disks of domains.
    :ivar inspector: in-guest encryption on disks.
    :ivar sets: disk encryption sets.
    :ivar keys: KEKs in use, rotation, rewrapping.
    :ivar domains: start of domains.
    :ivar host_encryption: temporary disks and TPM state of domains.
    :ivar hotplug: attach and detach disks.
    :ivar saved_states: encrypted saved states of domains.
    :ivar vms: settings of domains.
    :ivar new_domains: domains with new and existing disks.
    :ivar scale_sets: domains from one definition and one disk.
    :ivar verification: ``vm verify``.
    :param plugins: default: the installed plugins.
    :param component: the component named in the audit records of key uses.
    :param in_hook: whether libvirt may wait for this process: work that needs libvirt's answers is left to
        :meth:`recover`, or to the next command.
    :raise StoreError: When the store cannot be opened.
    :raise PluginError: When a required plugin is broken.
    """

    def __init__(
        self,
        config: Config,
        plugins: PluginHost | None = None,
        *,
        component: Component = Component.HOST,
        in_hook: bool = False,
    ) -> None:
        host = self.host = Host.open(config, plugins, component=component)
        host.opened_store.full()
        self.host_encryption = HostEncryption(host)
        self.keys = KeyRotation(host, self.host_encryption.update_tpm_envelope)
        self.sets = EncryptionSets(host, self.keys)
        self.inspector = Inspector(host)
        self.domains = DomainStart(host, self.host_encryption)
        self.hotplug = Hotplug(host, self.domains, self.inspector)
        self.certificates = DeletionCertificates(host)
        self.live_copies = DomainCopies(host, self.domains, in_hook=in_hook)
        self.erasure = Erasure(host, self.certificates)
        self.disks = Disks(host, self.sets, self.hotplug, self.erasure, self.live_copies)
        self.soft_deletion = SoftDeletion(host, self.disks, self.erasure)
        self.copies = Copies(host, self.disks, self.live_copies)
        self.receiving = Receiving(host, self.disks)
        self.snapshots = Snapshots(host, self.disks, self.copies, self.live_copies)
        self.restore_points = RestorePoints(host, self.disks, self.copies)
        self.transfer = Transfer(host, self.disks)
        self.images = Images(host, self.disks, self.copies, self.transfer)
        settlement = self._settlement = Settlement(host, self.disks, self.domains)
        self.reencryption = ReencryptionService(host, self.disks, self.domains, self.inspector, settlement)
        self.restoration = Restoration(host, self.disks, self.copies, settlement)
        self.in_place = InPlace(host, self.disks, self.domains, self.inspector, settlement)
        self.saved_states = SavedStates(host)
        self.vms = VmSettings(host, self.domains, self.host_encryption, self.inspector, self.saved_states)
        self.new_domains = NewDomains(host, self.disks, self.domains, self.hotplug, self.vms)
        self.scale_sets = ScaleSets(host, self.disks, self.copies, self.domains, self.vms)
        self.verification = Verification(host, self.domains, self.vms)
        try:
            host.image_paths.provide(lambda: [disk.path for disk in host.store.all()])
            temp_disks.erase_of_other_boots(config)
            host.leases.end_killed_work()
            if not in_hook:
                self.resume_guests()
            self.disks.recover()
            self.keys.recover()
            if not in_hook:
                settlement.recover()
                self.new_domains.recover()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, root: Path | None = None) -> Self:
        """Open the backend of the host whose files lie under *root*; see :meth:`Config.load`."""
        return cls(Config.load(root))

    def recover(self) -> None:
        """Finish or undo what a backend opened with *in_hook* has left, with libvirt's answers.

        :raise VirtSseError: When the store cannot be queried, or libvirt refuses.
        """
        self.live_copies.in_hook = False
        self.resume_guests()
        self.disks.recover()
        self._settlement.recover()
        self.new_domains.recover()

    def resume_guests(self) -> None:
        """Resume the guests paused by killed commands, and settle these commands' saved states."""
        self.saved_states.recover()
        self.live_copies.recover()

    def close(self) -> None:
        """Close the store and the key providers."""
        self.host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
