"""Variables for a domain's QEMU: set and removed without a change to the other variables."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.libvirt.qemu_environment import QEMU_NAMESPACE, loaded_code, variables

LIBRARY = Path("/usr/lib/x86_64-linux-gnu/qemu/libvirt_sse_xts.so")
SETTINGS = {"MALLOC_TOP_PAD_": "1", "MALLOC_ARENA_MAX": "8"}
OURS = [("LD_PRELOAD", str(LIBRARY)), *SETTINGS.items()]
UUID = "b6a1c5f2-3f4d-4a0b-9c57-0f0f5f0e7c11"


def domain(*items: str) -> DomainDefinition:
    command_line = f"<qemu:commandline>{''.join(items)}</qemu:commandline>" if items else ""
    return DomainDefinition.parse(
        f"<domain xmlns:qemu='{QEMU_NAMESPACE}'><name>d</name><uuid>{UUID}</uuid>{command_line}</domain>"
    )


def env(name: str, value: str) -> str:
    return f"<qemu:env name='{name}' value='{value}'/>"


def changed(definition: DomainDefinition, *, preloaded: bool) -> DomainDefinition:
    edit = DomainEdit(definition)
    edit.set_preload(LIBRARY, SETTINGS, preloaded=preloaded)
    return DomainDefinition.parse(edit.result().to_xml())


def names_and_values(definition: DomainDefinition) -> list[tuple[str, str]]:
    return variables(definition.copy_tree()[0])


def canonical(definition: DomainDefinition) -> str:
    return ET.canonicalize(ET.tostring(definition.copy_tree()[0], encoding="unicode"))


ARGUMENT = "<qemu:arg value='-no-shutdown'/>"
OWN = {
    "nothing": (),
    "an argument": (ARGUMENT,),
    "a variable": (env("PULSE_SERVER", "none"),),
    "a setting of the allocator": (env("MALLOC_ARENA_MAX", "4"),),
    "our own setting of the allocator": (env("MALLOC_ARENA_MAX", "8"), ARGUMENT),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_removal_restores_the_definition(own: tuple[str, ...]) -> None:
    before = domain(*own)
    on = changed(before, preloaded=True)
    kept = names_and_values(before)
    assert names_and_values(on) == kept + [each for each in OURS if each[0] not in dict(kept)]
    assert names_and_values(changed(on, preloaded=True)) == names_and_values(on)
    assert canonical(changed(on, preloaded=False)) == canonical(before)
    assert canonical(changed(before, preloaded=False)) == canonical(before)


def test_variables_added_later_stay() -> None:
    on = changed(domain(), preloaded=True)
    later = DomainDefinition.parse(
        on.to_xml().replace("</qemu:commandline>", f"{env('A', 'b')}</qemu:commandline>")
    )
    assert names_and_values(changed(later, preloaded=False)) == [("A", "b")]


def test_settings_of_an_earlier_version_are_replaced() -> None:
    on = changed(domain(), preloaded=True)
    earlier = DomainDefinition.parse(on.to_xml().replace('value="8"', 'value="2"'))
    assert names_and_values(changed(earlier, preloaded=True)) == OURS


@pytest.mark.parametrize("value", ["/own.so", "libm.so.6 /own.so"])
def test_another_preloaded_library_is_refused(value: str) -> None:
    with pytest.raises(InvalidValueError, match=r"preloads a library of its own: .*/own\.so"):
        changed(domain(env("LD_PRELOAD", value)), preloaded=True)


@pytest.mark.parametrize("value", [f"{LIBRARY}:/own.so", f"/own.so {LIBRARY}"])
def test_a_library_added_beside_ours_stays(value: str) -> None:
    with_both = domain(env("LD_PRELOAD", value), env("MALLOC_ARENA_MAX", "8"))
    with pytest.raises(InvalidValueError, match="preloads a library of its own"):
        changed(with_both, preloaded=True)
    assert names_and_values(changed(with_both, preloaded=False)) == [("LD_PRELOAD", "/own.so")]


def test_all_variables_that_make_qemu_load_code_are_seen() -> None:
    environment = [
        ("LD_PRELOAD", "/a.so:libb.so  /c.so"),
        ("LD_AUDIT", "/d.so:/e.so"),
        ("LD_LIBRARY_PATH", "/f:/g"),
        ("GCONV_PATH", "/h"),
        ("QEMU_MODULE_DIR", "/i: j"),
        ("LD_BIND_NOW", "1"),
        ("PATH", "/bin"),
    ]
    assert [(each.variable, each.name) for each in loaded_code(environment)] == [
        ("LD_PRELOAD", "/a.so"),
        ("LD_PRELOAD", "libb.so"),
        ("LD_PRELOAD", "/c.so"),
        ("LD_AUDIT", "/d.so"),
        ("LD_AUDIT", "/e.so"),
        ("LD_LIBRARY_PATH", "/f"),
        ("LD_LIBRARY_PATH", "/g"),
        ("GCONV_PATH", "/h"),
        ("QEMU_MODULE_DIR", "/i: j"),
    ]
    assert domain(env("LD_AUDIT", "/x.so")).loaded_code[0].name == "/x.so"
