"""The benchmark runs and reports what it says it does. How fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.folders import TESTS

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
