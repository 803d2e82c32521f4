"""Text and installation of the script in libvirt's ``hooks/qemu.d/`` (libvirt ``hooks.html``).

The script lets every domain without a disk of ours pass before any Python code is loaded. For our domains the
script runs :mod:`virt_sse.hook`.
"""

from __future__ import annotations

import contextlib
import shlex
import stat
import sys
from pathlib import Path

import virt_sse
from virt_sse.libvirt.migration_token import MIGRATION_NAMESPACE
from virt_sse.libvirt.secret_name import PREFIX
from virt_sse.libvirt.vm_metadata import VM_NAMESPACE
from virt_sse.system.files import shared_folder, write_shared

_MODE = 0o755

EVENTS = ("migrate", "prepare", "started", "release", "reconnect")
"""Events of interest: a domain is about to migrate here, is about to start, waits in QEMU for the state of a
migrating guest, has ended, was found running by a restarted libvirtd."""

_SCRIPT = """\
#!/bin/sh
# Installed by 'virt-sse host init'.
# Gives libvirt the keys of a domain's encrypted disks at start, and removes the keys at the end.
xml=$(cat)
case $2 in {events}) ;; *) exit 0 ;; esac
case $2 in started) case $xml in *{migration}*) ;; *) exit 0 ;; esac ;; esac
case $xml in
    *"usage='{prefix}"* | *'usage="{prefix}'* | *"name='{prefix}"* | *'name="{prefix}'* | *{namespace}*) ;;
    *)  # No disk of ours, but perhaps an image of ours without its key.
        if [ "$2" = prepare ]; then
            # The domain's few names are the patterns: patterns of all images would take long to load.
            printf '%s\\n' "$xml" | LC_ALL=C grep -oE "[a-z]+='[^']*'" | sed '/^volume=/!s/^[a-z]*=//' |
                LC_ALL=C grep -qxFf - {images} 2>/dev/null || exit 0
        # An unplugged disk may have left processes, which end with the domain.
        elif [ "$2" = release ]; then
            case $xml in *"<uuid>"*"</uuid>"*) ;; *) exit 0 ;; esac
            uuid=${{xml#*<uuid>}}
            case $(cat {stages}/*/stages.json 2>&-) in *"${{uuid%%</uuid>*}}"*) ;; *) exit 0 ;; esac
        else
            exit 0
        fi ;;
esac
{environment}\
if [ -x {python} ]; then
    printf '%s\\n' "$xml" | {python} -I -S -c {program} "$@" && exit 0
else
    echo "virt-sse: error: the domain needs virt-sse and {python} is gone" >&2
fi
# A failure refuses the domain. But libvirt kills a running guest if its 'reconnect' hook fails.
[ "$2" = reconnect ]
"""


_PROGRAM = """\
import sys
sys.path.append({folder!r})
from virt_sse.hook import main
sys.path.pop()
sys.exit(main())"""


def program() -> str:
    """The program that the script runs, for ``python -I -S -c``.

    With ``-S``, Python starts in a third of the time, and finds the standard library only.
    """
    return _PROGRAM.format(folder=str(Path(virt_sse.__file__).resolve().parents[1]))


def script(environment: dict[str, str], stages: Path, images: Path) -> str:
    """The text of the hook script.

    :param environment: variables for the hook, because libvirtd does not pass on its own environment.
    :param stages: folder with the records of stages.
    :param images: file with the paths of the images.
    """
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))
    return _SCRIPT.format(
        events=" | ".join(EVENTS),
        prefix=PREFIX,
        namespace=VM_NAMESPACE,
        migration=MIGRATION_NAMESPACE,
        environment=exports,
        stages=shlex.quote(str(stages)),
        images=shlex.quote(str(images)),
        python=shlex.quote(sys.executable),
        program=shlex.quote(program()),
    )


def install(path: Path, environment: dict[str, str], stages: Path, images: Path) -> bool:
    """Install the hook script at *path* with mode 0755.

    :return: whether the file was missing or different, its mode included: others must not change the script.
    :raise OSError: When the file cannot be written.
    """
    content = script(environment, stages, images).encode()
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content and stat.S_IMODE(path.stat().st_mode) == _MODE:
            return False
    shared_folder(path.parent)
    write_shared(path, content, _MODE)
    return True
