"""A module that has taken over its process gains nothing in its caller: each answer is decoded as data."""

from __future__ import annotations

import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from support.waiting import is_gone
from virt_sse.errors import (
    InvalidValueError,
    KeyNotFoundError,
    KeyProviderUnavailableError,
    PluginError,
    VirtSseError,
)
from virt_sse.pkcs11 import messages, process
from virt_sse.pkcs11.messages import MessageError, PinWanted, Refused, Returned
from virt_sse.pkcs11.module import Module, load
from virt_sse.pkcs11.objects import KeyKind, TokenKey
from virt_sse.pkcs11.operations import TokenOperations
from virt_sse.pkcs11.pins import GuardedPin, PinGuard, PinOutcome, PinSource
from virt_sse.pkcs11.process import ModuleProcess
from virt_sse.system.files import write_private

encode = msgspec.msgpack.encode

HOSTILE = """\
import ast, pathlib, socket, struct, sys, time
caller = socket.socket(fileno=int(sys.argv[1]))
for answer in ast.literal_eval(pathlib.Path({answers!r}).read_text()):
    (length,) = struct.unpack("!I", caller.recv(4, socket.MSG_WAITALL))
    caller.recv(length, socket.MSG_WAITALL)
    caller.sendall(answer)
{then}
time.sleep(60)
"""
"""Answers each frame with the next given bytes, then neither answers nor ends."""


def frame(content: bytes) -> bytes:
    return struct.pack("!I", len(content)) + content


MADE = frame(messages.returned_frame(None))
PIN_WANTED = frame(encode(PinWanted(False)))


