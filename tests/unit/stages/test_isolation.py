"""A stage process that is taken over reaches no other disk, no network, and starts no process."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest

from support import images
from support.processes import open_files
from support.stage_disks import DOMAIN, StagedDisk, kill
from support.stage_programs import status, wait_end
from support.waiting import wait_until
from virt_sse.config import Config
from virt_sse.errors import StageError
from virt_sse.libvirt.users import User
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.layers import HostCaching
from virt_sse.stages import Stages, launch, seccomp
from virt_sse.stages.launch import landlock_version
from virt_sse.stages.locked_process import Command, LockedProcess
from virt_sse.system import acceleration
from virt_sse.verification.stage_evidence import StageEvidence
from virt_sse.verification.verdict import DiskVerdict

NONE, READ_ONLY, _ = HostCaching
PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "-c"]
Make = Callable[..., StagedDisk]


@pytest.fixture
def config(folder: Path, as_root: None) -> Config:
    images.require("qemu-storage-daemon", "qemu-io", "qemu-img", "cryptsetup", "nbdkit")
    return Config.load(folder)


@pytest.fixture
def make(config: Config) -> Iterator[Make]:
    """Makes disks, and ends their stages."""
    made: list[StagedDisk] = []

    def make_one(
        image_format: str = "raw",
        *,
        double: bool = True,
        caching: HostCaching = NONE,
        config: Config = config,
        is_cache_above: bool = False,
    ) -> StagedDisk:
        above = is_cache_above
        made.append(StagedDisk(config, image_format, double=double, caching=caching, is_cache_above=above))
        return made[-1]

    yield make_one
    for disk in made:
        disk.stop()


def pid_of(disk: StagedDisk, name: str) -> int:
    pid = disk.process(name).pid()
    assert pid
    return pid


def users(disk: StagedDisk) -> dict[str, User]:
    record = disk.stages.record(disk.disk.id)
    assert record
    return dict(record.users)


def has_processes(uid: int) -> bool:
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def owner(disk: StagedDisk) -> int:
    return disk.disk.path.stat().st_uid


def problems(disk: StagedDisk) -> list[str]:
    verdict = DiskVerdict("vda")
    StageEvidence(disk.stages).check(verdict, disk.disk, disk.plan, DOMAIN)
    return verdict.problems


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_storage_daemon_encrypts_with_the_xts_library(config: Config, image_format: str) -> None:
    """As its own user, under the filter, Landlock and the memory limit; read again without the library."""
    library = acceleration.library()
    if library is None:
        pytest.skip(f"the XTS library: {acceleration.obstacle()}")
    disk = StagedDisk(config, image_format, infrastructure_cipher=AES_256_XTS)
    try:
        disk.start()
        assert str(library) in Path(f"/proc/{pid_of(disk, 'storage')}/maps").read_text()
        assert "wrote 1048576/1048576" in disk.guest_io("write -P 0x5a 0 1M")
        assert problems(disk) == []
    finally:
        disk.stop()
    said = disk.image_io("read -P 0x5a 0 1M")
    assert "read 1048576/1048576" in said
    assert "failed" not in said


REACH = """
import ctypes, json, os, socket, sys
reached = []
def attempt(name, action):
    try: action()
    except OSError: return
    reached.append(name)
def attach(pid):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(0x4206, pid, 0, 0) != 0: raise OSError  # PTRACE_SEIZE
files, sockets, pids = json.loads(sys.argv[1])
for path in files:
    attempt(path, lambda: os.close(os.open(path, os.O_RDONLY)))
for path in sockets:
    attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path))
