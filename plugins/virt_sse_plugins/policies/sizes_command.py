"""``virt-sse vm sizes``."""

from __future__ import annotations

from virt_sse.cli import session
from virt_sse.cli.output import Output, OutputFormat, print_rows


def sizes(output: Output = OutputFormat.TABLE) -> None:
    """List the series of VM sizes in the site's tables, and their support of encryption at host."""
    from virt_sse_plugins.policies.tables import Tables

    site = session.config().site
    tables = Tables.of(site)
    print_rows(
        [
            {
                "series": series.name,
                "type": series.type,
                "encryption-at-host": series.encryption_at_host,
                "note": series.note,
                "enforced": site.enforce and tables.governs(site.region),
            }
            for series in tables.series
        ],
        ("series", "encryption-at-host", "enforced", "type", "note"),
        output,
    )