class Bomb:
    """Runs a command as soon as it is unpickled."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._made}",)


def name_of(module: Module) -> str:
    raise AssertionError("runs in the module's process only")


@pytest.fixture
def hostile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., ModuleProcess[Module]]]:
    """Makes a process whose program sends the given bytes."""
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3, raising=False)
    monkeypatch.setattr(process, "_START_SECONDS", 5, raising=False)
    made: list[ModuleProcess[Module]] = []

    def make(*answers: bytes, then: str = "", logins: GuardedPin | None = None) -> ModuleProcess[Module]:
        path = tmp_path / f"answers-{len(made)}"
        path.write_text(repr(answers))
        monkeypatch.setattr(process, "_MAIN", HOSTILE.format(answers=str(path), then=then))
        made.append(
            ModuleProcess(load, tmp_path / "module.so", None, logins=logins, environment={}, seconds=1)
        )
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_pickle_is_never_loaded(hostile: Callable[..., ModuleProcess[Module]], tmp_path: Path) -> None:
    """A hostile module ran commands in its caller so."""
    made = tmp_path / "made"
    for answers in ([frame(pickle.dumps(Bomb(made)))], [MADE, frame(pickle.dumps(Bomb(made)))]):
        with pytest.raises(KeyProviderUnavailableError):
            hostile(*answers).call(1, name_of)
    assert not made.exists()


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("!I", messages.LONGEST + 1),
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff" + bytes(1 << 16),
        frame(b""),
        frame(b"\xc1"),
        frame(b"\x91" * 100_000),
        frame(encode(None)),
        frame(encode("name")),
        frame(encode({"type": "Returned"})),
        frame(encode({"type": "Call", "value": 1})),
        frame(encode({"type": "PinWanted", "is_last": 1})),
        frame(encode(Returned(msgspec.Raw(encode(1))))),
        frame(encode(Returned(msgspec.Raw(encode(["name"]))))),
        frame(encode(Returned(msgspec.Raw(encode(None))))),
        frame(encode(Returned(msgspec.Raw(encode(b"name"))))),
        frame(encode({"type": "Returned", "value": msgspec.Raw(b"\xa1\xff")})),
        frame(encode(Refused("SystemExit", "0", None))),
        frame(encode(Refused("PluginError", "name", None))),
        frame(encode(Refused("virt_sse.errors:VirtSseError", "", None))),
        frame(encode({"type": "Refused", "kind": "UnwrapError", "message": 1, "hint": None})),
        frame(encode(Returned(msgspec.Raw(b"\x91" * 100_000)))),
        PIN_WANTED,
    ],
    ids=lambda answer: answer[:60].hex(),
)
def test_answers_of_other_types_are_refused_and_the_process_is_killed(
    hostile: Callable[..., ModuleProcess[Module]], answer: bytes
) -> None:
    module = hostile(MADE, answer)
    with pytest.raises(KeyProviderUnavailableError, match="broke the protocol: "):
        module.call(1, name_of)
    assert module.pid is None


def test_a_process_that_ignores_its_time_limit_is_killed(
    hostile: Callable[..., ModuleProcess[Module]],
) -> None:
    """Also one that sends half a frame, or stops reading."""
    for answer in (b"", frame(b"name")[:-1]):
        module = hostile(MADE, answer)
        began = time.monotonic()
        with pytest.raises(KeyProviderUnavailableError, match="did not answer within 1 s"):
            module.call(1, name_of)
        assert time.monotonic() - began < 10
        assert module.pid is None


def test_a_process_that_hangs_up_and_lives_on_is_killed(
    hostile: Callable[..., ModuleProcess[Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    start = ModuleProcess._start

    def remember(self: ModuleProcess[Module]) -> process._Running:
        running = start(self)
        started.append(running.process.pid)
        return running

    monkeypatch.setattr(ModuleProcess, "_start", remember)
    with pytest.raises(KeyProviderUnavailableError, match="SIGKILL"):
        hostile(MADE, then="caller.close()").call(1, name_of)
    with closing(hostile(MADE)) as module, pytest.raises(KeyProviderUnavailableError):
        module.call(0.1, name_of)
    assert len(started) == 2
    assert all(map(is_gone, started))


def test_logins_are_counted_and_limited(
    hostile: Callable[..., ModuleProcess[Module]], tmp_path: Path
) -> None:
    path = tmp_path / "pin"
    write_private(path, b"1234\n")
    guard = PinGuard(tmp_path / "guard/wrong-pins")
    logins = GuardedPin(PinSource.file(path), guard)
    right = frame(encode(PinOutcome.RIGHT)) + PIN_WANTED
    with pytest.raises(KeyProviderUnavailableError, match="more than 100 logins"):
        hostile(MADE, PIN_WANTED, *[right] * 200, logins=logins).call(5, name_of)
    assert guard.failures() == 0
    for outcome in (0, 4, "RIGHT", True, None):
        with pytest.raises(KeyProviderUnavailableError, match="broke the protocol"):
            hostile(MADE, PIN_WANTED, frame(encode(outcome)), logins=logins).call(1, name_of)
        assert guard.failures() == 1, "an unclear outcome counts as wrong"
        guard.reset()


def test_text_for_the_terminal_is_printable_and_short(hostile: Callable[..., ModuleProcess[Module]]) -> None:
    refused = Refused("KeyNotFoundError", "no key\n\x1b]0;owned\x07" + "x" * 100_000, "a\rb")
    with pytest.raises(KeyNotFoundError) as caught:
        hostile(MADE, frame(encode(refused))).call(1, name_of)
    assert str(caught.value).startswith("no key??]0;owned?xxx")
    assert len(str(caught.value)) == 2000
    assert caught.value.hint == "a?b"


def test_every_error_arrives_as_itself_or_as_a_base() -> None:
    for error, kind in (
        (InvalidValueError("text", hint="hint"), InvalidValueError),
        (PluginError("plugin", "text"), KeyProviderUnavailableError),
    ):
        arrived = messages.decode(messages.refused_frame(error), messages.ANSWERS)
        assert isinstance(arrived, Refused)
        made: VirtSseError = arrived.error()
        assert type(made) is kind
        assert (str(made), made.hint) == (str(error), error.hint)


def test_keys_are_decoded_exactly_and_within_limits() -> None:
    key = TokenKey("label", b"\1", KeyKind.RSA, 16384, b"\xff" * 2048, b"\1\0\1", True, True, False)
    decoder = messages.result_decoder(TokenOperations.find)
    assert messages.decode(encode([key]), decoder) == [key]
    fields = msgspec.to_builtins(key, builtin_types=(bytes,))
    for change in (
        {"modulus": bytes(2049)},
        {"modulus": 5},
        {"kind": "des"},
        {"is_enabled": 1},
        {"bits": True},
        {"id": "1"},
        {"label": None},
    ):
        with pytest.raises(MessageError):
            messages.decode(encode([fields | change]), decoder)


def test_arguments_without_an_encoding_are_refused() -> None:
    for argument in ("\udc80", 1 << 64):
        with pytest.raises(InvalidValueError):
            messages.call_frame(1, name_of, (argument,))


def test_no_message_shows_a_pin() -> None:
    assert "1234" not in repr(Returned(msgspec.Raw(encode("1234"))))
    module = ModuleProcess(load, Path("/module.so"), "1234", environment={}, seconds=1)
    assert "1234" not in repr(module._making)
