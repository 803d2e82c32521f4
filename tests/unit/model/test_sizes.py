"""Sizes are read as virsh reads them."""

from __future__ import annotations

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.model.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512b", 512),
        ("1byte", 1),
        ("512bytes", 512),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("2048M", 2 << 30),
        ("2GB", 2 * 1000**3),
        ("2gb", 2 * 1000**3),
        ("2KiB", 2048),
        ("2k", 2048),
        ("2KB", 2000),
        ("64T", 64 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
    ],
)
def test_a_size_is_a_scaled_integer_of_virsh(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0G",
        "-1",
        "+512",
        "1.5G",
        "10X",
        "10 G",
        "G",
        "b",
        "1e9",
        "0x200",
        "8E",
        "1_024",
        "1Kib ",
        "1Ki",
    ]
    + ["\uff19\uff19\uff19", "1G\n", " 1G", "1" * 21, "512\0", "1KiBiB", "1\u212aB", "1kbs", "1bb"],
)
def test_an_invalid_size_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        parse_size(text)
    assert caught.value.hint
