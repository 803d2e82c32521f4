"""ISO 8601 durations in rotation policies: ``P90D``, ``P1Y``, ``PT12H``."""

from __future__ import annotations

import re

from virt_sse.vault.refusals import bad_parameter

_DURATION = re.compile(
    r"P(?=.)(?:(\d{1,4})Y)?(?:(\d{1,4})M)?(?:(\d{1,4})W)?(?:(\d{1,5})D)?"
    r"(?:T(?=.)(?:(\d{1,6})H)?(?:(\d{1,8})M)?(?:(\d{1,10})S)?)?\Z",
    re.ASCII,
)
_SECONDS = (365 * 86400, 30 * 86400, 7 * 86400, 86400, 3600, 60, 1)


def seconds_of(duration: str) -> int:
    """Convert a duration to seconds; a year counts 365 days, a month 30.

    :raise Refusal: When *duration* is malformed.
    """
    match = _DURATION.match(duration)
    if not match:
        raise bad_parameter(f"{duration[:40]!r} is not an ISO 8601 duration.")
    return sum(int(count or 0) * unit for count, unit in zip(match.groups(), _SECONDS, strict=True))
