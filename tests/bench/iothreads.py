"""Four encrypted disks at once in one QEMU process: an iothread for each disk against one thread for all.

The process is a storage daemon without a guest. Block jobs copy to and from the disks, each in the iothread
of its disk, as a guest's requests would be served. fio cannot drive the disks: QEMU 7.2 aborts when a client
leaves an NBD export with an iothread.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from measurement import Measurement, Row, Run, Unit, seconds
from storage_daemon import require_tools
from virt_sse.errors import LabUnavailableError, ToolError
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, unlocking
from virt_sse.qemu.formatting import Volume
from virt_sse.system import acceleration

_DISKS = 4
_MIB = 1 << 20
_ROUNDS = 5


def measure(bench: Run) -> Iterator[Row]:
    """Measure four raw disks in interleaved rounds, with QEMU's own XTS and with the library.

    :raise LabUnavailableError: When a tool is missing, or the machine has one processor.
    """
    require_tools()
    if (os.cpu_count() or 1) < 2:
        raise LabUnavailableError("iothreads gain nothing on one processor")
    size = bench.amount(128, quick=32) * _MIB
    folder = bench.scratch / "iothreads"
    folder.mkdir()
    dek = Dek.generate()
    images = [folder / f"disk{number}.raw" for number in range(_DISKS)]
    for image in images:
        formatting.make(image, DiskFormat.RAW, size, [Volume(AES_256_XTS, dek)])
    environments = {"own": {**os.environ, **acceleration.ALLOCATOR}}
    if acceleration.library():
        environments["library"] = {**os.environ, **acceleration.environment(os.environ)}
    for name, environment in environments.items():
        with contextlib.ExitStack() as stack:
            daemons = [
                stack.enter_context(_Daemon(images, dek, size, environment, with_iothreads=each))
                for each in (True, False)
            ]
            daemons[0].copy(writes=True)  # allocates the blocks of the files
            for load, writes in (("seq-write", True), ("seq-read", False)):
                rounds = [
                    [_DISKS * size / _MIB / daemon.copy(writes=writes) for daemon in daemons]
                    for _ in range(bench.amount(_ROUNDS, quick=1))
                ]
                ours, peer = (
                    Measurement.median(each, Unit.MIB_PER_SECOND) for each in zip(*rounds, strict=True)
                )
                xts = "QEMU's own XTS" if name == "own" else "the library"
                title = f"four raw disks at once, {xts}, {load}"
                yield Row(f"iothreads/{name}/{load}", title, ours, peer, "one thread for all disks")


class _Daemon:
    """A storage daemon with a LUKS node and a node without storage for each image.

    :raise ToolError: When the daemon ends, or refuses a command.
    """

    def __init__(
        self,
        images: Sequence[Path],
        dek: Dek,
        size: int,
        environment: Mapping[str, str],
        *,
        with_iothreads: bool,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._count = self._ended = 0
        secrets, descriptors = self._stack.enter_context(unlocking.secrets_for([dek]))
        arguments = [*secrets, "--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"]
        for number, image in enumerate(images):
            file = f"file.driver=file,file.filename={image},file.locking=off"
            arguments += ["--object", f"iothread,id=thread{number}"]
            arguments += ["--blockdev", f"node-name=disk{number},driver=luks,key-secret=dek0,{file}"]
            arguments += ["--blockdev", f"node-name=null{number},driver=null-co,size={size},read-zeroes=off"]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "qemu-storage-daemon", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a warning for each job
            pass_fds=descriptors,
            env=environment,
        )
        self._stack.callback(self._process.wait)
        self._stack.callback(self._process.kill)
        self._ask("qmp_capabilities")
        for number in range(len(images)) if with_iothreads else ():
            for node in (f"disk{number}", f"null{number}"):
                self._ask("x-blockdev-set-iothread", {"node-name": node, "iothread": f"thread{number}"})

    def __enter__(self) -> _Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copy(self, *, writes: bool) -> float:
        """Write, or read, all disks at once: the duration in seconds."""
        return seconds(lambda: self._copy("null", "disk") if writes else self._copy("disk", "null"))

    def _copy(self, source: str, target: str) -> None:
        for number in range(_DISKS):
            self._count += 1
            nodes = {"device": f"{source}{number}", "target": f"{target}{number}"}
            self._ask("blockdev-backup", {"job-id": f"job{self._count}", "sync": "full", **nodes})
        while self._ended < self._count:
            self._read()

    def _ask(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        stdin: IO[bytes] | None = self._process.stdin
        assert stdin
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        while "return" not in (answer := self._read()):
            if "error" in answer:
                raise ToolError(f"qemu-storage-daemon: {answer['error']['desc']}")

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise ToolError("qemu-storage-daemon has ended")
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "BLOCK_JOB_COMPLETED":
            if error := message["data"].get("error"):
                raise ToolError(f"qemu-storage-daemon: {error}")
            self._ended += 1
        return message
