"""The documented schemas of ``--output json``: every output that a test gets is validated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from support.folders import REPOSITORY

PATH = REPOSITORY / "backend/docs/reference/json-output.schema.json"
_LINES = ("audit tail",)
"""Commands that print a document a line."""


@cache
def schemas() -> dict[str, Any]:
    """The document: schemas by command in ``properties``, and shared parts in ``$defs``."""
    document: dict[str, Any] = json.loads(PATH.read_text("utf-8"))
    return document


@cache
def _validator(command: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(
        {
            "$ref": f"#/properties/{command}",
            "$defs": schemas()["$defs"],
            "properties": schemas()["properties"],
        }
        | {"$schema": schemas()["$schema"]}
    )


def command_of(arguments: Sequence[str]) -> str | None:
    """The command with a schema among the first words of a command line with ``--output json``, if any."""
    arguments = list(arguments)
    if not any(
        each == "--output=json" or (each in ("--output", "-o") and arguments[at + 1 : at + 2] == ["json"])
        for at, each in enumerate(arguments)
    ):
        return None
    words = [each for each in arguments if not each.startswith("-")]
    return next(
        (name for size in (3, 2) if (name := " ".join(words[:size])) in schemas()["properties"]), None
    )


def validate(arguments: Sequence[str], output: str) -> None:
    """Validate the standard output of a command, unless it has no JSON or jsonschema is not installed."""
    command = command_of(arguments)
    if command is None or not output.strip():
        return
    try:
        validator = _validator(command)
    except ModuleNotFoundError:
        return
    try:
        documents = [json.loads(each) for each in (output.splitlines() if command in _LINES else [output])]
    except ValueError:
        return  # a command that prints text whatever the format, e.g. with --dry-run
    for document in documents:
        problems = [f"{each.json_path}: {each.message}" for each in validator.iter_errors(document)]
        problems += [f"{each}: not in the schema" for each in undocumented(command, document)]
        assert not problems, f"virt-sse {command} prints JSON that {PATH.name} does not describe: {problems}"


def undocumented(command: str, document: object) -> list[str]:
    """The fields of a document that its schema does not name."""
    return list(_unknown(schemas()["properties"][command], document, command))


def _unknown(schema: Any, value: object, where: str) -> list[str]:
    if isinstance(value, list):
        parts = [each["items"] for each in _parts(schema) if "items" in each]
        return [found for item in value for found in _unknown({"allOf": parts}, item, f"{where}[]")]
    if not isinstance(value, dict):
        return []
    known: dict[str, list[Any]] = {}
    for each in _parts(schema):
        for name, inner in each.get("properties", {}).items():
            known.setdefault(name, []).append(inner)
    found = [f"{where}.{name}" for name in value if name not in known]
    for name, inner in known.items():
        if name in value:
            found += _unknown({"allOf": inner}, value[name], f"{where}.{name}")
    return found


def _parts(schema: Any) -> list[Any]:
    """A schema and all schemas that it combines."""
    parts = [schema]
    if reference := schema.get("$ref"):
        parts += _parts(schemas()["$defs"][reference.rpartition("/")[2]])
    for each in (*schema.get("allOf", ()), *schema.get("anyOf", ())):
        parts += _parts(each)
    return parts
