"""Every parser of foreign bytes returns a value or raises its own error, in bounded time and memory."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings

from support.fuzzing import Parser, bounded_memory, inputs, require_contract
from support.parsers import PARSERS
from support.regressions import regressions

_AT_ONCE = 100
"""Examples between two looks at the clock."""
_LONG = 10.0
"""Seconds from which on the memory is limited."""


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_the_seeds_of_a_fuzzer_are_valid(parser: Parser, tmp_path: Path) -> None:
    with parser.opened(tmp_path) as parse:
        accepted = [require_contract(parser, parse, content) for content in parser.seeds]
    assert any(accepted) or parser.name in _NEVER_ACCEPTED


_NEVER_ACCEPTED = {"pkcs11-frames", "vault-access-token"}
"""Parsers that end with an error: at the end of the connection, or for lack of the vault's key."""


@pytest.mark.parametrize(
    ("name", "content"), regressions(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_input_that_once_failed_gets_a_value_or_the_parsers_own_error(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (parser,) = (parser for parser in PARSERS if parser.name == name)
    with parser.opened(tmp_path) as parse:
        require_contract(parser, parse, content)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_hostile_bytes_get_a_value_or_the_parsers_own_error(
    parser: Parser, tmp_path: Path, fuzz_seconds: float
) -> None:
    limit = bounded_memory() if fuzz_seconds >= _LONG else contextlib.nullcontext()
    end = time.monotonic() + fuzz_seconds
    with parser.opened(tmp_path) as parse, limit:
        number = 0
        while time.monotonic() < end:

            @seed(number)
            @settings(
                max_examples=_AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck)
            )
            @given(content=inputs(parser))
            def check(content: bytes) -> None:
                require_contract(parser, parse, content)

            check()
            number += 1
