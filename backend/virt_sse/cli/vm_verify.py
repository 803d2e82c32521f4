"""``virt-sse vm verify``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.disk_options import DomainName
from virt_sse.cli.output import Output, OutputFormat, print_fields, print_json, print_rows
from virt_sse.cli.session import backend
from virt_sse.errors import VerificationError

if TYPE_CHECKING:
    from virt_sse.verification.verdict import DataPlace, DiskVerdict, DomainVerdict


def vm_verify(
    domain: DomainName,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Require encryption of other disks, too, as encryption at host does."),
    ] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Check that a domain runs as configured: layers, ciphers and keys, and places with plaintext.

    Queries the running QEMU without changing anything; libvirt still marks the domain as tainted by
    "custom-monitor" in its log. If the domain is shut off, the definition and the images are checked.
    """
    with backend() as b:
        verdict = b.verification.verify(domain, strict=strict)
    problems = verdict.all_problems
    if output is OutputFormat.JSON:
        document = dataclasses.asdict(verdict) | {"problems": problems, "as-asked": not problems}
        print_json(_with_hyphens(document))
    else:
        _print(verdict)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise VerificationError(f"domain {domain!r} is not as configured: {problems[0]}{more}")


def _print(verdict: DomainVerdict) -> None:
    layers = [
        {
            "target": disk.target,
            "disk": disk.disk or "(not virt-sse's)",
            "layer": layer.where,
            "slot": layer.slot,
            "cipher": layer.cipher,
            "key": layer.key,
        }
        for disk in verdict.disks
        for layer in disk.layers
    ]
    print_rows(layers, ("target", "disk", "layer", "slot", "cipher", "key"), OutputFormat.TABLE)
    typer.echo()
    rows = [_place("-", place) for place in verdict.places]
    rows += [_place(disk.target, place) for disk in verdict.disks for place in disk.places]
    rows += [
        {"target": "-", "data": each.state, "where": f"{each.what}: {each.where or each.reason}"}
        for each in verdict.at_rest
        if each.state != "absent"
    ]
    print_rows(rows, ("target", "data", "where"), OutputFormat.TABLE)
    typer.echo()
    if verdict.processes:
        code = [dataclasses.asdict(each) for each in verdict.processes]
        print_rows(code, ("process", "pid", "library"), OutputFormat.TABLE)
        typer.echo()
    fields: dict[str, object] = {
        "domain": verdict.domain,
        "runs": "yes" if verdict.runs else "no",
        "encryption-at-host": "on" if verdict.encryption_at_host else "off",
        "accelerate": "on" if verdict.accelerate else "off",
        "asked": [_asked(disk) for disk in verdict.disks if disk.asked],
        "as-asked": "no" if verdict.all_problems else "yes",
        "problems": verdict.all_problems,
    }
    print_fields(fields, OutputFormat.TABLE)


def _place(target: str, place: DataPlace) -> dict[str, object]:
    return {
        "target": target,
        "data": "plaintext" if place.is_plaintext else "ciphertext",
        "where": place.where,
    }


def _asked(disk: DiskVerdict) -> str:
    return f"{disk.target}: {disk.asked}, placement {disk.placement}, host caching {disk.caching}"


def _with_hyphens(value: object) -> object:
    """Field names with hyphens, as in all JSON of this program."""
    if isinstance(value, dict):
        return {str(name).replace("_", "-"): _with_hyphens(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_hyphens(each) for each in value]
    return value
