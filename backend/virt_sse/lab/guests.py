"""Guests on a lab host: their domain XML, and a class to drive a guest."""

from __future__ import annotations

import base64
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from virt_sse.errors import LabError
from virt_sse.lab import cache
from virt_sse.lab.acceleration import Acceleration, DomainType
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import LinuxMicro

if TYPE_CHECKING:
    import libvirt

_UUID_NAMESPACE = uuid.UUID("5e5e1ab0-0000-4000-8000-000000000000")

_COMMAND_LINE = "console=ttyS0 quiet edd=off cryptomgr.notests random.trust_cpu=on sse.script="
_COMMAND_LINE_LIMIT = 2047
"""Linux on x86: ``COMMAND_LINE_SIZE`` without its zero byte."""

AGENT_CHANNEL = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
"""The channel of QEMU's guest agent, ``/dev/vport1p1`` or ``/dev/vport0p1`` in the guest."""

_POLL = 0.02

# An emulated qemu64 has no RDRAND, and mke2fs would wait a second for random numbers.
_EMULATED_CPU = "<cpu><model>qemu64</model><feature policy='require' name='rdrand'/></cpu>"
# With QEMU's default of a gigabyte, a reboot spends seconds on discarding translated code.
_EMULATED_FEATURES = "<tcg><tb-cache unit='MiB'>16</tb-cache></tcg>"


def disk_xml(path: Path, *, target: str = "vda", image_format: str = "raw") -> str:
    """A ``<disk>`` element for an unencrypted image file on the virtio bus."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type={quoteattr(image_format)}/>"
        f"<source file={quoteattr(str(path))}/><target dev={quoteattr(target)} bus='virtio'/></disk>"
    )


def domain_xml(
    name: str,
    *,
    domain_type: DomainType,
    disks: Sequence[str],
    serial_log: Path,
    boot: LinuxMicro | None = None,
    script: str = "",
    memory_mib: int = 96,
    devices: Sequence[str] = (),
) -> str:
    """The XML of a domain with the fewest and fastest devices; its UUID is derived from its name.

    :param disks: complete ``<disk>`` elements.
    :param serial_log: file for the output of the guest's first serial port; each start truncates the file.
    :param boot: the Linux to run *script*; by default, the BIOS boots the first disk and sees all disks.
    :param devices: further elements of ``<devices>``.
    :raise LabError: When *script* is too long for the kernel's command line.
    """
    cpu, features = (_EMULATED_CPU, _EMULATED_FEATURES) if domain_type == "qemu" else ("", "")
    return f"""\
<domain type='{domain_type}'>
  <name>{escape(name)}</name>
  <uuid>{uuid.uuid5(_UUID_NAMESPACE, name)}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{_linux_xml(boot, script) if boot else ""}</os>
  <features><acpi/>{features}</features>
  {cpu}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {"".join([*(disks if boot else _bootable(disks)), *devices])}
    <serial type='file'><source path={quoteattr(str(serial_log))}/><target port='0'/></serial>
    <controller type='usb' model='none'/>
    <video><model type='none'/></video>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def _bootable(disks: Sequence[str]) -> list[str]:
    """Add all disks to the boot order: SeaBIOS ignores disks outside."""
    return [
        disk if "<boot " in disk else disk.replace("</disk>", f"<boot order='{order}'/></disk>")
        for order, disk in enumerate(disks, start=1)
    ]


def _linux_xml(boot: LinuxMicro, script: str) -> str:
    command_line = _COMMAND_LINE + base64.b64encode(script.encode()).decode()
    if len(command_line) > _COMMAND_LINE_LIMIT:
        most = (_COMMAND_LINE_LIMIT - len(_COMMAND_LINE)) // 4 * 3
        raise LabError(
            f"script too long: {len(script.encode())} bytes, but the kernel's command line holds {most}"
        )
    return (
        f"<kernel>{escape(str(boot.kernel))}</kernel><initrd>{escape(str(boot.initramfs))}</initrd>"
        f"<cmdline>{escape(command_line)}</cmdline>"
    )


def script_output(serial: str) -> str:
    """The output of a linux-micro guest's script, over all boots of the guest.

    :param serial: output of the guest's serial port.
    :raise LabError: When the script failed or did not end.
    """
    passes = re.split(r"^linux-micro: begin\n", serial, flags=re.MULTILINE)[1:]
    if not passes:
        raise LabError("linux-micro did not start its script")
    output = []
    for said in passes:
        match = re.search(r"linux-micro: exit (\d+)\n", said)
        if match is None:
            raise LabError("the script in linux-micro did not end")
        if match[1] != "0":
            raise LabError(f"the script in linux-micro exited {match[1]}")
        output.append(said[: match.start()])
    return "".join(output)


