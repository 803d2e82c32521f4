"""The documented schemas of ``--output json`` are complete, and the commands keep to them.

Every test that runs a command with ``--output json`` validates the output, see ``support.json_schemas``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import images, json_schemas
from support.command_line import CommandLine
from virt_sse.backend import Backend
from virt_sse.cli import reference
from virt_sse.model.disks import NewDisk

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")


def test_every_command_with_json_has_a_schema_and_no_other() -> None:
    commands = {
        " ".join(command.path)
        for command in reference.command_line().leaves()
        if any("--output" in option.names for option in command.options)
    }
    assert set(json_schemas.schemas()["properties"]) == commands


def test_the_schemas_are_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schemas.schemas())


def test_an_undocumented_or_wrong_field_is_found() -> None:
    good = [{"table": "disks", "rows": 1, "sha-256": "0"}]
    json_schemas.validate(("store", "migrate", "url", "--output", "json"), json.dumps(good))
    for change in ({"more": 1}, {"rows": "1"}):
        with pytest.raises(AssertionError, match=next(iter(change))):
            json_schemas.validate(("store", "migrate", "-o", "json"), json.dumps([good[0] | change]))
    with pytest.raises(AssertionError, match="rows"):
        json_schemas.validate(
            ("store", "migrate", "--output=json"), json.dumps([{"table": "", "sha-256": ""}])
        )


def test_outputs_of_a_host_without_libvirt(
    root: Path, backend: Backend, virt_sse: CommandLine, tmp_path: Path
) -> None:
    images.require("qemu-img", "cryptsetup")
    backend.disks.create(NewDisk(name="web", size=4 << 20))
    backend.sets.create("payroll", provider="platform-managed", key="default")
    folder = tmp_path / "backup"
    folder.mkdir(0o700)
    commands = [
        "disk create new --size 1M --des payroll",
        "disk list",
        "disk show web",
        "disk inspect web",
        f"disk backup web {folder}",
        "disk backups",
        "snapshot create now --disk web --incremental",
        "snapshot list",
        "snapshot show now",
        "image create base --disk web",
        "des list",
        "des rotate payroll --prove",
        "key used",
        "key rewrap --provider platform-managed",
        "audit list",
        "audit verify",
        "host list",
        "agent page",
    ]
    for command in commands:
        document = virt_sse(*command.split(), "--output", "json")
        assert json_schemas.command_of([*command.split(), "--output", "json"]), command
        json_schemas.validate([*command.split(), "--output", "json"], document)
        assert document.strip()[0] in "[{", command
