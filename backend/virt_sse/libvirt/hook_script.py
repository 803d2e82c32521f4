"""The script in libvirt's ``hooks/qemu.d/`` (libvirt ``hooks.html``): what it says, and its installation.

The script lets every domain without a disk of ours pass before any Python code is loaded. For our domains the
script runs :mod:`virt_sse.hook`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path

from virt_sse.libvirt.references import PREFIX, VM_NAMESPACE

EVENTS = ("prepare", "release", "reconnect")
"""A domain is about to start; it has ended; libvirtd was restarted and has found it running."""

_SCRIPT = """\
#!/bin/sh
# Installed by 'virt-sse host init'.
# Brings libvirt the keys of a domain's encrypted disks, and takes them away when the domain has ended.
xml=$(cat)
case $2 in {events}) ;; *) exit 0 ;; esac
case $xml in
    *"usage='{prefix}"* | *'usage="{prefix}'* | *{namespace}*) ;;
    *)  # None of ours, at least now: a disk may have been unplugged, and its processes be left.
        [ "$2" = release ] || exit 0
        case $xml in *"<uuid>"*"</uuid>"*) ;; *) exit 0 ;; esac
        uuid=${{xml#*<uuid>}}
        case $(cat {stages}/*/stages.json 2>&-) in *"${{uuid%%</uuid>*}}"*) ;; *) exit 0 ;; esac ;;
esac
{environment}\
if [ -x {python} ]; then
    printf '%s\\n' "$xml" | {python} -I -m {module} "$@" && exit 0
else
    echo "virt-sse: error: the domain needs virt-sse and {python} is gone" >&2
fi
# A failure refuses the domain. But libvirt kills a running guest if its 'reconnect' hook fails.
[ "$2" = reconnect ]
"""


def script(environment: dict[str, str], stages: Path) -> str:
    """The hook script for this installation.

    :param stages: where the records of stages lie.
    :param environment: what to set for the events, because libvirtd does not pass its own on.
    """
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))
    return _SCRIPT.format(
        events=" | ".join(EVENTS),
        prefix=PREFIX,
        namespace=VM_NAMESPACE,
        environment=exports,
        stages=shlex.quote(str(stages)),
        python=shlex.quote(sys.executable),
        module="virt_sse.hook",
    )


def install(path: Path, environment: dict[str, str], stages: Path) -> bool:
    """Put the hook script at *path*, 0755; whether it was not there yet, or another.

    :raise OSError: When it cannot be written.
    """
    content = script(environment, stages)
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == content and os.access(path, os.X_OK):
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    temporary.chmod(0o755)
    temporary.rename(path)
    return True
