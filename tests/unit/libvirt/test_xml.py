"""The parser of XML from libvirt refuses what libvirt does not write."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.disk_chains import BackupJob
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.snapshots import SnapshotFiles
from virt_sse.libvirt.xml import (
    MAX_ATTRIBUTES,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    parse_with_prefixes,
    parse_xml,
    to_text,
)

LAUGHS = "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 10))
REFUSED = {
    "billion laughs": f"<!DOCTYPE domain [<!ENTITY l0 'ha'>{LAUGHS}]><domain>&l9;</domain>",
    "external entity": "<!DOCTYPE domain [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><domain>&e;</domain>",
    "parameter entity": "<!DOCTYPE domain [<!ENTITY % e SYSTEM 'file:///x'> %e;]><domain/>",
    "external DTD": "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>",
    "empty DTD": "<!DOCTYPE domain><domain/>",
    "undefined entity": "<domain>&e;</domain>",
    "invalid bytes": b"<domain>\xff</domain>".decode("utf-8", "surrogateescape"),
    "lone surrogate": "<domain>\ud800</domain>",
    "deep nesting": "<domain>" + "<a>" * 1_000_000 + "</a>" * 1_000_000 + "</domain>",
    "unclosed deep nesting": "<a>" * 1_000_000,
    "huge text": "<domain>" + "x" * MAX_BYTES + "</domain>",
    "many elements": "<domain>" + "<a/>" * MAX_ELEMENTS + "</domain>",
    "many attributes": "<domain " + " ".join(f"a{n}=''" for n in range(MAX_ATTRIBUTES + 1)) + "/>",
    "unbound prefix": "<domain><a:b/></domain>",
    "control character": "<domain>&#0;</domain>",
    "duplicate attribute": "<domain a='1' a='2'/>",
    "nothing": "",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_document_is_an_error(name: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid domain XML: "):
        DomainDefinition.parse(REFUSED[name])


def test_every_kind_of_document_is_refused_alike() -> None:
    for parse in (HostCapabilities.parse, BackupJob.parse, SnapshotFiles.parse):
        with pytest.raises(InvalidValueError, match=r"invalid \w+ XML: document type declarations"):
            parse(REFUSED["billion laughs"])


def test_the_deepest_allowed_document_is_parsed() -> None:
    root = parse_xml("<a>" * MAX_DEPTH + "</a>" * MAX_DEPTH, kind="XML")
    assert len(list(root.iter())) == MAX_DEPTH
    assert to_text(root, {}).count("<a") == MAX_DEPTH


def test_the_largest_allowed_documents_are_parsed() -> None:
    root = parse_xml("<a>" + "<b/>" * (MAX_ELEMENTS - 1) + "</a>", kind="XML")
    assert len(root) == MAX_ELEMENTS - 1
    names = " ".join(f"b{number}=''" for number in range(MAX_ATTRIBUTES))
    assert len(parse_xml(f"<a {names}/>", kind="XML").attrib) == MAX_ATTRIBUTES


DOCUMENTS = [
    "<domain/>",
    "<?xml version='1.0' encoding='latin-1'?><!-- c --><domain a='&lt;ä'>t&#10;<b/>u<b>v</b>w</domain>",
    "<domain xmlns:q='http://q'><q:a q:b='1' c='2'/><d xmlns='http://d'><e f='3'/></d></domain>",
    "<domain><![CDATA[<a> & b]]>&amp;&quot;&#x1F600;</domain>",
]


@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_document_is_parsed_as_elementtree_parses_it(text: str) -> None:
    written = ET.tostring(parse_xml(text, kind="XML"), encoding="unicode")
    assert ET.canonicalize(written, rewrite_prefixes=True) == ET.canonicalize(text, rewrite_prefixes=True)


def test_namespace_prefixes_are_kept_on_writing() -> None:
    text = '<domain xmlns:qemu="http://q"><qemu:a /><app:b xmlns:app="http://app" /></domain>'
    root, prefixes = parse_with_prefixes(text, kind="XML")
    assert prefixes == {"qemu": "http://q", "app": "http://app"}
    written = to_text(root, prefixes)
    assert "<qemu:a " in written
    assert "<app:b " in written


def test_a_prefix_that_elementtree_reserves_is_no_error() -> None:
    root, prefixes = parse_with_prefixes("<domain xmlns:ns7='http://seven'><ns7:a/></domain>", kind="XML")
    assert "http://seven" in to_text(root, prefixes)
