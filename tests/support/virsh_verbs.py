"""The tables of the page about virsh, and of the test that runs each command on each kind of disk.

The commands run in this order, for each kind of disk, on a domain that is shut off at the beginning. In a
command, ``DOMAIN`` is the domain, ``DISK`` and ``IMAGE`` are its disk and the disk's image, ``SPARE`` is an
image of a second disk of the same kind, ``FILE`` a path without a file, ``PLAIN`` a plain raw image. Commands
around the tested one begin with the program's name, and must succeed; ``inside`` runs a command in the host's
namespaces, and ``gone`` waits until the domain lacks a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from support.virsh_cells import WORKS, Row, harm, plaintext, refused, row, works

_NO_AGENT = refused("QEMU guest agent is not configured")
_NO_SECRET = refused("A single <secret type='passphrase'...> element is expected")
_SNAPSHOT_OF_DISK = "snapshot-create-as DOMAIN s --disk-only --diskspec vda,file=FILE"
_SHOWN = "virt-sse vm show DOMAIN"

_LIFE = (
    row("start DOMAIN", WORKS, "The hook provides keys and processes, or refuses with the reason."),
    row("reboot DOMAIN", WORKS),
    row("reset DOMAIN", WORKS),
    row("shutdown DOMAIN", WORKS, "The guest decides. At its end, keys and processes are removed."),
    row("suspend DOMAIN", WORKS, state="paused"),
    row("resume DOMAIN", WORKS, "The agent pauses a domain with a revoked key again."),
    row("dompmsuspend DOMAIN mem", _NO_AGENT, "With an agent in the guest: as without encryption."),
    row("dompmwakeup DOMAIN", refused("guest is not in suspended state")),
    row(
        "autostart DOMAIN",
        WORKS,
        "The virt-sse agent starts the domain, see [below](#autostart).",
        after=("virsh autostart DOMAIN --disable",),
    ),
    row(
        "set-lifecycle-action DOMAIN crash coredump-destroy",
        WORKS,
        "A crash would write the memory to a file.",
        after=("virsh set-lifecycle-action DOMAIN crash destroy",),
        at_host=plaintext(tells=(_SHOWN, "crash-dump")),
    ),
    row(
        "metadata DOMAIN urn:x --key x --set <x/>",
        WORKS,
        "An element of another program stays as it is.",
        after=("virsh metadata DOMAIN urn:x --remove",),
    ),
    row("desc DOMAIN text", WORKS),
    row("domrename DOMAIN NEW", refused("cannot rename active domain"), "Works on a stopped domain."),
)

_DISKS = (
    row("domblkinfo DOMAIN vda", works("Capacity")),
    row("domblklist DOMAIN", works("vda"), "The place of a staged disk is the export's name."),
    row("domblkstat DOMAIN vda", works("rd_req")),
    row("domblkerror DOMAIN", works("No errors")),
    row("domblkthreshold DOMAIN vda 1M", WORKS),
    row("domstats DOMAIN --block", works("block.0.name=vda")),
    row("blkdeviotune DOMAIN vda --total-iops-sec 100000", WORKS),
    row(
        "blockresize DOMAIN vda 2M",
        works(event="disk-resized"),
        "A process below QEMU does not grow: past its room, `disk-beyond-room`. `disk resize` is better.",
        double_raw=refused("Cannot grow NBD nodes"),
    ),
    row("domfsfreeze DOMAIN", _NO_AGENT, "With an agent in the guest: works."),
    row("domfsthaw DOMAIN", _NO_AGENT, "Likewise."),
    row("domfstrim DOMAIN", _NO_AGENT, "Likewise; raw disks have no discard."),
    row("domfsinfo DOMAIN", _NO_AGENT, "Likewise."),
    row(
        "attach-disk DOMAIN PLAIN vdb",
        WORKS,
        "A plain disk stays a plain disk; `vm verify --strict` tells.",
        after=("virsh destroy DOMAIN", "virsh start DOMAIN"),
    ),
    row(
        "attach-disk DOMAIN SPARE vdb",
        plaintext(event="plaintext-link", kind="keyless image"),
        "**Damage**: the guest overwrites ciphertext. A start is refused. Use `disk attach`.",
        after=("virsh destroy DOMAIN", "virsh start DOMAIN"),
    ),
    row(
        "attach-device DOMAIN SPARE.xml",
        refused("Secret not found"),
        "libvirt runs no hook here. Use `disk attach`.",
    ),
    row("attach-device DOMAIN SPARE.xml --config", WORKS, "From the next start."),
    row("detach-device DOMAIN SPARE.xml --config", WORKS),
    row(
        "detach-disk DOMAIN vda --config",
        WORKS,
        "`attach-device --config` or `disk attach` adds the disk again.",
        after=("virsh define DOMAIN.xml",),
    ),
    row(
        "detach-device-alias DOMAIN virtio-disk1",
        WORKS,
        "The key of a disk is removed by the agent, or at the end of the domain.",
        before=("virsh attach-disk DOMAIN PLAIN vdb",),
        after=("virsh reset DOMAIN", "gone vdb"),
    ),
    row("update-device DOMAIN DISK.xml", WORKS, "The same source with other options."),
    row("change-media DOMAIN vda PLAIN --update", refused("No disk found"), "A disk is no drive."),
)

_JOBS = (
    row("blockjob DOMAIN vda --info", works("No current block job")),
    row("blockcommit DOMAIN vda", refused("could not find base image"), "Without an overlay."),
    row(
        "blockcopy DOMAIN vda --dest FILE --transient-job --wait",
        plaintext(event="plaintext-link", kind="mirror"),
        "`disk copy` makes an encrypted copy.",
        after=("virsh blockjob DOMAIN vda --abort", "rm FILE"),
    ),
    row("snapshot-create DOMAIN", refused("require all disks to be selected"), "Use `snapshot create`."),
    row("snapshot-create-as DOMAIN s", refused("require all disks to be selected"), "Likewise."),
    row("snapshot-create-as DOMAIN s --disk-only", refused("nothing selected for snapshot"), "Likewise."),
    row(
        "snapshot-create-as DOMAIN s --memspec file=FILE",
        plaintext(tells=(_SHOWN, "memory")),
        "The guest's memory, without the disk.",
    ),
    row("snapshot-list DOMAIN", works(" s ")),
    row("snapshot-info DOMAIN s", works("external")),
    row("snapshot-dumpxml DOMAIN s", works("<domainsnapshot>")),
    row("snapshot-current DOMAIN --name", works("s")),
    row("snapshot-edit DOMAIN s", WORKS),
    row("snapshot-parent DOMAIN s", refused("has no parent")),
    row(
        "snapshot-revert DOMAIN s",
        refused("revert to external snapshot not supported yet"),
        "Use `snapshot restore`.",
    ),
    row("snapshot-delete DOMAIN s --metadata", WORKS, "The file with the memory stays.", after=("rm FILE",)),
    row(_SNAPSHOT_OF_DISK, plaintext(event="plaintext-link", kind="overlay"), "Use `snapshot create`."),
    row("snapshot-delete DOMAIN s", WORKS, "The overlay is committed back and removed, not overwritten."),
    row(
        "blockcommit DOMAIN vda --active --pivot",
        WORKS,
        "Overwrite the overlay, which stays.",
        before=(f"virsh {_SNAPSHOT_OF_DISK}",),
        after=("virsh snapshot-delete DOMAIN s --metadata", "rm FILE"),
    ),
    row(
        "blockpull DOMAIN vda --wait",
        plaintext(event="plaintext-link", kind="image in its place"),
        "Moves the data into the overlay. Without an overlay, nothing moves.",
        before=(f"virsh {_SNAPSHOT_OF_DISK}",),
        after=(
            "virsh snapshot-delete DOMAIN s --metadata",
            "virsh destroy DOMAIN",
            "virsh define DOMAIN.xml",
            "virsh start DOMAIN",
            "rm FILE",
        ),
    ),
    row(
        "checkpoint-create DOMAIN CHECKPOINT.xml",
        WORKS,
        after=("virsh checkpoint-delete DOMAIN first",),
        raw=refused("checkpoint for disk vda unsupported for storage type raw"),
    ),
    row(
        "checkpoint-create-as DOMAIN c",
        WORKS,
        raw=refused("checkpoint for disk vda unsupported for storage type raw"),
    ),
    row("checkpoint-list DOMAIN", WORKS),
    row("checkpoint-dumpxml DOMAIN c", works("<domaincheckpoint>"), raw=refused("no domain checkpoint")),
    row("checkpoint-info DOMAIN c", WORKS, raw=refused("no domain checkpoint")),
    row("checkpoint-parent DOMAIN c", refused("has no parent"), raw=refused("no domain checkpoint")),
    row("checkpoint-edit DOMAIN c", WORKS, raw=refused("no domain checkpoint")),
    row("checkpoint-delete DOMAIN c", WORKS, raw=refused("no domain checkpoint")),
    row(
        "backup-begin DOMAIN",
        plaintext(event="plaintext-beside"),
        "Use `disk backup`.",
        after=("rm IMAGE.*",),
        staged=refused("refusing to generate file name"),
    ),
    row(
        "backup-begin DOMAIN BACKUP.xml",
        plaintext(event="plaintext-link", kind="backup"),
        "A pull backup; its NBD export is plaintext, too.",
    ),
    row("backup-dumpxml DOMAIN", works("<domainbackup")),
    row("domjobinfo DOMAIN", works("Job type")),
    row("domjobabort DOMAIN", WORKS),
)

_MEMORY = (
    row(
        "dump DOMAIN FILE --memory-only",
        plaintext(),
        after=("rm FILE",),
        at_host=plaintext(event="memory-dumped"),
    ),
    row("dump DOMAIN FILE", plaintext(), after=("rm FILE",), at_host=plaintext(event="memory-dumped")),
    row("save DOMAIN FILE", plaintext(), state="shut off", at_host=plaintext(event="memory-saved")),
    row("save-image-dumpxml FILE", works("<domain"), state="shut off"),
    row("save-image-edit FILE", WORKS, state="shut off"),
    row("save-image-define FILE DOMAIN.xml", WORKS, state="shut off"),
    row("restore FILE", WORKS, "The hook provides the keys.", after=("rm FILE",)),
    row(
        "managedsave DOMAIN",
        plaintext(tells=(_SHOWN, "managed-save")),
        "`vm save` encrypts.",
        state="shut off",
        at_host=plaintext(event="memory-saved"),
    ),
    row("managedsave-dumpxml DOMAIN", works("<domain"), state="shut off"),
    row("managedsave-edit DOMAIN", WORKS, state="shut off"),
    row("managedsave-define DOMAIN DOMAIN.xml", WORKS, state="shut off"),
    row("start DOMAIN", WORKS, "Also from a managed save, whose file is removed, not overwritten."),
    row(
        "managedsave-remove DOMAIN",
        WORKS,
        "Removes the file, does not overwrite the file.",
        state="shut off",
        before=("virsh managedsave DOMAIN",),
        after=("virsh start DOMAIN",),
    ),
)

_KEYS = (
    row("secret-list", works("virt-sse:")),
    row("secret-dumpxml SECRET", works("private='yes'")),
    row("secret-get-value SECRET", refused("secret is private"), "No client of libvirt reads a DEK."),
    row("secret-define SECRET.xml", refused("private"), "No redefinition makes the DEK readable."),
    row(
        "secret-set-value SECRET eA==",
        WORKS,
        "The next start sets the DEK again; the running guest does not notice.",
    ),
    row("secret-undefine SECRET", works(event="secrets-restored"), "The agent gives libvirt the DEK again."),
    row(
        "dumpxml DOMAIN --security-info",
        works("<encryption"),
        "The definition names the secret, and has no key.",
    ),
    row(
        "qemu-monitor-command DOMAIN --hmp info\\ block",
        works("virtio-disk0"),
        "The monitor can read all data of the guest; libvirt marks the domain as tainted.",
    ),
    row("qemu-agent-command DOMAIN {}", _NO_AGENT),
)

_END = (
    row(
        "snapshot-create-as DOMAIN s --diskspec vda,snapshot=internal",
        harm("Unable to read from monitor", state="shut off"),
        "**QEMU 7.2 aborts**; the disk is intact.",
        after=("virt-sse disk check DISK", "virsh start DOMAIN"),
        raw=refused("internal snapshot for disk vda unsupported for storage type raw"),
    ),
    row(
        "destroy DOMAIN",
        WORKS,
        "Keys, processes and the temporary disk are removed.",
        state="shut off",
        before=("inside virt-sse vm verify DOMAIN",),
        after=("virt-sse disk check DISK",),
    ),
)

_OFF = (
    row("edit DOMAIN", WORKS, "The next start checks the definition."),
    row(
        "define DOMAIN.xml",
        WORKS,
        "An older definition may contradict the store, see "
        "[encryption at host](../guides/operator.md#encryption-at-host).",
    ),
    row("dumpxml DOMAIN --inactive", works("<disk")),
    row(
        "domxml-to-native qemu-argv --domain DOMAIN",
        refused("Secret not found"),
        "Of a running domain: the command line, with keys that only its QEMU can decrypt.",
    ),
    row(
        "domrename DOMAIN NEW",
        WORKS,
        "The audit log has the name at the time of use.",
        state="gone",
        after=("virsh domrename NEW DOMAIN",),
    ),
    row("blockresize DOMAIN vda 4M", refused("domain is not running"), "`disk resize` works."),
    row(
        _SNAPSHOT_OF_DISK,
        plaintext(tells=("virt-sse vm verify DOMAIN", "is not encrypted")),
        after=("virsh snapshot-delete DOMAIN s --metadata", "virsh define DOMAIN.xml", "rm FILE"),
        staged=refused("external inactive snapshots are not supported"),
    ),
    row("create DOMAIN.xml", WORKS, state="running", after=("virsh destroy DOMAIN",)),
    row("pool-refresh POOL", WORKS),
    row("vol-dumpxml VOLUME POOL", works("<encryption format='luks'")),
    row("vol-info VOLUME POOL", works("Capacity")),
    row("vol-download VOLUME FILE POOL", WORKS, "Ciphertext.", after=("rm FILE",)),
    row("vol-clone VOLUME clone POOL", _NO_SECRET, "`disk copy` makes a copy under keys of its own."),
    row("vol-create-from POOL VOLUME.xml VOLUME --inputpool POOL", _NO_SECRET, "Likewise."),
    row("vol-create POOL VOLUME.xml", WORKS, "A plain volume.", after=("virsh vol-delete created POOL",)),
    row("vol-create-as POOL created 1M", WORKS, "A plain volume.", after=("virsh vol-delete created POOL",)),
    row(
        "vol-resize VOLUME 400M POOL", refused("no secret provided for luks encryption"), "Use `disk resize`."
    ),
    row("vol-upload VOLUME PLAIN POOL", harm(tells=("virt-sse disk check SPAREDISK", "error"))),
    row("vol-wipe VOLUME POOL", harm(tells=("virt-sse disk check SPAREDISK", "error"))),
    row("vol-delete VOLUME POOL", harm(event="image-missing"), "State `missing` in `disk list`."),
    row(
        "pool-delete POOL", refused("is still active"), "Of a stopped pool, only an empty folder is removed."
    ),
    row(
        "undefine DOMAIN",
        WORKS,
        "The disks stay. TPM state goes.",
        state="gone",
        after=("virsh define DOMAIN.xml",),
    ),
    row(
        "undefine DOMAIN --remove-all-storage --nvram",
        harm(event="image-missing"),
        "State `missing` in `disk list`.",
        state="gone",
        staged=works("not managed by libvirt"),
    ),
)

_MIGRATION = "integration/test_migration.py"
_MOVES = {"test_a_guest_takes_its_key_along_while_the_key_is_rotated": _MIGRATION}
_STAYS = {"test_host_caches_and_temporary_disks_do_not_migrate": _MIGRATION}
_HANDED_OVER = {"test_a_double_disk_is_handed_over_while_the_guest_writes": _MIGRATION}
_NOT_CACHED = refused("has a host cache")
_COPIES = {
    "test_the_content_goes_into_a_disk_with_other_keys": "integration/test_copied_storage.py",
    "test_disks_with_storage_processes_are_copied": "integration/test_copied_storage.py",
}

_MIGRATE = (
    row(
        "migrate DOMAIN URI --live",
        WORKS,
        "With shared storage, see [the guide](../guides/many-hosts.md#live-migration). Use TLS.",
        at_host=_NOT_CACHED,
        tests=_MOVES | _HANDED_OVER | _STAYS,
    ),
    row(
        "migrate DOMAIN URI --live --copy-storage-all",
        WORKS,
        "Into disks of `disk receive`, with `--tls`; "
        "see [the guide](../guides/many-hosts.md#without-shared-storage). Images in common are refused.",
        tests=_COPIES | {"test_a_host_without_rights_and_a_copy_of_the_storage_are_refused": _MIGRATION},
    ),
    row(
        "migrate DOMAIN URI --offline",
        WORKS,
        "The definition moves.",
        tests={"test_a_domain_that_is_off_migrates_as_a_definition": _MIGRATION},
    ),
    row(
        "migrate-postcopy DOMAIN",
        WORKS,
        "As without encryption, also `domjobabort`.",
        at_host=_NOT_CACHED,
        tests={"test_post_copy_and_cancel_in_the_middle": _MIGRATION} | _STAYS,
    ),
)

SECTIONS: Mapping[str, tuple[Row, ...]] = {
    "Life of a domain": _LIFE,
    "Disks of a running domain": _DISKS,
    "Copies, snapshots, backups": _JOBS,
    "Memory": _MEMORY,
    "Keys and the monitor": (*_KEYS, *_END),
    "A stopped domain and its volumes": tuple(
        replace(each, state="shut off") if each.state == "running" and each.verb != "create" else each
        for each in _OFF
    ),
    "Migration": _MIGRATE,
}
ROWS = tuple(each for rows in SECTIONS.values() for each in rows)

UNRELATED = frozenset(
    """
