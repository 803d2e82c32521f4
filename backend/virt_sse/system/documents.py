"""Decoding of JSON, TOML and MessagePack documents from disk, from other processes and from the network.

A document's type is a :class:`msgspec.Struct` with ``forbid_unknown_fields=True`` (dataclasses silently drop
unknown fields) and, for kebab-case names, ``rename="kebab"``. https://jcristharif.com/msgspec/structs.html
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

_INTEGERS = range(-(2**63), 2**64)
_LONGEST_MESSAGE = 200
_LONGEST_NAME = 80


class DocumentError(ValueError):
    """A document is malformed or does not have its type's fields.

    The message names the field (``$.hosts[0]``) and the types, never a field's value, except a value outside
    an enumeration.
    """


def from_json(document: bytes, kind: type[T]) -> T:
    """Decode JSON (RFC 8259) into a *kind*, without coercion: ``"1"``, ``1.0`` and ``true`` are no ``int``.

    Stricter than :func:`json.loads`: UTF-8 only, no duplicate names, no lone surrogates, no NaN, and integers
    of 64 bits. A ``ValueError`` from the ``__post_init__`` of *kind* becomes a :exc:`DocumentError` with the
    same text; a :exc:`~virt_sse.errors.VirtSseError` passes unchanged.

    :raise DocumentError: When *document* is malformed or is no *kind*.
    """
    try:
        value = json.loads(document.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        return convert(value, kind)
    except json.JSONDecodeError as exc:
        raise DocumentError(f"malformed JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})") from None
    except (ValueError, RecursionError) as exc:
        raise DocumentError(_message(exc)) from None


def from_toml(document: bytes, kind: type[T]) -> T:
    """Decode TOML 1.0 into a *kind*, as strictly as :func:`from_json`.

    :raise DocumentError: When *document* is malformed or is no *kind*.
    """
    try:
        return convert(tomllib.loads(document.decode()), kind)
    except tomllib.TOMLDecodeError as exc:
        raise DocumentError(f"malformed TOML: {_message(exc)}") from None
    except (ValueError, RecursionError) as exc:
        raise DocumentError(_message(exc)) from None


def from_messagepack(document: bytes, kind: type[T]) -> T:
    """Decode MessagePack (https://msgpack.org) into a *kind*, without coercion: text is no bytes.

    :raise DocumentError: When *document* is malformed or is no *kind*.
    """
    try:
        found = msgspec.msgpack.decode(document, type=kind)
        _check_scalars(msgspec.to_builtins(found))
        return found
    except DocumentError:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as exc:
        raise DocumentError(_message(exc)) from None


def convert(value: object, kind: type[T]) -> T:
    """Convert decoded dictionaries, lists and scalars into a *kind*, as strictly as :func:`from_json`.

    :raise DocumentError: When *value* is no *kind*.
    """
    try:
        _check_scalars(value)
        return msgspec.convert(value, kind, str_keys=True, dec_hook=_decode_path)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as exc:
        raise DocumentError(_message(exc)) from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise DocumentError(f"duplicate field {name[:_LONGEST_NAME]!r}")
        name.encode()
        found[name] = value
    return found


def _refuse_constant(name: str) -> object:
    raise DocumentError(f"malformed JSON: {name} is not a JSON number")


def _check_scalars(value: object, place: str = "$") -> None:
    """Refuse values that msgspec accepts but SQLite, UTF-8 files or JSON writers cannot hold."""
    problem = None
    match value:
        case dict():
            for name, each in value.items():
                _check_scalars(each, f"{place}.{name}")
        case list():
            for number, each in enumerate(value):
                _check_scalars(each, f"{place}[{number}]")
        case str():
            value.encode()
            if "\0" in value:  # neither paths nor PostgreSQL can hold one
                problem = "character NUL"
        case int() if value not in _INTEGERS:
            problem = "integer out of the range of 64 bits"
        case float() if not math.isfinite(value):
            problem = "number out of range"
    if problem:
        raise DocumentError(f"{problem} - at `{place}`")


def _decode_path(kind: type, value: object) -> object:
    if kind is object:
        return value  # msgspec knows only typing.Any as a type of all values
    if kind is not Path:
        raise NotImplementedError(f"documents cannot hold a {kind}")
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return Path(value)


def _message(exc: Exception) -> str:
    """The failure without the document's content: UnicodeError's own text quotes bytes."""
    if isinstance(exc, UnicodeError):
        return "not valid UTF-8"
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    text = "".join(each if each.isprintable() else "?" for each in str(exc))
    return text[:1].lower() + text[1:_LONGEST_MESSAGE]
