"""Disks with stages, without a store or a key provider; and a guest's end of them."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from support.domain_qemu import as_qemu
from support.waiting import wait_until
from virt_sse.config import Config
from virt_sse.libvirt.secret_name import plain_export
from virt_sse.libvirt.users import User
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import Dek, KeyId, WrappedDek
from virt_sse.model.layers import (
    EncryptionType,
    GuestNode,
    HostCache,
    HostCaching,
    LayerPlan,
    Placement,
    Stage,
    StorageNode,
)
from virt_sse.qemu import formatting, image_file, unlocking
from virt_sse.qemu.formatting import Volume
from virt_sse.qemu.storage_daemon import StorageDaemon
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.stages import Stages
from virt_sse.stages.kinds import STAGE_KINDS, StageKinds
from virt_sse.stages.locked_process import LockedProcess

M = 1 << 20
QEMU = User(64911, 64912)
DOMAIN = uuid.UUID(int=7)


class StagedDisk:
    """A disk of 1 MiB, its image in *config*'s root, with one or two LUKS volumes and perhaps a cache."""

    def __init__(
        self,
        config: Config,
        image_format: str,
        *,
        double: bool = True,
        caching: HostCaching = HostCaching.NONE,
        kinds: StageKinds = STAGE_KINDS,
        infrastructure_cipher: Cipher = AES_256_CBC,
        placement: Placement = Placement.GUEST,
        is_cache_above: bool = False,
    ) -> None:
        """:param is_cache_above: whether the cache is above the storage daemon, as in earlier versions."""
        self.config = config
        self.stages = Stages(config, kinds=kinds)
        self.deks = {"service": Dek.generate()}
        volumes = [Volume(AES_256_XTS, self.deks["service"])]
        below: list[Stage] = []
        if double:
            self.deks["infrastructure"] = Dek.generate()
            volumes.append(Volume(infrastructure_cipher, self.deks["infrastructure"]))
            below.append(StorageNode("infrastructure"))
        if caching is not HostCaching.NONE:
            below.insert(0 if is_cache_above else len(below), HostCache(caching))
        first = StorageNode if placement is Placement.STORAGE else GuestNode
        self.placement = placement
        self.plan = LayerPlan(deks=(), stages=(first("service"), *below))
        disk_id = uuid.uuid4()
        self.disk = Disk(
            id=disk_id,
            name="disk",
            path=config.root / f"{disk_id}.{image_format}",
            format=DiskFormat(image_format),
            size=M,
            state=DiskState.READY,
            encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
            created=datetime.now(UTC),
            generation=1,
            deks=tuple(
                DekEntry(slot, volume.cipher, WrappedDek(b"", "none", KeyId("none", "none", "1")))
                for slot, volume in zip(self.deks, volumes, strict=True)
            ),
            caching=caching,
        )
        self.base: BaseImage | None = None
        formatting.make(self.disk.path, self.disk.format, M, volumes)

    def start(
        self,
        *,
        domain_id: uuid.UUID = DOMAIN,
        deks: dict[str, Dek] | None = None,
        replacing: uuid.UUID | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        self.stages.start(
            self.disk,
            self.plan,
            deks or self.deks,
            domain_id=domain_id,
            domain="web",
            qemu=QEMU,
            replacing=replacing,
            base=self.base,
            is_elsewhere=is_elsewhere,
        )

    def stop(self) -> None:
        self.stages.stop(self.disk.id)

    def process(self, name: str) -> LockedProcess:
        return LockedProcess(self.config.stage_directory / str(self.disk.id) / name)

    def daemon(self) -> StorageDaemon:
        return StorageDaemon(self.config.stage_directory / str(self.disk.id) / "qmp")

    def pids(self) -> list[int]:
        """The process IDs of the running stages."""
        names = [kind.name for kind in self.stages.kinds]
        return [pid for name in names if (pid := self.process(name).pid())]

    @property
    def folders(self) -> list[Path]:
        return [
            self.config.stage_directory / str(self.disk.id),
            self.config.socket_directory / str(self.disk.id),
            self.config.cache_directory / str(self.disk.id),
        ]

    def assert_nothing_is_left(self) -> None:
        assert self.pids() == []
        assert [path for path in self.folders if path.exists()] == []
        assert (self.disk.path.stat().st_uid, self.disk.path.stat().st_gid) == (0, 0)
        image_file.refuse_if_open(self.disk.path)

    def guest_io(self, *commands: str) -> str:
        """The output of qemu-io at the socket for a guest's QEMU, with the DEK for QEMU, if any."""
        socket = self.stages.guest_socket(self.disk.id)
        node = f"file.driver=nbd,file.server.type=unix,file.server.path={socket}"
        qemu = as_qemu(self.config.qemu_pid_file("web"))
        if self.placement is Placement.STORAGE:
            node += f",file.export={plain_export(self.disk.id)}"
            return self._io(commands, [], f"driver=raw,{node}", qemu)
        node += f",file.export={self.disk.id}"
        return self._io(commands, [self.deks["service"]], f"{self._driver('')},{node}", qemu)

    def image_io(self, *commands: str) -> str:
        """The output of qemu-io with all DEKs, on the image."""
        deks = list(self.deks.values())
        return self._io(commands, deks, unlocking.image_options(self.disk.path, self.disk.format, len(deks)))

    def _driver(self, prefix: str) -> str:
        return (
            f"{prefix}driver={self.disk.format.qemu_driver},{prefix}{self.disk.format.qemu_key_secret}=dek0"
        )

    @staticmethod
    def _io(commands: Sequence[str], deks: Sequence[Dek], options: str, within: Sequence[str] = ()) -> str:
        arguments = [part for command in commands for part in ("-c", command)]
        with unlocking.secrets_for(deks) as (secrets, descriptors):
            done = subprocess.run(
                [*within, "qemu-io", *secrets, *arguments, "--image-opts", options],
                pass_fds=descriptors,
                capture_output=True,
                text=True,
                check=False,
            )
        return done.stdout + done.stderr


def kill(disk: StagedDisk, name: str) -> None:
    """Kill one of the disk's processes, and wait for its end."""
    pid = disk.process(name).pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: disk.process(name).pid() is None, f"the {name} process has ended")
