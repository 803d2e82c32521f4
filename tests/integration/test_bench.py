"""The benchmark runs and reports what it says it does. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import images
from support.folders import TESTS
from virt_sse.libvirt.xml import parse_xml

BENCH = TESTS / "bench"


@pytest.mark.slow
def test_bench_writes_rows_of_ours_against_a_peer(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--quick", "--only", "create", "--json", results],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text())
    assert document["machine"].keys() >= {"cpu", "cores", "qemu", "libvirt", "acceleration"}
    assert document["failed"] == document["skipped"] == {}
    assert [row["name"] for row in document["rows"]] == ["create/qcow2", "create/raw"]
    for row in document["rows"]:
        assert row["ours"]["unit"] == row["peer"]["unit"] == "s"
        assert row["ratio"] > 0
        assert row["target"] == {"seconds": 0.15, "ratio": 10}
        assert isinstance(row["met"], bool)
        assert row["what"] in done.stdout
    assert list(tmp_path.iterdir()) == [results]


@pytest.mark.root
@pytest.mark.slow
def test_the_data_path_is_measured_in_every_configuration_and_drawn(tmp_path: Path) -> None:
    images.require("qemu-storage-daemon", "nbdkit", "fio")
    results, picture = tmp_path / "results.json", tmp_path / "results.svg"
    options = ["--quick", "--only", "data", "--json", results, "--plot", picture]
    done = subprocess.run(
        [sys.executable, BENCH, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(results.read_text())
    assert document["failed"] == document["skipped"] == {}
    rows = {row["name"]: row for row in document["rows"]}
    assert rows.keys() >= {
        f"data/cached/{name}/{load}"
        for name in ("single-raw", "double-raw", "double-read-only-raw")
        for load in ("seq-write", "rand-write")
    }
    for row in rows.values():
        assert row["ours"]["unit"] == row["peer"]["unit"] == "MiB/s"
        assert row["details"]["ratio_min"] <= row["ratio"] <= row["details"]["ratio_max"]
    aims = [row for row in rows.values() if row["target"]]
    drawn = "".join(parse_xml(picture.read_text(), kind="picture").itertext())
    assert aims
    for row in aims:
        assert row["what"] in drawn
        assert f"{row['what']}  " in done.stdout
