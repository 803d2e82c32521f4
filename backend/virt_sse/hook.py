"""The entry point of the libvirt qemu hook (libvirt ``hooks.html``): serves an event of a domain.

The installed hook script (:mod:`virt_sse.libvirt.hook_script`) runs this module for virt-sse's domains only.
The event goes to the agent. If no agent answers, this process serves the event itself, with the same effect.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Serve an event: arguments as libvirt gives them to a hook, the domain's XML on standard input."""
    _, domain, event, *_ = sys.argv
    xml = sys.stdin.buffer.read().decode(errors="surrogateescape")  # the parser refuses surrogates
    from virt_sse import agent_client
    from virt_sse.errors import VirtSseError, report
    from virt_sse.system.process_hardening import protect_memory

    root = Path(os.environ.get("VIRT_SSE_ROOT") or "/")
    try:
        protect_memory()
        if not agent_client.serve_event(root, event, domain, xml):
            _serve(event, xml)
    except VirtSseError as exc:
        report(exc)
        return 1
    return 0


def _serve(event: str, xml: str) -> None:
    from virt_sse.libvirt.domain_definition import DomainDefinition

    if event == "release":  # without the store, which takes most of the time to load
        from virt_sse.config import Config
        from virt_sse.domains.release import release

        release(Config.load(), DomainDefinition.salvage(xml))
    elif event in ("prepare", "reconnect"):
        from virt_sse.backend import Backend

        with Backend.open() as backend:
            if event == "prepare":
                backend.domains.prepare(DomainDefinition.parse(xml))
            else:
                backend.domains.reconnect(DomainDefinition.salvage(xml))


if __name__ == "__main__":
    sys.exit(main())