for pid in pids:
    attempt(f"memory of {pid}", lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)))
    attempt(f"ptrace of {pid}", lambda: attach(pid))
    attempt(f"files of {pid}", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt(f"signal to {pid}", lambda: os.kill(pid, 0))
print(json.dumps(reached))
"""


def reached(user: User, disk: StagedDisk, names: list[str]) -> list[str]:
    """The parts of *disk* and its processes *names* that a program of *user* can reach."""
    pids = [pid_of(disk, name) for name in names]
    files = [str(disk.disk.path)]
    files += [f"/proc/{pid}/fd/{number}" for pid in pids for number in open_files(pid)]
    sockets = disk.config.socket_directory / str(disk.disk.id)
    asked = [
        files,
        [str(sockets / "guest/nbd"), *(str(sockets / "stages" / name) for name in ("nbd", "cache"))]
        + [str(disk.config.stage_directory / str(disk.disk.id) / "qmp")],
        pids,
    ]
    done = subprocess.run(
        ["setpriv", "--reuid", str(user.uid), "--regid", str(user.gid), "--clear-groups", "--"]
        + [*PYTHON, REACH, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[str] = json.loads(done.stdout)
    return found


def test_a_process_reaches_nothing_of_another_disk(make: Make) -> None:
    one, other = make(caching=READ_ONLY), make(caching=READ_ONLY)
    one.start()
    other.start()
    assert not {user.uid for user in users(one).values()} & {user.uid for user in users(other).values()}
    for name, user in users(one).items():
        assert status(pid_of(one, name))["Uid"].split() == [str(user.uid)] * 4
        assert reached(user, other, ["cache", "storage"]) == []
    itself = reached(users(one)["storage"], one, ["storage"])  # the attempts succeed where they may
    assert {each.partition(" of ")[0] for each in itself} >= {"memory", "ptrace", "files"}


def test_a_storage_daemon_does_not_reach_its_disks_cache_except_by_nbd(make: Make) -> None:
    disk = make(caching=READ_ONLY)
    disk.start()
    inner = disk.config.socket_directory / str(disk.disk.id) / "stages/cache"
    assert reached(users(disk)["storage"], disk, ["cache"]) == [str(inner)]
    assert reached(users(disk)["cache"], disk, ["storage"]) == [str(disk.disk.path)]


def test_an_image_belongs_to_its_owner_again_once_a_storage_daemon_has_opened_the_image(make: Make) -> None:
    disk = make("qcow2")
    os.chown(disk.disk.path, 1234, 1235)
    disk.start()
    assert owner(disk) == 1234
    said = disk.guest_io("write -P 0x5a 0 1M", "flush", "discard 0 64k", "read -P 0x5a 64k 64k")
    assert "failed" not in said
    kill(disk, "storage")
    assert owner(disk) == 1234
    disk.start()
    disk.stop()
    assert (owner(disk), disk.disk.path.stat().st_gid) == (1234, 1235)


def test_a_daemon_grows_an_image_that_it_no_longer_owns(make: Make) -> None:
    disk = make("raw")
    disk.start()
    disk.stages.grow(disk.disk, 5 << 20, reconnects=True)
    assert disk.disk.path.stat().st_size > 5 << 20
    assert "failed" not in disk.guest_io("write -P 0x5a 4M 1M", "flush", "read -P 0x5a 4M 1M")
    assert owner(disk) == 0


def test_an_image_belongs_to_a_host_cache_while_in_use(make: Make) -> None:
    """nbdkit opens the file for each connection."""
    disk = make(double=False, caching=READ_ONLY)
    disk.start()
    user = users(disk)["cache"]
    assert owner(disk) == user.uid
    os.chown(disk.disk.path, 0, 0)
    assert "can't open" in disk.guest_io("read 0 512")
    os.chown(disk.disk.path, user.uid, user.gid)
    assert "read 512/512" in disk.guest_io("read 0 512")
    disk.stop()
    assert owner(disk) == 0


def test_an_image_that_a_lost_host_has_left_to_a_process_returns_to_root(make: Make, config: Config) -> None:
    disk = make("raw")
    os.chown(disk.disk.path, config.storage_uids[7], config.storage_uids[7])
    disk.start()
    assert owner(disk) == 0
    disk.stop()
    disk.assert_nothing_is_left()


def test_an_image_in_a_folder_closed_to_other_users_is_reported(make: Make, folder: Path) -> None:
    disk = make()
    folder.chmod(0o700)
    with pytest.raises(StageError, match="Permission denied") as failure:
        disk.start()
    assert "chmod o+x" in str(failure.value.hint)
    disk.assert_nothing_is_left()


def test_a_record_from_before_is_managed_on(make: Make, config: Config, user: User) -> None:
    """One user for all processes, the image and the folder of caches; the cache above the daemon."""
    shared = dataclasses.replace(config, storage_user=str(user.uid))
    disk = make(caching=READ_ONLY, config=shared, is_cache_above=True)
    disk.start()
    path = config.stage_directory / str(disk.disk.id) / "stages.json"
    written = json.loads(path.read_bytes())
    del written["users"], written["order"]
    path.write_text(json.dumps(written))
    os.chown(disk.disk.path, user.uid, user.uid)
    disk.stages = Stages(config)
    assert problems(disk) == []
    kill(disk, "cache")
    os.chown(config.cache_directory, user.uid, user.uid)
    config.cache_directory.chmod(0o700)
    disk.stages.restart(disk.disk.id, disk.deks)
    assert status(pid_of(disk, "cache"))["Uid"].split()[0] == str(user.uid)
    assert "failed" not in disk.guest_io("write -P 0x5a 0 64k", "flush")
    record = disk.stages.record(disk.disk.id)
    assert record
    assert record.stages == disk.plan.stages[1:], "the order stays until the domain stops"
    os.chown(disk.disk.path, user.uid, user.uid)
    disk.stages.stop(disk.disk.id)
    disk.assert_nothing_is_left()


def test_a_configured_user_is_shared(make: Make, config: Config, user: User) -> None:
    disk = make(caching=READ_ONLY, config=dataclasses.replace(config, storage_user=str(user.uid)))
    disk.start()
    assert set(users(disk).values()) == {User(user.uid, user.uid)}
    assert problems(disk) == []


def test_concurrent_starts_get_different_users(make: Make, config: Config) -> None:
    crowded = dataclasses.replace(config, storage_uids=range(2_100_003_000, 2_100_003_010))
    disks = [make(caching=READ_ONLY, config=crowded) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(StagedDisk.start, disks))
    found = [user.uid for disk in disks for user in users(disk).values()]
    assert sorted(found) == list(crowded.storage_uids)
    late = make(config=crowded)
    with pytest.raises(StageError, match="too few free user ids in 2100003000-2100003009"):
        late.start()
    late.assert_nothing_is_left()
    first = users(disks[0]).values()
    disks[0].stop()
    wait_until(lambda: not any(has_processes(user.uid) for user in first), "init has reaped the processes")
    late.start()


def test_verification_finds_a_process_with_another_user_or_without_isolation(
    make: Make, config: Config
) -> None:
    disk = make(double=False, caching=READ_ONLY)
    disk.start()
    assert problems(disk) == []
    pid = pid_of(disk, "cache")
    kill(disk, "cache")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the process is gone")
    lock = config.stage_directory / str(disk.disk.id) / "cache.lock"
    script = (
        f"import fcntl; file = open({str(lock)!r}, 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [*PYTHON, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        other.stdout.readline()
        assert {
            f"the host cache has uid [0], not {users(disk)['cache'].uid}",
            "the host cache may gain new privileges",
            "the host cache runs without a seccomp filter",
            "the host cache shares the host's network",
        } <= set(problems(disk))
        other.kill()


@pytest.fixture
def process(folder: Path) -> Iterator[LockedProcess]:
    process = LockedProcess(folder / "storage")
    yield process
    process.stop()


ATTEMPTS = """
import ctypes, errno, os, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "")
attempts = {
    "fork": os.fork,
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "internet": lambda: socket.socket(socket.AF_INET).connect(("127.0.0.1", int(sys.argv[1]))),
    "netlink": lambda: socket.socket(socket.AF_NETLINK),
    "own group": lambda: os.setgid(os.getgid()),
    "chown": lambda: os.chown("/dev/null", -1, -1),
    "namespace": lambda: call(272, 0x10000000),
    "ptrace": lambda: call(101, 0, 0, 0, 0),
    "io_uring": lambda: call(425, 1, 0),
    "bpf": lambda: call(321, 0, 0, 0),
    "keys": lambda: call(250, 0, -3, 1),
}
for name, attempt in attempts.items():
    try: attempt()
    except OSError as error: print(name, errno.errorcode[error.errno])
    else: print(name, "succeeded")
