"""A private libvirt host."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

from virt_sse.errors import LabError, LabUnavailableError
from virt_sse.lab import cache, directories, supervisor
from virt_sse.lab.limits import kill_with_children
from virt_sse.lab.requirements import SYSTEM_PATH, require, require_root

if TYPE_CHECKING:
    import libvirt

QEMU_USER, QEMU_GROUP = "libvirt-qemu", "kvm"
"""User and group of QEMU processes in Debian's and Ubuntu's libvirt."""

_DRIVERS = ("qemu", "secret", "storage")
"""libvirt's drivers loaded by a lab host. The network drivers would use firewall, D-Bus and dnsmasq."""

_CAPABILITIES = "var/cache/libvirt/qemu/capabilities"
_RUN_SECONDS = 600.0
_DAEMON_SECONDS = 120.0
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 30.0
_LIBVIRTD_PID = "run/libvirt/libvirtd.pid"

_LIBVIRTD_CONF = """\
host_uuid = "{host_uuid}"
listen_tls = 0
listen_tcp = 0
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""

# AppArmor and huge pages belong to the machine: libvirt would leave profiles and folders there.
_QEMU_CONF = """\
security_driver = "none"
hugetlbfs_mount = []
"""


class LabHost:
    """A private libvirt host: libvirtd and virtlogd in their own mount, UTS and PID namespaces.

    The host's directory serves as ``VIRT_SSE_ROOT``: inside the host, its ``etc/libvirt``,
    ``var/lib/libvirt``, ``var/log/libvirt``, ``var/cache/libvirt`` and ``run`` are mounted over the
    machine's. Nothing is written elsewhere. All processes of the host end with the process which started the
    host, even after ``kill -9``. The directory is removed by :meth:`stop`, or after a kill by the next start
    of a lab host.

    As on any host, libvirtd searches for hooks only at its start. ``etc/libvirt/hooks/qemu.d`` exists but is
    empty: the first hook requires :meth:`restart_libvirtd`, further hooks do not. libvirtd gives PATH and
    HOME to a hook, but not ``VIRT_SSE_ROOT``.
    """

    def __init__(self, name: str | None = None, *, base: Path = Path("/tmp")) -> None:  # noqa: S108
        """Describe a host; nothing happens before :meth:`start`.

        :param name: by default random.
        :param base: parent of the host's directory; QEMU's user needs access.
        """
        self.name = name if name is not None else f"lab-{uuid.uuid4().hex[:8]}"
        self._base = base
        self._lab_directory: directories.LabDirectory | None = None
        self._process: subprocess.Popen[str] | None = None

    def __repr__(self) -> str:
        return f"LabHost({self.name!r}, {'running' if self._process else 'stopped'})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def directory(self) -> Path:
        """The directory with all files of the host.

        :raise LabError: When the host is not running.
        """
        if self._lab_directory is None:
            raise LabError(f"lab host {self.name} is not running")
        return self._lab_directory.path

    @property
    def root(self) -> Path:
        """The directory in its role as ``VIRT_SSE_ROOT``."""
        return self.directory

    @property
    def images(self) -> Path:
        """Folder for disk images, writable by QEMU's user."""
        return self.directory / "images"

    @property
    def uri(self) -> str:
        """The libvirt URI of the host, usable on this machine."""
        return f"qemu+unix:///system?socket={self.directory}/run/libvirt/libvirt-sock"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with variables to direct virt-sse and ``virsh`` to the lab host."""
        return os.environ | {"VIRT_SSE_ROOT": str(self.root), "LIBVIRT_DEFAULT_URI": self.uri}

    def start(self) -> None:
        """Remove remains of killed runs, start the host, and wait until libvirtd answers.

        :raise LabUnavailableError: When the machine lacks a tool or a right; the message names the tool or
            right.
        :raise LabError: When a daemon does not start; a note contains the end of its log.
        """
        require_root()
        require(
            "libvirtd", "virtlogd", "virsh", "qemu-system-x86_64", "unshare", "nsenter", "mount", "umount"
        )
        if self._process is not None:
            raise LabError(f"lab host {self.name} is already running")
        directories.sweep(self._base)
        self._lab_directory = directories.create(self._base)
        try:
            self._lay_out()
            self._start_supervisor(self._lab_directory)
            self.run(["virtlogd", "--daemon"], check=True)
            self._start_libvirtd()
        except BaseException as exc:
            for note in self._log_tail():
                exc.add_note(note)
            self.stop()
            raise

    def stop(self) -> None:
        """Kill all processes of the host and remove its directory; does nothing on a stopped host."""
        process, self._process = self._process, None
        if process is not None:
            try:
                process.communicate("stop", timeout=_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()  # unshare's --kill-child kills the namespace, too
                process.communicate()
        directory, self._lab_directory = self._lab_directory, None
        if directory is not None:
            directory.remove()

    def kill(self) -> None:
        """Kill all processes of the host at once, as a loss of power does; :meth:`stop` removes the files."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # unshare's --kill-child kills the namespace, too
            process.communicate()

    def connect(self) -> libvirt.virConnect:
        """A new connection to the host's libvirtd; the caller closes it.

        :raise libvirt.libvirtError: When libvirtd does not answer.
        """
        import libvirt

        return libvirt.open(self.uri)

    def restart_libvirtd(self, *, seconds: float = _DAEMON_SECONDS) -> None:
        """Restart libvirtd, and wait until libvirtd has reconnected to its guests. Open connections break.

        :param seconds: time limit of each step.
        :raise LabError: When libvirtd does not end, start or answer in time, or not reconnect to a guest.
        """
        with contextlib.suppress(FileNotFoundError):  # libvirtd has ended
            pid = (self.directory / _LIBVIRTD_PID).read_text().strip()
            wait = 'kill -TERM "$1"; while kill -0 "$1" 2>&-; do sleep 0.02; done'
            self._execute(["sh", "-c", wait, "sh", pid], "the end of libvirtd", seconds=seconds)
        self._start_libvirtd()
        running = self.run(["virsh", "list", "--uuid"], check=True, seconds=seconds).stdout
        for domain in running.split():
            # Queries QEMU, so waits for the reconnection and the hook; 'domstate' would answer at once.
            what = f"libvirtd's reconnection to domain {domain}"
            self._execute(["virsh", "dommemstat", domain], what, seconds=seconds)

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """The argument vector to run *argv* inside the host's namespaces.

        Killing the resulting process does not kill *argv*, because *argv* runs in the host's PID namespace.
        """
        if self._process is None:
            raise LabError(f"lab host {self.name} is not running")
        namespaces = f"/proc/{self._process.pid}/ns"
        return [
            "nsenter",
            f"--mount={namespaces}/mnt",
            f"--uts={namespaces}/uts",
            f"--pid={namespaces}/pid_for_children",
            "--",
            *map(str, argv),
        ]

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        input: str | None = None,  # noqa: A002 -- subprocess.run's word
        env: Mapping[str, str] | None = None,
        check: bool = False,
        seconds: float = _RUN_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the host and wait for it.

        :param input: standard input; empty by default.
        :param env: variables in addition to :attr:`environment`.
        :param check: whether a status other than 0 is an error.
        :param seconds: time limit; the command is killed then.
        :raise LabError: When *check* is set and the command fails, with the last line of output; or when the
            command does not end in time.
        """
        what = f"the end of '{' '.join(map(str, argv))}'"
        result = self._execute(argv, what, seconds=seconds, input=input or "", env=env)
        if check and result.returncode != 0:
            said = (result.stderr or result.stdout).strip().splitlines() or ["nothing said"]
            raise LabError(f"{argv[0]} on lab host {self.name} exited {result.returncode}: {said[-1]}")
        return result

    def virsh(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``virsh`` on the host, as :meth:`run` does; by default, a failure is an error."""
        return self.run(["virsh", *arguments], check=check)

    def _execute(
        self,
        argv: Sequence[str | Path],
        what: str,
        *,
        seconds: float,
        input: str = "",  # noqa: A002 -- subprocess.run's word
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the host; the error after the time limit names *what* the lab waited for."""
        process = subprocess.Popen(
            self.command(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment
            | {"PATH": f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"}
            | dict(env or {}),
        )
        try:
            output, errors = process.communicate(input, timeout=seconds)
        except BaseException as exc:
            kill_with_children(process)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a daemon may hold the pipes
                process.communicate(timeout=_STOP_TIMEOUT)
            if not isinstance(exc, subprocess.TimeoutExpired):
                raise
            raise LabError(f"lab host {self.name} waited {seconds:g} s in vain for {what}") from None
        return subprocess.CompletedProcess(argv, process.returncode, output, errors)

    def _lay_out(self) -> None:
        for name in (*supervisor.BINDS, "dev", "drivers", "images", "run/lock", "etc/libvirt/hooks/qemu.d"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        try:
            shutil.chown(self.images, QEMU_USER, QEMU_GROUP)
        except LookupError as exc:
            raise LabUnavailableError(
                f"the lab needs user {QEMU_USER} and group {QEMU_GROUP}",
                hint="apt-get install libvirt-daemon-system",
            ) from exc
        _like(Path("/") / supervisor.TPM_AUTHORITY, self.directory / supervisor.TPM_AUTHORITY)
        etc = self.directory / "etc/libvirt"
        (etc / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(host_uuid=uuid.uuid4()))
        (etc / "qemu.conf").write_text(_QEMU_CONF)
        for name in _DRIVERS:
            for module in Path("/usr/lib").glob(f"*/libvirt/connection-driver/libvirt_driver_{name}.so"):
                (self.directory / "drivers" / module.name).symlink_to(module)
        # Probing QEMU takes libvirt over a second; libvirt detects outdated capabilities by itself.
        for known in cache.cache_directory().glob("capabilities/*.xml"):
            cache.replace(self.directory / _CAPABILITIES / known.name, known.read_bytes())

    def _start_supervisor(self, directory: directories.LabDirectory) -> None:
        """Make the namespaces, and wait until all is mounted.

        The supervisor watches the owner's pidfd, which becomes readable at the owner's end. A parent-death
        signal would already fire at the end of the starting thread, and forks would hold a pipe open.
        """
        owner = os.pidfd_open(os.getpid())
        try:
            process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "--"),
                    *(sys.executable, "-I", "-S", supervisor.__file__),
                    *(str(directory.path), f"{self.name}.test", str(owner)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(owner, directory.lock),
                start_new_session=True,  # Ctrl-C in the terminal must reach only the owner
            )
        finally:
            os.close(owner)
        output = cast("IO[str]", process.stdout)
        poll = select.poll()
        poll.register(output, select.POLLIN)
        if poll.poll(_START_TIMEOUT * 1000) and output.readline() == "ready\n":
            self._process = process
            return
        process.kill()
        _, said = process.communicate()
        last = said.strip().splitlines()[-1] if said.strip() else "no answer"
        error = LabUnavailableError if "Operation not permitted" in said else LabError
        raise error(f"cannot make the namespaces of lab host {self.name}: {last}")

    def _start_libvirtd(self) -> None:
        """Start libvirtd and wait for an answer; then all its drivers are loaded."""
        drivers = self.directory / "drivers"
        env = {"LIBVIRT_DRIVER_DIR": str(drivers)} if any(drivers.iterdir()) else {}
        daemon = ["libvirtd", "--daemon", "--pid-file", f"/{_LIBVIRTD_PID}"]
        self.run(daemon, env=env, check=True, seconds=_DAEMON_SECONDS)
        self.run(["virsh", "version"], check=True, seconds=_DAEMON_SECONDS)
        for learnt in (self.directory / _CAPABILITIES).glob("*.xml"):
            known = cache.cache_directory() / "capabilities" / learnt.name
            content = learnt.read_bytes()
            if not known.exists() or known.read_bytes() != content:
                cache.replace(known, content)

    def _log_tail(self) -> list[str]:
        log = self.directory / "var/log/libvirt/libvirtd.log"
        try:
            lines = log.read_text(errors="replace").splitlines()[-20:]
        except FileNotFoundError:
            return []
        return ["libvirtd's log ends:", *lines] if lines else []


def _like(original: Path, folder: Path) -> None:
    """Make an empty *folder* with the owner and permissions of *original*, if *original* exists."""
    if original.exists():
        folder.mkdir(parents=True)
        status = original.stat()
        os.chown(folder, status.st_uid, status.st_gid)
        folder.chmod(status.st_mode & 0o7777)
