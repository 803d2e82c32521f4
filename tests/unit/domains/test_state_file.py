from __future__ import annotations

import os
from pathlib import Path

import pytest

from virt_sse.domains import state_file
from virt_sse.domains.state_file import CHUNK, StateDek, StateHeader, StateWriter, read_chunks, read_header
from virt_sse.errors import ImageFormatError
from virt_sse.model.keys import Dek, KeyId, WrappedDek

WRAPPED = WrappedDek(b"\1\2\3", "A256KW", KeyId("platform-managed", "service", "1"))
HEADER = StateHeader(
    id="5e5e1ab0-0000-4000-8000-000000000001",
    domain="5e5e1ab0-0000-4000-8000-000000000002",
    name="web",
    created="2026-01-01T00:00:00+00:00",
    is_running=True,
    deks=(StateDek.of(WRAPPED, None), StateDek.of(WRAPPED, "5e5e1ab0-0000-4000-8000-000000000003")),
)
DEKS = [Dek.generate(), Dek.generate()]


def saved(path: Path, content: bytes, step: int = 300_000) -> Path:
    with path.open("wb") as file:
        writer = StateWriter(file.fileno(), HEADER, DEKS)
        for begin in range(0, len(content), step):
            writer.write(content[begin : begin + step])
        writer.finish()
    return path


def restored(path: Path, deks: list[Dek] | None = None) -> bytes:
    with path.open("rb") as file:
        header, encoded = read_header(file)
        assert header == HEADER
        return b"".join(read_chunks(file, encoded, deks or DEKS))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_a_saved_state_is_read_as_written(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    path = saved(tmp_path / "state", content)
    assert restored(path) == content
    assert size < 16 or content[:16] not in path.read_bytes()


def test_a_saved_state_needs_each_of_its_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "state", b"memory")
    for deks in ([DEKS[0], Dek.generate()], [Dek.generate(), DEKS[1]], DEKS[::-1]):
        with pytest.raises(ImageFormatError, match="damaged or cut off"):
            restored(path, deks)


def test_damage_of_a_saved_state_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "state", os.urandom(2 * CHUNK + 5))
    whole = path.read_bytes()
    first = len(whole) - (2 * CHUNK + 5) - 3 * 16
    chunk = CHUNK + 16
    flipped = bytearray(whole)
    flipped[first + chunk + 7] ^= 1
    damaged = {
        "cut off at a chunk": whole[: first + 2 * chunk],
        "cut off in a chunk": whole[:-1],
        "without chunks": whole[:first],
        "longer": whole + b"\0",
        "exchanged": whole[:first]
        + whole[first + chunk : first + 2 * chunk]
        + whole[first : first + chunk]
        + whole[first + 2 * chunk :],
        "flipped": bytes(flipped),
        "another name": whole.replace(b'"name":"web"', b'"name":"wex"'),
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(ImageFormatError, match="damaged or cut off"), path.open("rb") as file:
            list(read_chunks(file, read_header(file)[1], DEKS))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"LibvirtQemudSave",
        state_file.MAGIC,
        state_file.MAGIC + b"\xff" * 90,
        state_file.MAGIC + b"\0\0\0\2{}",
    ],
)
def test_other_files_are_no_saved_states(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(ImageFormatError, match="is no saved state of virt-sse"), path.open("rb") as file:
        read_header(file)


def test_a_full_disk_is_an_error() -> None:
    with Path("/dev/full").open("wb") as full, pytest.raises(OSError, match="No space left"):
        StateWriter(full.fileno(), HEADER, DEKS)
