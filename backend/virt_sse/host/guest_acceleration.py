"""Installation of the XTS library for guests' QEMU processes, if QEMU encrypts faster with the library."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from virt_sse.config import Config
from virt_sse.errors import ConfigError, ToolError
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import luks, unlocking
from virt_sse.system import acceleration
from virt_sse.system.files import write_at

_LEAST_GAIN = 1.3
"""Factor below which the library is not worth a preload in each guest's QEMU."""
_BYTES = 32 << 20
_ROUNDS = 3
_SECONDS = 20


def accelerate_guests(config: Config) -> str:
    """Install the library where guests' QEMU processes can load it, if QEMU gains by the library.

    :return: what was done, or why nothing was done, in words.
    :raise ToolError: When the gain cannot be measured.
    :raise ConfigError: When the library cannot be installed.
    """
    library = config.guest_library
    if reason := acceleration.obstacle():
        return f"left acceleration off: {reason}"
    if (path := acceleration.path_in_qemu()) is None:
        return "left acceleration off: QEMU does not use nettle, or a self-test failed"
    gain = measured_gain()
    if gain < _LEAST_GAIN:
        return f"left acceleration off: QEMU encrypts only {gain:.1f} times as fast with the library"
    try:
        is_new = library.install()
    except OSError as exc:
        raise ConfigError(f"cannot install {library.path}: {exc.strerror}") from exc
    measured = f"QEMU encrypts {gain:.1f} times as fast ({path})"
    return f"{'made' if is_new else 'kept'} library {library.path}: {measured}"


def stop_acceleration(config: Config) -> str:
    """Remove the library for guests; domains that ask for the library start without. What was done, in words.

    :raise ConfigError: When the library cannot be removed.
    """
    library = config.guest_library
    try:
        is_removed = library.remove()
    except OSError as exc:
        raise ConfigError(f"cannot remove {library.path}: {exc.strerror}") from exc
    return f"removed library {library.path}" if is_removed else "nothing to remove"


def measured_gain() -> float:
    """How many times as fast QEMU encrypts with the library; the best of several writes to memory each.

    :raise ToolError: When qemu-io fails.
    """
    header = luks.make_header(AES_256_XTS, dek := Dek.generate())
    image = os.memfd_create("gain")
    try:
        write_at(image, header, 0)
        os.truncate(image, len(header) + _BYTES)
        environments = (acceleration.ALLOCATOR, acceleration.environment())
        rates = [[_rate(image, dek, each) for each in environments] for _ in range(_ROUNDS)]
    finally:
        os.close(image)
    without, with_library = (max(found) for found in zip(*rates, strict=True))
    return float(with_library / without)


def _rate(image: int, dek: Dek, environment: Mapping[str, str]) -> float:
    """Bytes per second of a write through LUKS."""
    options = unlocking.image_options(Path(f"/proc/self/fd/{image}"), DiskFormat.RAW, 1)
    try:
        with unlocking.secrets_for([dek]) as (secrets, descriptors):
            said = subprocess.run(
                ["qemu-io", *secrets, "-c", f"write -C 0 {_BYTES}", "--image-opts", options],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[*descriptors, image],
                timeout=_SECONDS,
                check=True,
                env={**os.environ, **environment},
            ).stdout
        return float(said.split(b",")[3])  # bytes, operations, time, bytes per second, operations per second
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as exc:
        raise ToolError(f"cannot measure QEMU's encryption: {exc}") from exc
