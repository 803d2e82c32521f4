"""Typed access to the fields of a request's JSON document; Azure calls the fields properties.

Functions raise :class:`~virt_sse.vault.refusals.Refusal`, with Azure's code, for a value of the wrong type.
"""

from __future__ import annotations

from collections.abc import Mapping

from virt_sse.vault.refusals import bad_parameter

LAST_MOMENT = 253402300799
"""The end of the year 9999, in seconds since 1970: the last time that clients can show."""


def string(document: Mapping[str, object], field: str) -> str:
    """Read a string field.

    :raise Refusal: When the field is missing or no string.
    """
    value = document.get(field)
    if not isinstance(value, str):
        raise bad_parameter(f"Property {field} must be a string.")
    return value


def integer(document: Mapping[str, object], field: str, default: int) -> int:
    """Read a whole number; *default* if the field is missing or null.

    :raise Refusal: When the field is no whole number.
    """
    value = document.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_parameter(f"Property {field} must be a whole number.")
    return value


def moment(document: Mapping[str, object], field: str) -> int | None:
    """Read a time in seconds since 1970; ``None`` if the field is missing or null.

    :raise Refusal: When the field is no time, or a time after the year 9999.
    """
    value = document.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LAST_MOMENT:
        raise bad_parameter(f"Property {field} must be a time in seconds since 1970.")
    return value


def table(document: Mapping[str, object], field: str) -> Mapping[str, object]:
    """Read a nested object; the empty object if the field is missing or null.

    :raise Refusal: When the field is no object.
    """
    value = document.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_parameter(f"Property {field} must be an object.")
    return value
