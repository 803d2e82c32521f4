"""The layout of the code: which room imports which, and one meaning for each class name."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from support.folders import REPOSITORY

LINES = (
    "contract lab",
    "cli",
    "agent hook",
    "backend",
    "replacement",
    "verification",
    "domains page",
    "disks host vault",
    "keys",
    "api pkcs11",
    "stages plugins audit in_guest",
    "store qemu libvirt config hookspecs vault_client",
    "model agent_client",
    "system",
    "errors",
)
"""The rooms of virt_sse, each line above the rooms that its own may import."""

MOST_LEVELS = 14
"""Rooms in the longest chain of imports."""
FOR_PLUGINS = ("api", "pkcs11", "vault_client", "cli.output", "cli.session")
FOR_VAULTS_AND_TOKENS = ("vault", "pkcs11", "vault_client", "audit", "model.events", "system", "errors")


def _sources() -> dict[str, ast.Module]:
    folders = (REPOSITORY / "backend", REPOSITORY / "plugins")
    paths = {
        path.relative_to(folder): path for folder in folders for path in folder.glob("virt_sse*/**/*.py")
    }
    return {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text("utf-8"))
        for name, path in sorted(paths.items())
    }


SOURCES = _sources()
HOST_MODULES = [module for module in SOURCES if module.startswith("virt_sse.")]


def _statements(node: ast.AST, *, in_functions: bool) -> Iterator[ast.AST]:
    """All statements that run: nothing for a type checker alone; bodies of functions only *in_functions*."""
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not is_for_types and (
            in_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            yield child
            yield from _statements(child, in_functions=in_functions)


@cache
def imports(module: str, *, in_functions: bool = True) -> frozenset[str]:
    """Modules of virt_sse and virt_sse_plugins that *module* imports."""
    names = set()
    for node in _statements(SOURCES[module], in_functions=in_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in SOURCES else node.module for name in full}
    return frozenset(names & SOURCES.keys() - {module})


def level(module: str, above: tuple[str, ...] = (), *, in_functions: bool) -> int:
    """Length of the longest chain of imports that begins with *module*."""
    assert module not in above, f"modules import each other: {' '.join((*above, module))}"
    key = (module, in_functions)
    if key not in _LEVELS:
        lower = imports(module, in_functions=in_functions)
        chain = (*above, module)
        _LEVELS[key] = 1 + max((level(each, chain, in_functions=in_functions) for each in lower), default=0)
    return _LEVELS[key]


_LEVELS: dict[tuple[str, bool], int] = {}


def is_within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"virt_sse.{room}.") for room in rooms)


def test_imports_run_from_upper_to_lower_rooms() -> None:
    line = {room: number for number, rooms in enumerate(LINES) for room in rooms.split()}

    def is_upward(module: str, other: str) -> bool:
        room, other_room = module.split(".")[1], ".".join(other.split(".")[1:2])
        return other_room not in ("", room) and line[other_room] <= line[room]

    pairs = ((module, other) for module in HOST_MODULES for other in imports(module))
    assert [(module, other) for module, other in pairs if is_upward(module, other)] == []


def test_no_modules_import_each_other() -> None:
    for module in SOURCES:
        level(module, in_functions=True)


def test_chains_of_rooms_are_short() -> None:
    below: dict[str, set[str]] = {}
    for module in HOST_MODULES:
        room = module.split(".")[1]
        others = {other.split(".")[1] for other in imports(module) if other.startswith("virt_sse.")}
        below.setdefault(room, set()).update(others - {room})

    def height(room: str) -> int:
        return 1 + max(map(height, below[room]), default=0)

    assert max(map(height, below)) <= MOST_LEVELS


def test_vaults_and_hsm_tokens_know_nothing_of_disks() -> None:
    for module in HOST_MODULES:
        if is_within(module, ("vault", "vault_client", "pkcs11")):
            assert all(is_within(other, FOR_VAULTS_AND_TOKENS) for other in imports(module)), module


def test_virt_sse_never_names_its_plugins_in_an_import() -> None:
    for module in HOST_MODULES:
        nodes = list(ast.walk(SOURCES[module]))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "virt_sse_plugins"], module


@pytest.mark.parametrize("module", [module for module in SOURCES if "plugins" in module.split(".")[0]])
def test_plugins_import_only_the_modules_for_plugins(module: str) -> None:
    others = {other for other in imports(module) if other.split(".")[0] == "virt_sse"}
    assert {other for other in others if not is_within(other, FOR_PLUGINS)} == set()


def test_no_two_classes_have_the_same_name() -> None:
    classes = [
        node.name
        for source in SOURCES.values()
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [name for name, count in Counter(classes).items() if count > 1] == []
