"""The metadata element with the token of a live migration (libvirt formatdomain, "General metadata").

At the destination of a migration, libvirt runs the hook for the event ``migrate``, takes the definition that
the hook returns, and runs the hook for ``prepare`` with this definition. The token tells such a ``prepare``
from a start. The element stays in the live definition, without effect.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from uuid import UUID

MIGRATION_NAMESPACE = "https://virt-sse.invalid/migration/1"
MIGRATION_PREFIX = "virt-sse-migration"
_TAG = f"{{{MIGRATION_NAMESPACE}}}migration"


def read_token(domain: ET.Element) -> UUID | None:
    """The token in the ``<domain>`` element *domain*, if any."""
    element = domain.find(f"./metadata/{_TAG}")
    try:
        return UUID(element.get("token", "")) if element is not None else None
    except ValueError:
        return None


def write_token(domain: ET.Element, token: UUID) -> None:
    """Set the token in the ``<domain>`` element *domain*."""
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(domain, "metadata")
    for element in metadata.findall(_TAG):
        metadata.remove(element)
    ET.SubElement(metadata, _TAG).set("token", str(token))
