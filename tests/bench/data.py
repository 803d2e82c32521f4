"""The data path over an NBD socket: each configuration against a plain disk of the same format, by fio."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from configurations import CONFIGURATIONS, PLAIN, QCOW2, RAW, Configuration, DiskMaker, supports_direct
from hosts import private_backend
from measurement import Measurement, Row, Run, Target, Unit
from storage_daemon import Export, Load, Throughput, drive, require_tools
from virt_sse.lab.requirements import require

_MIB = 1 << 20
_FILL = Load("fill", "write", _MIB)
_LOADS = {
    "seq-write": Load("sequential write, 1 MiB", "write", _MIB),
    "seq-read": Load("sequential read, 1 MiB", "read", _MIB),
    "rand-write": Load("random write, 4 KiB", "randwrite", 4096),
    "rand-read": Load("random read, 4 KiB", "randread", 4096),
    "rand-write-1": Load("random write, 4 KiB, depth 1", "randwrite", 4096, depth=1),
    "rand-read-1": Load("random read, 4 KiB, depth 1", "randread", 4096, depth=1),
}
_QUICK = ({"plain-raw", "single-raw", "double-raw", "double-read-only-raw"}, {"seq-write", "rand-write"})
_DISKS_AT_ONCE = 4
_POOL = "QEMU ciphers clusters of qcow2 in a pool of threads, a hand-over per request"
_ONE_THREAD = "one thread deciphers and sends to the socket; a plain image is sent only"
_TWO_PROCESSES = "two processes and the client on two cores; each request passes two sockets"
_NOTES = {
    "single-qcow2/rand-write": _POOL,
    "single-qcow2/rand-read": _POOL,
    "single-raw/seq-read": _ONE_THREAD,
    "single-qcow2/seq-read": _ONE_THREAD,
    "double-read-only-raw/rand-write": "each write passes two more processes, and both layers",
    "double-raw/seq-write": "the outer layer is aes-256-cbc, which encrypts serially",
    "double-raw/seq-read": _TWO_PROCESSES,
    "double-raw/rand-read": _TWO_PROCESSES,
}
"""What limits a configuration; shown where the aim is missed."""


def measure(bench: Run) -> Iterator[Row]:
    """Measure all configurations in interleaved rounds on allocated clusters; then further loads.

    O_DIRECT and the page cache are measured apart; stages open images in the page cache.
    """
    require_tools()
    require("nbdkit")
    size = bench.amount(256, quick=32) * _MIB
    folder = bench.scratch / "plain"
    folder.mkdir()
    with private_backend(bench.scratch / "d") as backend:
        maker = DiskMaker(backend, folder, size)
        chosen = [each for each in CONFIGURATIONS if not bench.quick or each.name in _QUICK[0]]
        if supports_direct(folder):
            direct = [each for each in chosen if each.is_direct]
            yield from _compare(bench, maker, direct, size, direct=True)
        yield from _compare(bench, maker, chosen, size, direct=False)
        yield from _four_at_once(bench, maker, size)
        yield from _allocating(bench, maker, size)
        yield from _discard(bench, maker, size)


def _compare(
    bench: Run, maker: DiskMaker, configurations: Sequence[Configuration], size: int, *, direct: bool
) -> Iterator[Row]:
    seconds = bench.amount(500, quick=200) / 1000
    with contextlib.ExitStack() as stack:
        exports = {
            each.name: stack.enter_context(maker.export(each, direct=direct)) for each in configurations
        }
        for export in exports.values():
            drive(export, _FILL, size, runtime=None)
        for load_name, load in _LOADS.items():
            if bench.quick and load_name not in _QUICK[1]:
                continue
            compared = [each for each in configurations if each.is_accelerated or load.block == _MIB]
            rounds = [
                {each.name: drive(exports[each.name], load, size, runtime=seconds) for each in compared}
                for _ in range(bench.amount(5, quick=1))
            ]
            for each in compared:
                if each.layers:
                    yield _row(each, load_name, load, rounds, direct=direct)


def _row(
    configuration: Configuration,
    load_name: str,
    load: Load,
    rounds: Sequence[Mapping[str, Throughput]],
    *,
    direct: bool,
) -> Row:
    ours = [each[configuration.name] for each in rounds]
    plain = [each[PLAIN[configuration.format].name] for each in rounds]
    cache = "O_DIRECT" if direct else "page cache"
    # Where O_DIRECT can be measured, the aims are for O_DIRECT.
    aim = configuration.aims.get(load_name) if direct == configuration.is_direct else None
    return Row(
        f"data/{'direct' if direct else 'cached'}/{configuration.name}/{load_name}",
        f"{configuration.what}, {load.what}, {cache}",
        rate(ours),
        rate(plain),
        f"plain {configuration.format.value}",
        Target(ratio=aim) if aim else None,
        {
            **_spread(ours, plain),
            "cpu_s_per_gib": statistics.median(each.cpu_seconds_per_gib for each in ours),
            "plain_cpu_s_per_gib": statistics.median(each.cpu_seconds_per_gib for each in plain),
            "p50_us": 1e6 * statistics.median(each.p50 for each in ours),
            "p99_us": 1e6 * statistics.median(each.p99 for each in ours),
            "plain_p50_us": 1e6 * statistics.median(each.p50 for each in plain),
            "plain_p99_us": 1e6 * statistics.median(each.p99 for each in plain),
        },
        _NOTES.get(f"{configuration.name}/{load_name}", ""),
    )


def rate(found: Sequence[Throughput]) -> Measurement:
    """The median rate."""
    return Measurement.median([each.bytes_per_second / _MIB for each in found], Unit.MIB_PER_SECOND)


def _spread(ours: Sequence[Throughput], plain: Sequence[Throughput]) -> dict[str, float]:
    """The smallest and the largest ratio of the rounds."""
    ratios = [
        mine.bytes_per_second / theirs.bytes_per_second for mine, theirs in zip(ours, plain, strict=True)
    ]
    return {"ratio_min": min(ratios), "ratio_max": max(ratios)}


def _named(name: str) -> Configuration:
    return next(each for each in CONFIGURATIONS if each.name == name)


def _four_at_once(bench: Run, maker: DiskMaker, size: int) -> Iterator[Row]:
    """Four disks, each with its own storage daemon and its own load."""
    seconds = bench.amount(2000, quick=200) / 1000
    compared = (PLAIN[RAW], _named("single-raw"))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(_DISKS_AT_ONCE) as pool:
        exports = {
            each.name: [stack.enter_context(maker.export(each)) for _ in range(_DISKS_AT_ONCE)]
            for each in compared
        }
        for group in exports.values():
            for export in group:
                drive(export, _FILL, size, runtime=None)
        for load_name in ("seq-write", "rand-write"):
            load = _LOADS[load_name]

            def together(group: Sequence[Export], load: Load = load) -> Throughput:
                found = list(pool.map(lambda export: drive(export, load, size, runtime=seconds), group))
                return Throughput(
                    sum(each.bytes_per_second for each in found),
                    statistics.mean(each.cpu_seconds_per_gib for each in found),
                    max(each.p50 for each in found),
                    max(each.p99 for each in found),
                )

            rounds = [
                {name: together(group) for name, group in exports.items()}
                for _ in range(bench.amount(5, quick=1))
            ]
            ours, plain = ([each[one.name] for each in rounds] for one in reversed(compared))
            yield Row(
                f"data/four/{load_name}",
                f"four disks at once, raw, one layer, {load.what}",
                rate(ours),
                rate(plain),
                "four plain disks",
                details={
                    **_spread(ours, plain),
                    "cpu_s_per_gib": statistics.median(each.cpu_seconds_per_gib for each in ours),
                    "plain_cpu_s_per_gib": statistics.median(each.cpu_seconds_per_gib for each in plain),
                },
            )


def _allocating(bench: Run, maker: DiskMaker, size: int) -> Iterator[Row]:
    """Writes into clusters of a qcow2 that are not allocated yet."""
    yield _fresh(bench, maker, "allocate", Load("allocating write, 64 KiB", "write", 64 << 10), size)


def _discard(bench: Run, maker: DiskMaker, size: int) -> Iterator[Row]:
    """Discards of allocated clusters. QEMU's driver for raw LUKS does not pass discards on."""
    yield _fresh(bench, maker, "discard", Load("discard, 64 KiB", "trim", 64 << 10), size, filled=True)


def _fresh(bench: Run, maker: DiskMaker, name: str, load: Load, size: int, *, filled: bool = False) -> Row:
    """A load once over a new qcow2 disk, in interleaved rounds."""
    found: dict[int, list[Throughput]] = {0: [], 1: []}
    for _ in range(bench.amount(5, quick=1)):
        for configuration in (PLAIN[QCOW2], _named("single-qcow2")):
            with maker.export(configuration) as export:
                if filled:
                    drive(export, _FILL, size, runtime=None)
                found[configuration.layers].append(drive(export, load, size, runtime=None))
    return Row(
        f"data/{name}/single-qcow2",
        f"qcow2, one layer, {load.what}",
        rate(found[1]),
        rate(found[0]),
        "plain qcow2",
        details=_spread(found[1], found[0]),
    )
