"""The libvirt hook loads little: a domain's end waits for the hook."""

from __future__ import annotations

import subprocess
import sys


def test_a_release_loads_no_store() -> None:
    program = (
        "import sys\n"
        "import virt_sse.hook, virt_sse.config, virt_sse.domains.release\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "virt_sse" in loaded
    assert not loaded & {"sqlalchemy", "alembic", "virt_sse_plugins", "rich", "typer", "http"}
