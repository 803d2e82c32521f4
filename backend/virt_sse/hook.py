"""The entry point of the libvirt qemu hook (libvirt ``hooks.html``): serves an event of a domain.

The installed hook script (:mod:`virt_sse.libvirt.hook_script`) runs this module for virt-sse's domains only.
The event goes to the agent. If no agent answers, this process serves the event itself, with the same effect.

A domain's start waits for the imports, hence ``python -S``, and neither pathlib nor typing for the agent's
client.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import resource
import sys
from collections.abc import Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virt_sse.domains.start import DomainStart


def main() -> int:
    """Serve an event: arguments as libvirt gives them to a hook, the domain's XML on standard input."""
    gc.disable()  # this process ends soon: collections would only delay the domain
    atexit.register(gc.freeze)  # also the one at the end
    _, domain, event, *_ = sys.argv
    xml = sys.stdin.buffer.read().decode(errors="surrogateescape")  # the parser refuses surrogates
    from virt_sse import agent_client
    from virt_sse.errors import VirtSseError, report

    try:
        # The agent's client reads no key. libvirt leaves passwords out of the XML, too, except for "migrate".
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        changed = agent_client.serve_event(os.environ.get("VIRT_SSE_ROOT") or "/", event, domain, xml)
        if changed is None:
            changed = _serve(event, xml)
        sys.stdout.buffer.write(changed.encode())
    except VirtSseError as exc:
        report(exc)
        return 1
    return 0


def _serve(event: str, xml: str) -> str:
    """Serve an event: the definition for libvirt, empty for the present one."""
    if sys.flags.no_site:
        import site

        site.main()  # finds the packages of other projects
    from virt_sse.system.process_hardening import protect_memory

    protect_memory()
    _load_libvirt_ahead()
    from virt_sse.libvirt.domain_definition import DomainDefinition

    if event == "release":  # without the store, which takes most of the time to load
        from virt_sse.config import Config
        from virt_sse.domains.release import release

        release(Config.load(), DomainDefinition.salvage(xml))
    elif event == "started":
        from virt_sse.config import Config
        from virt_sse.domains.incoming import IncomingDomains

        IncomingDomains(Config.load()).check_started(DomainDefinition.parse(xml))
    elif event in ("migrate", "prepare", "reconnect"):
        with _domain_start() as start:
            if event == "migrate":
                return start.announce(DomainDefinition.parse(xml))
            if event == "prepare":
                start.prepare(DomainDefinition.parse(xml))
            else:
                start.reconnect(DomainDefinition.salvage(xml))
    return ""


def _load_libvirt_ahead() -> None:
    """Load libvirt's libraries in a thread: 20 ms without the interpreter's lock, which an import holds."""
    from importlib.machinery import PathFinder
    from threading import Thread

    found = PathFinder.find_spec("libvirtmod")
    if found and found.origin:
        Thread(target=_load_library, args=[found.origin]).start()


def _load_library(path: str) -> None:
    import ctypes

    with contextlib.suppress(OSError):  # the import reports the error
        ctypes.CDLL(path)


@contextlib.contextmanager
def _domain_start() -> Iterator[DomainStart]:
    """The start of domains, without the other services of the backend, which take long to load.

    Where killed commands left work, the whole backend is opened, and finishes the work first.
    """
    from virt_sse.audit.record import Component
    from virt_sse.config import Config
    from virt_sse.domains import temp_disks
    from virt_sse.domains.host_encryption import HostEncryption
    from virt_sse.domains.start import DomainStart
    from virt_sse.keys.host import Host

    config = Config.load()
    with contextlib.closing(Host.open(config, component=Component.HOST)) as host:
        if not host.has_unfinished_work():
            temp_disks.erase_of_other_boots(config)
            yield DomainStart(host, HostEncryption(host))
            return
    from virt_sse.backend import Backend

    with Backend(config, in_hook=True) as backend:
        yield backend.domains


if __name__ == "__main__":
    sys.exit(main())
