"""``virt-sse vm inspect`` and ``virt-sse disk inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from virt_sse.cli.disk_options import DomainName, Name
from virt_sse.cli.output import Output, OutputFormat, human_size, print_json, print_rows
from virt_sse.cli.session import backend
from virt_sse.errors import ImageError

if TYPE_CHECKING:
    from virt_sse.model.content import Finding

_NONE = "none found"


def vm_inspect(
    domain: DomainName,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Find encryption by the guest itself, e.g. LUKS and BitLocker, on a domain's disks; read-only."""
    with backend() as b:
        inspected = b.inspector.domain(domain)
    disks: list[dict[str, object]] = [
        {
            "target": each.target,
            "disk": each.disk,
            "path": str(each.path) if each.path else None,
            "findings": [_fields(finding) for finding in each.findings],
            "problem": str(each.problem) if each.problem else None,
        }
        for each in inspected
    ]
    if output is OutputFormat.JSON:
        print_json({"domain": domain, "disks": disks})
    else:
        rows = [
            {"target": each.target, "disk": each.disk} | row
            for each in inspected
            for row in (_problem(str(each.problem)) if each.problem else _rows(each.findings))
        ]
        print_rows(rows, ("target", "disk", "partition", "offset", "size", "encryption"), output)
    problems = [each for each in inspected if each.problem]
    if problems:
        first = problems[0]
        raise ImageError(
            f"{len(problems)} of {len(inspected)} disks cannot be read, {first.target}: {first.problem}",
            hint=first.problem.hint if first.problem else None,
        )


def disk_inspect(
    name: Name,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Find encryption by the guest itself, e.g. LUKS and BitLocker, on a disk; read-only."""
    with backend() as b:
        findings = b.inspector.disk(b.disks.get(name))
    if output is OutputFormat.JSON:
        print_json({"disk": name, "findings": [_fields(finding) for finding in findings]})
    else:
        print_rows(_rows(findings), ("partition", "offset", "size", "encryption"), output)


def _fields(finding: Finding) -> dict[str, object]:
    return {
        "partition": finding.partition,
        "offset": finding.offset,
        "size": finding.size,
        "encryption": finding.kind.value,
    }


def _rows(findings: Sequence[Finding]) -> list[dict[str, object]]:
    """The rows of a table, with a row for an empty result."""
    if not findings:
        return [{"partition": None, "offset": None, "size": None, "encryption": _NONE}]
    return [
        _fields(finding) | {"offset": human_size(finding.offset), "size": human_size(finding.size)}
        for finding in findings
    ]


def _problem(problem: str) -> list[dict[str, object]]:
    return [{"partition": None, "offset": None, "size": None, "encryption": f"cannot be read: {problem}"}]
