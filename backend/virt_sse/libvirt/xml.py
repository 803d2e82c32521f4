"""Parsing and writing of XML documents from libvirt.

The parser rejects document type declarations, and with the declarations all custom entities: libvirt writes
neither. Size and nesting are limited, so that a hostile document causes an error message instead of a
traceback or exhausted memory.
"""

from __future__ import annotations

import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from xml.parsers import expat

from virt_sse.errors import InvalidValueError

MAX_BYTES = 16 << 20
MAX_DEPTH = 256
MAX_ELEMENTS = MAX_ATTRIBUTES = 100_000
"""Limits of a document: its size in UTF-8, how deep its elements are nested, and how many it has.

A parsed element takes about 100 bytes of memory, whatever its length in the document.
"""

_GENERATED_PREFIX = re.compile(r"ns\d+")
"""Prefixes reserved by ElementTree for namespaces without a registered prefix."""

_registering = threading.Lock()
"""ElementTree's registry of prefixes is global."""


def parse_xml(text: str, *, kind: str) -> ET.Element:
    """Parse a document and return its root element.

    :param kind: kind of document for error messages, e.g. ``"domain XML"``.
    :raise InvalidValueError: When the document is malformed, has a DTD or exceeds a limit.
    """
    return parse_with_prefixes(text, kind=kind)[0]


def parse_with_prefixes(text: str, *, kind: str) -> tuple[ET.Element, Mapping[str, str]]:
    """Parse a document and return its root element, and its namespace URIs by prefix for :func:`to_text`.

    :raise InvalidValueError: As for :func:`parse_xml`.
    """
    builder = _Builder()
    parser = expat.ParserCreate("utf-8", "}")
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartNamespaceDeclHandler = builder.declare
    parser.StartDoctypeDeclHandler = builder.refuse_doctype
    try:
        content = text.encode()
        if len(content) > MAX_BYTES:
            raise _LimitError(f"larger than {MAX_BYTES >> 20} MiB")
        if content.count(b"=") > MAX_ATTRIBUTES:  # expat reports an element with all of its attributes
            raise _LimitError(f"more than {MAX_ATTRIBUTES} attributes")
        parser.Parse(content, True)
    except UnicodeEncodeError as exc:
        raise InvalidValueError(f"invalid {kind}: no valid UTF-8 at character {exc.start}") from exc
    except (expat.ExpatError, _LimitError) as exc:
        raise InvalidValueError(f"invalid {kind}: {exc}") from exc
    return builder.close(), builder.prefixes


def to_text(root: ET.Element, prefixes: Mapping[str, str]) -> str:
    """Serialize *root*.

    :param prefixes: namespace URIs by the prefix to write for each; of two prefixes for a URI the last wins.
    """
    with _registering:
        for prefix, uri in prefixes.items():
            if prefix and not _GENERATED_PREFIX.fullmatch(prefix):
                ET.register_namespace(prefix, uri)
        return ET.tostring(root, encoding="unicode")


class _LimitError(ValueError):
    """The document is outside the limits of this module."""


class _Builder:
    """Builds an element tree from expat's events. Expat writes ``{uri}name`` as ``uri}name``."""

    def __init__(self) -> None:
        self.prefixes: dict[str, str] = {}
        self._tree = ET.TreeBuilder()
        self._depth = self._elements = 0
        self.data = self._tree.data
        self.close = self._tree.close

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH:
            raise _LimitError(f"elements nested deeper than {MAX_DEPTH}")
        if self._elements > MAX_ELEMENTS:
            raise _LimitError(f"more than {MAX_ELEMENTS} elements")
        self._tree.start(_qualified(name), {_qualified(key): value for key, value in attributes.items()})

    def end(self, name: str) -> None:
        self._depth -= 1
        self._tree.end(_qualified(name))

    def declare(self, prefix: str | None, uri: str | None) -> None:
        if prefix and uri:
            self.prefixes[prefix] = uri

    def refuse_doctype(self, *_declaration: object) -> None:
        raise _LimitError("document type declarations are not allowed")


def _qualified(name: str) -> str:
    return f"{{{name}" if "}" in name else name