class Guest:
    """A domain on a lab host. Uses a new connection for each call, and so survives restarts of libvirtd.

    All methods calling libvirt raise ``libvirt.libvirtError`` when libvirt refuses.

    :ivar name: the domain's name.
    :ivar domain_type: ``kvm``, or ``qemu`` for TCG.
    :ivar serial_log: file with the guest's output since its last start.
    """

    def __init__(
        self,
        host: LabHost,
        name: str,
        *,
        acceleration: Acceleration,
        disks: Sequence[str] = (),
        boot: LinuxMicro | None = None,
        devices: Sequence[str] = (),
    ) -> None:
        """Describe a guest; nothing is defined yet.

        :param disks: complete ``<disk>`` elements, see :func:`disk_xml`.
        :param boot: the Linux to boot; by default, the BIOS boots the first disk.
        :param devices: further elements of ``<devices>``, e.g. :data:`AGENT_CHANNEL`.
        """
        self.name = name
        self.serial_log = host.directory / "serial" / f"{name}.log"
        self.serial_log.parent.mkdir(exist_ok=True)
        self._host = host
        self.domain_type: DomainType = acceleration.domain_type
        self._disks = tuple(disks)
        self._devices = tuple(devices)
        self._boot = _staged(host, boot) if boot is not None else None

    def xml(self, script: str = "") -> str:
        """The domain XML; *script* is for Linux guests."""
        return domain_xml(
            self.name,
            domain_type=self.domain_type,
            disks=self._disks,
            serial_log=self.serial_log,
            boot=self._boot,
            script=script,
            devices=self._devices,
        )

    def define(self, script: str = "") -> None:
        """Define the domain, or redefine it."""
        with self._connection() as connection:
            connection.defineXML(self.xml(script))

    def start(self, script: str = "") -> None:
        """Define the domain and start it."""
        with self._connection() as connection:
            connection.defineXML(self.xml(script)).create()

    def destroy(self) -> None:
        """Stop the domain immediately, like a power failure."""
        with self._domain() as domain:
            domain.destroy()

    def undefine(self) -> None:
        with self._domain() as domain:
            domain.undefine()

    def is_active(self) -> bool:
        """Whether the domain is running."""
        with self._domain() as domain:
            return bool(domain.isActive())

    @property
    def serial(self) -> str:
        """The guest's output since its start, with plain newlines."""
        try:
            return self.serial_log.read_bytes().decode(errors="replace").replace("\r", "")
        except FileNotFoundError:
            return ""

    def wait_for(self, text: str, *, timeout: float = 60) -> str:
        """Wait until the guest has printed *text*, and return all its output.

        :raise LabError: When the guest ends, or *timeout* seconds pass, before; a note contains the output.
        """

        def said() -> bool:
            # In this order: after its end, the guest's last output is in the file.
            active = self.is_active()
            if text in self.serial:
                return True
            if not active:
                raise self._error(f"ended without printing {text!r}")
            return False

        self._wait(said, timeout, f"did not print {text!r} within {timeout:g} s")
        return self.serial

    def wait_shutoff(self, *, timeout: float = 60) -> str:
        """Wait until the guest has powered off, and return all its output.

        :raise LabError: When *timeout* seconds pass before; a note contains the output.
        """
        self._wait(lambda: not self.is_active(), timeout, f"did not power off within {timeout:g} s")
        return self.serial

    def run_script(self, script: str, *, timeout: float = 60) -> str:
        """Run *script* in a linux-micro guest, from its boot to its power-off.

        The script is for busybox's ``sh``; the disks are /dev/vda, /dev/vdb and so on. With ``touch /reboot``
        the guest reboots at the script's end and runs the script again.

        :return: the script's output, over all boots.
        :raise LabError: When the script exits with a status other than 0, or does not end within *timeout*
            seconds; a note contains the guest's output.
        """
        self.start(script)
        serial = self.wait_shutoff(timeout=timeout)
        try:
            return script_output(serial)
        except LabError as exc:
            exc.add_note(serial)
            raise

    def _wait(self, condition: Callable[[], bool], timeout: float, complaint: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise self._error(complaint)
            time.sleep(_POLL)

    def _error(self, complaint: str) -> LabError:
        error = LabError(f"guest {self.name} {complaint}")
        error.add_note(self.serial or "the guest printed nothing")
        return error

    @contextmanager
    def _connection(self) -> Iterator[libvirt.virConnect]:
        connection = self._host.connect()
        try:
            yield connection
        finally:
            connection.close()

    @contextmanager
    def _domain(self) -> Iterator[libvirt.virDomain]:
        with self._connection() as connection:
            yield connection.lookupByName(self.name)


def _staged(host: LabHost, boot: LinuxMicro) -> LinuxMicro:
    """Copies in the lab host: QEMU's user cannot enter root's cache, and libvirt changes the owner."""
    folder = host.directory / "boot"
    staged = LinuxMicro(folder / boot.kernel.name, folder / boot.initramfs.name)
    for source, target in ((boot.kernel, staged.kernel), (boot.initramfs, staged.initramfs)):
        if not target.exists():
            cache.replace(target, source.read_bytes())
    return staged