thread = threading.Thread(target=lambda: print("a thread runs"))
thread.start(); thread.join()
socket.socket(socket.AF_UNIX)
print("done")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are x86-64's")
def test_a_process_cannot_start_processes_connect_or_gain_rights(process: LockedProcess, user: User) -> None:
    if not seccomp.is_available():
        pytest.skip("libseccomp.so.2 is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process.start(Command([*PYTHON, ATTEMPTS, str(listener.getsockname()[1])]), user)
        said = wait_end(process)
    names = "fork, spawn, internet, netlink, own group, chown, namespace, ptrace, io_uring, bpf, keys"
    expected = " ".join(f"{name} EPERM" for name in names.split(", "))
    assert said == f"{expected} a thread runs done"


def test_a_process_has_no_network_even_without_a_filter(
    process: LockedProcess, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seccomp, "_LIBRARY", "no-such-library.so")
    seccomp.stage_filter.cache_clear()
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            script = (
                "import errno, socket, sys\n"
                "try: socket.socket(socket.AF_INET).connect(('127.0.0.1', int(sys.argv[1])))\n"
                "except OSError as error: print(errno.errorcode[error.errno])"
            )
            process.start(Command([*PYTHON, script, str(listener.getsockname()[1])]), user)
            assert wait_end(process) == "ENETUNREACH"
    finally:
        seccomp.stage_filter.cache_clear()


FILES = """
import errno, os, sys
own, folder, other, pid = sys.argv[1:4] + [int(sys.argv[4])]
def attempt(name, action):
    try: action()
    except OSError as error: print(name, errno.errorcode[error.errno])
    else: print(name, "ok")
attempt("own", lambda: os.truncate(own, 5))
attempt("new", lambda: os.unlink(os.fspath(open(folder + "/new", "w").name)))
attempt("other", lambda: open(other))
attempt("replace", lambda: os.rename(own, own + ".old"))
attempt("passwd", lambda: open("/etc/passwd"))
attempt("tmp", lambda: open("/tmp/new", "w"))
attempt("memory", lambda: open(f"/proc/{pid}/mem"))
attempt("signal", lambda: os.kill(pid, 0))
"""


def test_a_process_reaches_only_its_own_files_even_of_its_own_user(
    process: LockedProcess, folder: Path, user: User
) -> None:
    if landlock_version(ctypes.CDLL(None)) < 6:
        pytest.skip("the kernel's Landlock is older than version 6")
    place, own, other = folder / "cache", folder / "cache/own", folder / "cache/other"
    place.mkdir()
    inner = place / "folder"
    inner.mkdir()
    for path in (own, other):
        path.touch()
    for path in (place, own, other, inner):
        os.chown(path, user.uid, user.gid)
    with subprocess.Popen(["sleep", "60"], user=user.uid, group=user.gid) as neighbour:
        arguments = [str(own), str(inner), str(other), str(neighbour.pid)]
        process.start(Command([*PYTHON, FILES, *arguments]), user, writable=[own, inner])
        said = wait_end(process)
        neighbour.kill()
    denied = ("other", "replace", "passwd", "tmp", "memory")
    assert said == " ".join(["own ok new ok", *(f"{name} EACCES" for name in denied), "signal EPERM"])
    assert own.stat().st_size == 5


def test_a_kernel_without_landlock_or_with_an_older_version_is_no_hindrance(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    class OlderKernel:
        """The kernel, with an older version of Landlock."""

        prctl = libc.prctl

        def __init__(self, version: int) -> None:
            self._version = version

        def syscall(self, number: int, *arguments: object) -> int:
            is_asked_for_version = number == 444 and arguments[0] is None
            return self._version if is_asked_for_version else int(libc.syscall(number, *arguments))

    found = landlock_version(libc)
    assert launch.landlock(OlderKernel(-1), ["/usr"], [str(folder)]) is None  # type: ignore[arg-type]
    for version in range(1, found + 1):
        ruleset = launch.landlock(OlderKernel(version), ["/usr"], [str(folder)])  # type: ignore[arg-type]
        assert ruleset is not None
        os.close(ruleset)


def test_a_filter_that_ends_processes_for_landlock_is_no_hindrance(
    process: LockedProcess, folder: Path, user: User
) -> None:
    """As in a unit of systemd whose SystemCallFilter= lacks Landlock's calls."""
    if not seccomp.is_available():
        pytest.skip("libseccomp.so.2 is not installed")
    script = (
        "import ctypes\n"
        "library = ctypes.CDLL('libseccomp.so.2')\n"
        "library.seccomp_init.restype = ctypes.c_void_p\n"
        "context = ctypes.c_void_p(library.seccomp_init(0x7fff0000))\n"
        "number = library.seccomp_syscall_resolve_name(b'landlock_create_ruleset')\n"
        "assert library.seccomp_rule_add(context, 0x80000000, number, 0) == 0\n"
        "assert library.seccomp_load(context) == 0\n"
        "from pathlib import Path\n"
        "from virt_sse.libvirt.users import User\n"
        "from virt_sse.stages.locked_process import Command, LockedProcess\n"
        f"process = LockedProcess(Path({str(folder)!r}) / 'storage')\n"
        f"process.start(Command(['sleep', '60']), User({user.uid}, {user.gid}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert process.pid()


def test_the_agents_unit_allows_the_isolation(process: LockedProcess, folder: Path, user: User) -> None:
    unit = resources.files("virt_sse.agent").joinpath("units/virt-sse-agent.service").read_text()
    settings: dict[str, str] = {}
    for line in unit.splitlines():
        if line[:1].isalpha() and "=" in line:
            name, value = line.split("=", 1)
            settings[name] = f"{settings.get(name, '')} {value}".strip()
    assert "net" in settings["RestrictNamespaces"].split()
    assert "landlock_restrict_self" in settings["SystemCallFilter"].split()
    capabilities = settings["CapabilityBoundingSet"].lower().replace("cap_", "+").replace(" ", ",")
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from virt_sse.libvirt.users import User\n"
        "from virt_sse.stages.locked_process import Command, LockedProcess\n"
        f"process = LockedProcess(Path({str(folder)!r}) / 'storage')\n"
        f"process.start(Command(['sleep', '60']), User({user.uid}, {user.gid}))"
    )
    bounded = ["setpriv", "--bounding-set", f"-all,{capabilities}", "--no-new-privs", "--"]
    subprocess.run([*bounded, sys.executable, "-c", script], check=True)
    pid = process.pid()
    assert pid
    assert status(pid)["Uid"].split() == [str(user.uid)] * 4
    assert os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116 -- a symbolic link


def test_a_process_is_limited(process: LockedProcess, user: User) -> None:
    process.start(Command(["sleep", "60"]), user, is_own_user=True)
    pid = process.pid()
    assert pid
    wait_until(lambda: status(pid)["Name"] == "sleep", "the program runs")
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines[1:]}
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max data size"] == [str(4 << 30)] * 2
    assert limits["Max open files"] == ["1024"] * 2
    assert limits["Max processes"] == ["512"] * 2
    assert os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116 -- a symbolic link
