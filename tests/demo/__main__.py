"""Plays all acts; exits with status 1 on an unexpected result."""

from __future__ import annotations

import sys
import time

import customer_key
import disk_life
import look
import platform_key
import two_layers
from stage import Stage
from virt_sse.errors import VirtSseError, report
from virt_sse.lab.host import LabHost


def main() -> None:
    """Run the demo."""
    began = time.monotonic()
    try:
        with LabHost("demo") as host:
            stage = Stage(host)
            platform_key.play(stage)
            customer_key.play(stage)
            two_layers.play(stage)
            disk_life.play(stage)
            look.play(stage)
    except VirtSseError as exc:
        report(exc)
        for note in getattr(exc, "__notes__", ()):
            print(note, file=sys.stderr)
        sys.exit(1)
    print(f"\nAll results as expected, in {time.monotonic() - began:.0f} s. The lab was removed.")


if __name__ == "__main__":
    main()
