"""A Linux guest that writes numbered blocks with checksums all the time, and a check of a disk's blocks.

The guest writes block after block, each flushed before the next, around a ring of slots: block *n* goes to
slot *n* modulo :data:`SLOTS`. At any moment a disk therefore has the newest blocks 0 to *m*, except that the
slot of block *m* + 1 may be half written. At each start the guest checks all blocks, and goes on with the
next. Every block begins with :data:`CANARY`, which neither the script nor any definition of the domain holds.
"""

from __future__ import annotations

import hashlib
import re

from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import LinuxMicro

SLOTS = 32
_BLOCK, _HEADER = 16 << 10, 384
SPACE = SLOTS * _BLOCK
"""Bytes of the ring of slots, from the disk's begin."""
CANARY = hashlib.md5(b"canary\n", usedforsecurity=False).hexdigest().encode()

_SCRIPT = f"""\
c=$(echo canary | md5sum | cut -c 1-32) N={SLOTS} w=-1
get() {{ k= n=-1; dd if=/dev/vda bs={_BLOCK} skip=$1 count=1 of=/b 2>&-; read -r k n h r </b
[ "$k" = $c ] && [ "$(tail -c +{_HEADER + 1} /b | md5sum)" = "$h  -" ]; }}
s=0; while [ $s -lt $N ]; do get $s || n=-1
eval v$s=$n; [ $n -gt $w ] && w=$n; s=$((s + 1)); done
bad=0 i=$((w - N + 2)); [ $i -lt 0 ] && i=0
while [ $i -le $w ]; do eval x=\\$v$((i % N)); [ $x = $i ] || bad=$((bad + 1)); i=$((i + 1)); done
echo "found $w bad $bad"
while :; do w=$((w + 1)); seq $w $((w + 4000)) | head -c {_BLOCK - _HEADER} >/p
{{ printf '%-{_HEADER - 1}s\\n' "$c $w $(md5sum </p | cut -c 1-32)"; cat /p; }} >/o
dd if=/o of=/dev/vda bs={_BLOCK} seek=$((w % N)) conv=notrunc,fsync 2>&- || echo "failed $w"
echo "wrote $w"; i=$((w - N / 2))
if [ $i -ge 0 ] && [ $((w % 4)) = 0 ]; then echo 3 >/proc/sys/vm/drop_caches
get $((i % N)) && [ $n = $i ] || echo "damaged $i"; fi
usleep 400000; done
"""


class WritingGuest(Guest):
    """A guest that writes to its first disk; see :mod:`support.writing_guest`.

    :ivar acknowledged: the newest block that a guest is known to have flushed; -1 if none.
    """

    def __init__(
        self, host: LabHost, name: str, *, disk: str, acceleration: Acceleration, boot: LinuxMicro
    ) -> None:
        super().__init__(host, name, acceleration=acceleration, disks=[disk], boot=boot)
        self.acknowledged = -1

    def run(self) -> int:
        """Start the domain as defined, wait for the check of its disk: the newest block found.

        :raise AssertionError: When a block is damaged, or an acknowledged block is missing.
        """
        with self._domain() as domain:
            domain.create()
        return self.await_check()

    def await_check(self) -> int:
        """As :meth:`run`, of a domain just started."""
        said = self.wait_for(" bad ")
        wait_until(lambda: re.search(r" bad \d+\n", self.serial), "the guest has checked its disk")
        found = re.search(r"^found (-?\d+) bad (\d+)$", self.serial, re.MULTILINE)
        assert found, said
        newest, bad = map(int, found.groups())
        assert bad == 0, f"{bad} blocks are damaged, newest {newest}, acknowledged {self.acknowledged}"
        assert newest >= self.acknowledged, f"block {self.acknowledged} is lost, newest {newest}"
        self.acknowledged = newest
        return newest

    def check(self) -> None:
        """Note the blocks flushed so far.

        :raise AssertionError: When the guest has seen a damaged block or a failed write.
        """
        said = self.serial
        assert "damaged" not in said, said
        assert "failed" not in said, said
        self.acknowledged = max(
            [self.acknowledged, *map(int, re.findall(r"^wrote (\d+)$", said, re.MULTILINE))]
        )

    def await_writes(self) -> None:
        """Wait until the guest has written further blocks."""
        self.check()
        before = self.acknowledged

        def has_written() -> bool:
            self.check()
            return self.acknowledged > before

        wait_until(has_written, f"guest {self.name} writes on from block {before}", seconds=60)

    def define(self, script: str = _SCRIPT) -> None:
        super().define(script)


def newest_block(content: bytes) -> int:
    """The newest block of a disk with the blocks of a :class:`WritingGuest`.

    :raise AssertionError: When an older block is damaged or missing.
    """
    numbers = [_number(content[slot * _BLOCK :][:_BLOCK]) for slot in range(SLOTS)]
    newest = max(numbers)
    expected = range(max(newest - SLOTS + 2, 0), newest + 1)
    assert [numbers[each % SLOTS] for each in expected] == list(expected)
    return newest


def _number(block: bytes) -> int:
    """The number of a whole block; -1 of any other."""
    canary, number, checksum, *_ = [*block[:_HEADER].split(), b"", b"", b""][:3]
    payload = hashlib.md5(block[_HEADER:], usedforsecurity=False).hexdigest().encode()
    return int(number) if canary == CANARY and checksum == payload else -1
