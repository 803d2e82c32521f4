"""Nettle's XTS with ``libvirt_sse_xts.so`` preloaded, called as QEMU calls the functions.

Run as a script, this module is the process with the library. Standard input: a JSON list of messages.
Standard output: the results.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
_LONGEST_CONTEXT = 8192
NETTLE = "libnettle.so.8"
_SCHEDULES = {"aes128": 176, "aes256": 240, "serpent": 528, "twofish": 4256}


@dataclass(frozen=True, slots=True)
class Message:
    """A message for nettle's XTS, with bytes in hexadecimal.

    :ivar cipher: nettle's name of the cipher.
    :ivar key: the keys of data and tweak, one after the other.
    :ivar offset: bytes by which the output is unaligned.
    :ivar through_wrappers: call the cipher as QEMU does: through functions of the caller, with two schedules
        in one context. Otherwise with nettle's functions and a schedule each.
    """

    cipher: str
    key: str
    tweak: str
    data: str
    encrypt: bool = True
    in_place: bool = False
    offset: int = 0
    through_wrappers: bool = True


@dataclass(frozen=True, slots=True)
class Statistics:
    """A line of ``VIRT_SSE_XTS_STATISTICS``.

    :ivar path: the fastest path that works in the process.
    """

    path: str
    fast: int
    portable: int
    nettle: int

    @classmethod
    def read(cls, path: Path) -> list[Statistics]:
        """The statistics of every process so far."""
        found = []
        for line in path.read_text().splitlines():
            name, fast, _, portable, _, nettle = line.split()
            found.append(cls(name, int(fast), int(portable), int(nettle)))
        return found


def process(
    library: Path,
    messages: Sequence[Message],
    folder: Path,
    *,
    path: str | None = None,
    threads: int = 1,
    late: bool = False,
) -> tuple[list[bytes], Statistics]:
    """The results of *messages* in a process with *library*.

    :param path: the library's path to use instead of the fastest.
    :param threads: the number of threads, each of which processes all messages.
    :param late: load nettle after the library, as a module of QEMU would.
    """
    statistics = folder / "statistics"
    statistics.unlink(missing_ok=True)
    environment = {
        "LD_PRELOAD": str(library) if late else f"{library}:{NETTLE}",
        "VIRT_SSE_XTS_STATISTICS": str(statistics),
        **({"VIRT_SSE_XTS": path} if path else {}),
    }
    done = subprocess.run(
        [sys.executable, "-I", __file__, str(threads)],
        input=json.dumps([asdict(message) for message in messages]),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    (found,) = Statistics.read(statistics)
    return [bytes.fromhex(result) for result in json.loads(done.stdout)], found


class _Nettle:
    """Nettle's functions in this process; XTS is the preloaded library's."""

    def __init__(self) -> None:
        self._xts = ctypes.CDLL(None)
        self._nettle = ctypes.CDLL(NETTLE)
        self._functions: dict[str, Callable[..., None]] = {}

    def result(self, message: Message) -> bytes:
        key, data = bytes.fromhex(message.key), bytes.fromhex(message.data)
        keys = (key[: len(key) // 2], key[len(key) // 2 :])
        contexts = [
            self._context(message, keys[0], decrypt=not message.encrypt),
            self._context(message, keys[1], decrypt=False),
        ]
        operations = ["encrypt"] if message.encrypt else ["decrypt", "encrypt"]
        functions = [self._cipher(message, operation) for operation in operations]
        target = ctypes.create_string_buffer(message.offset + len(data) + 1)
        source = target if message.in_place else ctypes.create_string_buffer(data, len(data))
        at = ctypes.addressof(target) + message.offset
        if message.in_place:
            ctypes.memmove(at, data, len(data))
        self._xts[f"nettle_xts_{operations[0]}_message"](
            *contexts,
            *functions,
            bytes.fromhex(message.tweak),
            ctypes.c_size_t(len(data)),
            ctypes.c_void_p(at),
            ctypes.c_void_p(at if message.in_place else ctypes.addressof(source)),
        )
        if not message.in_place and source.raw != data:
            raise ValueError("the source was changed")
        return target.raw[message.offset : message.offset + len(data)]

    def _context(self, message: Message, key: bytes, *, decrypt: bool) -> ctypes.Array[ctypes.c_char]:
        context = ctypes.create_string_buffer(_LONGEST_CONTEXT)
        if message.cipher not in ("aes128", "aes256"):
            self._nettle[f"nettle_{message.cipher}_set_key"](context, ctypes.c_size_t(len(key)), key)
        elif message.through_wrappers:
            self._nettle[f"nettle_{message.cipher}_set_encrypt_key"](context, key)
            second = ctypes.c_void_p(ctypes.addressof(context) + _SCHEDULES[message.cipher])
            self._nettle[f"nettle_{message.cipher}_set_decrypt_key"](second, key)
        else:
            self._nettle[f"nettle_{message.cipher}_set_{'de' if decrypt else 'en'}crypt_key"](context, key)
        return context

    def _cipher(self, message: Message, operation: str) -> Callable[..., None]:
        function = self._nettle[f"nettle_{message.cipher}_{operation}"]
        if not message.through_wrappers:
            return function
        is_second = operation == "decrypt" and message.cipher.startswith("aes")
        start = _SCHEDULES[message.cipher] if is_second else 0

        def wrapper(context: int, length: int, dst: int, src: int) -> None:
            function(
                ctypes.c_void_p(context + start),
                ctypes.c_size_t(length),
                ctypes.c_void_p(dst),
                ctypes.c_void_p(src),
            )

        return self._functions.setdefault(f"{message.cipher} {operation}", _FUNCTION(wrapper))


def _main() -> None:
    messages = [Message(**fields) for fields in json.load(sys.stdin)]
    nettle = _Nettle()
    results: list[list[bytes]] = []

    def work() -> None:
        results.append([nettle.result(message) for message in messages])

    threads = [threading.Thread(target=work) for _ in range(int(sys.argv[1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(result != results[0] for result in results):
        sys.exit("threads disagree")
    json.dump([result.hex() for result in results[0]], sys.stdout)


if __name__ == "__main__":
    _main()
