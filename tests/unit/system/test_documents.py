"""Documents from disk and from the network: decoded exactly, or refused with the field's name."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from virt_sse.system.documents import DocumentError, convert, from_json, from_toml

DEEP = 100_000


class Color(enum.Enum):
    RED = "red"


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    port_number: int


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    name: str
    ratio: float = 0.0
    open_files: tuple[Path, ...] = ()
    inner: Inner | None = None
    color: Color = Color.RED
    identifier: UUID | None = None
    free: object = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty")


def test_json_becomes_a_value() -> None:
    written = {
        "name": "a",
        "ratio": 2,
        "open-files": ["/x"],
        "inner": {"port-number": 7},
        "color": "red",
        "identifier": "6f9619ff-8b86-d011-b42d-00cf4fc964ff",
    }
    assert from_json(json.dumps(written).encode(), Document) == Document(
        name="a",
        ratio=2.0,
        open_files=(Path("/x"),),
        inner=Inner(7),
        identifier=UUID("6f9619ff-8b86-d011-b42d-00cf4fc964ff"),
    )


def test_toml_becomes_a_value() -> None:
    assert from_toml(b'name = "a"\n[inner]\nport-number = 7\n', Document) == Document(
        name="a", inner=Inner(7)
    )


def test_plain_types_are_decoded_too() -> None:
    assert from_json(b'{"a": ["b"]}', dict[str, list[str]]) == {"a": ["b"]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param(b"", "malformed JSON", id="empty"),
        pytest.param(b"{", "malformed JSON", id="cut off"),
        pytest.param(b'{"name":"a"} x', "malformed JSON", id="trailing data"),
        pytest.param(b'\xef\xbb\xbf{"name":"a"}', "malformed JSON", id="byte order mark"),
        pytest.param(b'{"name":"a\x00"}', "malformed JSON", id="control character"),
        pytest.param(b'{"name":"a","ratio":NaN}', "malformed JSON: NaN", id="NaN"),
        pytest.param(b'{"name":"\xff"}', "not valid UTF-8", id="latin-1"),
        pytest.param('{"name":"a"}'.encode("utf-16"), "not valid UTF-8", id="UTF-16"),
        pytest.param(b'{"name":"\\ud800"}', "not valid UTF-8", id="lone surrogate"),
        pytest.param(b'{"name":"a","free":{"\\ud800":1}}', "not valid UTF-8", id="lone surrogate as a name"),
        pytest.param(b"[]", "expected `object`, got `array`", id="array"),
        pytest.param(b"{}", "missing required field `name`", id="missing field"),
        pytest.param(b'{"name":"a","x\\u001b":1}', "unknown field `x?`", id="unknown field"),
        pytest.param(b'{"name":"a","open_files":[]}', "unknown field `open_files`", id="snake-case name"),
        pytest.param(b'{"name":"a","inner":{}}', "`port-number` - at `$.inner`", id="missing inner field"),
        pytest.param(b'{"name":1}', "expected `str`, got `int` - at `$.name`", id="mistyped"),
        pytest.param(b'{"name":"a","inner":{"port-number":true}}', "`$.inner.port-number`", id="bool as int"),
        pytest.param(b'{"name":"a","inner":{"port-number":1.0}}', "`$.inner.port-number`", id="float as int"),
        pytest.param(b'{"name":"a","open-files":["/x",1]}', "`$.open-files[1]`", id="mistyped path"),
        pytest.param(b'{"name":"a","color":"blue"}', "`$.color`", id="unknown enumeration value"),
        pytest.param(b'{"name":"a","identifier":"x"}', "invalid UUID - at `$.identifier`", id="UUID"),
        pytest.param(b'{"name":""}', "name is empty", id="refused by the type"),
        pytest.param(b'{"name":"a","name":"b"}', "duplicate field 'name'", id="duplicate"),
        pytest.param(b'{"name":"a","free":[{"b":1,"b":1}]}', "duplicate field 'b'", id="inner duplicate"),
        pytest.param(b'{"name":"a","ratio":' + b"9" * 400 + b"}", "64 bits", id="400 digits"),
        pytest.param(b'{"name":"a","free":' + b"9" * 400 + b"}", "64 bits", id="400 digits, free"),
        pytest.param(b'{"name":"a","free":' + b"9" * 5000 + b"}", "limit", id="5000 digits"),
        pytest.param(b'{"name":"a","ratio":1e999}', "out of range", id="infinite"),
        pytest.param(b"[" * DEEP + b"]" * DEEP, "nested too deeply", id="deep"),
        pytest.param(b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deeply", id="deep objects"),
    ],
)
def test_json_that_is_no_document_is_refused(document: bytes, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        from_json(document, Document)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param(b"name", "malformed TOML", id="malformed"),
        pytest.param(b'name = "\xff"', "not valid UTF-8", id="latin-1"),
        pytest.param(b'name = "a"\nname = "b"', "malformed TOML", id="duplicate"),
        pytest.param(b'name = "a"\nx = 1', "unknown field `x`", id="unknown field"),
        pytest.param(b'name = "a"\n[inner]\nport-number = "7"', "`$.inner.port-number`", id="mistyped"),
        pytest.param(b'name = "a"\n[inner]\nport-number = ' + b"9" * 400, "64 bits", id="400 digits"),
        pytest.param(b'name = "a"\nratio = inf', "out of range", id="infinite"),
        pytest.param(b"name = " + b"[" * DEEP + b"]" * DEEP, "nested too deeply", id="deep"),
    ],
)
def test_toml_that_is_no_document_is_refused(document: bytes, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        from_toml(document, Document)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [b'{"name": {"secret": "hunter2"}}', b'{"name": "hunter2", "x": "hunter2"}', b'{"name": "hunter2'],
)
def test_a_refusal_does_not_quote_values(document: bytes) -> None:
    with pytest.raises(DocumentError) as caught:
        from_json(document, Document)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert len(str(caught.value)) < 300


def test_a_decoded_document_is_converted() -> None:
    assert convert({"name": "a", "inner": {"port-number": 7}}, Document) == Document(name="a", inner=Inner(7))
    for wrong in ({"name": 1}, {"name": "\ud800"}, {"name": "a", "free": 1 << 64}, []):
        with pytest.raises(DocumentError):
            convert(wrong, Document)