allocpages attach-interface blkiotune capabilities cd connect console cpu-baseline cpu-compare cpu-models
cpu-stats detach-interface dom-fd-associate domcapabilities domcontrol domdirtyrate-calc domdisplay
domhostname domid domif-getlink domif-setlink domifaddr domiflist domifstat domiftune dominfo
domlaunchsecinfo dommemstat domname domsetlaunchsecstate domstate domtime domuuid domxml-from-native echo
emulatorpin event exit find-storage-pool-sources find-storage-pool-sources-as freecell freepages
get-user-sshkeys guest-agent-timeout guestinfo guestvcpus help hostname hypervisor-cpu-baseline
hypervisor-cpu-compare iface-begin iface-bridge iface-commit iface-define iface-destroy iface-dumpxml
iface-edit iface-list iface-mac iface-name iface-rollback iface-start iface-unbridge iface-undefine
inject-nmi iothreadadd iothreaddel iothreadinfo iothreadpin iothreadset list lxc-enter-namespace maxvcpus
memtune migrate-compcache migrate-getmaxdowntime migrate-getspeed migrate-setmaxdowntime migrate-setspeed
net-autostart net-create net-define net-destroy net-dhcp-leases net-dumpxml net-edit net-event net-info
net-list net-name net-port-create net-port-delete net-port-dumpxml net-port-list net-start net-undefine
net-update net-uuid node-memory-tune nodecpumap nodecpustats nodedev-autostart nodedev-create nodedev-define
nodedev-destroy nodedev-detach nodedev-dumpxml nodedev-event nodedev-info nodedev-list nodedev-reattach
nodedev-reset nodedev-start nodedev-undefine nodeinfo nodememstats nodesevinfo nodesuspend numatune
nwfilter-binding-create nwfilter-binding-delete nwfilter-binding-dumpxml nwfilter-binding-list
nwfilter-define nwfilter-dumpxml nwfilter-edit nwfilter-list nwfilter-undefine perf pool-autostart
pool-build pool-capabilities pool-create pool-create-as pool-define pool-define-as pool-destroy pool-dumpxml
pool-edit pool-event pool-info pool-list pool-name pool-start pool-undefine pool-uuid pwd qemu-attach
qemu-monitor-event quit schedinfo screenshot secret-event send-key send-process-signal set-user-password
set-user-sshkeys setmaxmem setmem setvcpu setvcpus sysinfo ttyconsole update-memory-device uri vcpucount
vcpuinfo vcpupin version vncdisplay vol-key vol-list vol-name vol-path vol-pool
""".split()  # noqa: SIM905 -- a list of words is easier to read and to sort
)
"""Commands that neither read nor write a disk's data, keys, definition or place."""
