from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent
from uuid import UUID, uuid4

import pytest
import typer

from support.folders import REPOSITORY
from virt_sse import hookspecs
from virt_sse.config import Config
from virt_sse.errors import ConfigError, KeyringError, PluginError, PolicyError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.events import KeyAction, KeyEvent
from virt_sse.model.keys import DekContext, KeyId, KeyRef
from virt_sse.model.layers import EncryptionType
from virt_sse.model.operations import CreateDisk
from virt_sse.plugins import ENTRY_POINT_GROUP, PluginHost

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("virt_sse_"))

KEY_PROVIDER = """
    from virt_sse.api import hookimpl
    from virt_sse.api import KeyProvider

    class Provider(KeyProvider):
        name = "{name}"

        def __init__(self, config):
            self.config = config

        @classmethod
        def from_config(cls, config):
            return cls(config)

        def current_key(self, name): ...
        def wrap(self, dek, key, *, context): ...
        def unwrap(self, wrapped, *, context): ...
        def key_state(self, key): ...

        def close(self):
            self.config = None

    @hookimpl
    def virt_sse_register_key_providers(register):
        register("{name}", lambda: Provider)
"""

LAYER = """
    from virt_sse.api import hookimpl
    from virt_sse.api import EncryptionLayer, EncryptionType, LayerPlan

    class Layer(EncryptionLayer):
        name = "{name}"
        encryption_types = frozenset({{EncryptionType.CUSTOMER_KEY}})

        def plan(self, choice):
            return LayerPlan(deks=(), stages=())

    @hookimpl
    def virt_sse_register_encryption_layers(register):
        register("{name}", lambda: Layer)
"""

InstallPlugin = Callable[[str, str], EntryPoint]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InstallPlugin]:
    """Writes a plugin's module and returns its entry point; ``our-policy`` becomes ``our_policy.py``."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: set[str] = set()

    def install_plugin(name: str, source: str) -> EntryPoint:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(dedent(source), "utf-8")
        modules.add(module)
        return EntryPoint(name, module, ENTRY_POINT_GROUP)

    yield install_plugin
    for module in modules:
        sys.modules.pop(module, None)


def make_host(tmp_path: Path, *entry_points: EntryPoint, config: str = "") -> PluginHost:
    path = tmp_path / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config, "utf-8")
    return PluginHost(Config.load(tmp_path), entry_points)


def operation(tmp_path: Path) -> CreateDisk:
    return CreateDisk(
        name="web-1",
        size=1 << 30,
        path=tmp_path / "web-1.qcow2",
        format=DiskFormat.QCOW2,
        encryption_type=EncryptionType.PLATFORM_KEY,
        key=KeyRef("platform-managed", "default"),
    )


def test_virt_sse_register_key_providers_adds_a_provider(tmp_path: Path, install: InstallPlugin) -> None:
    host = make_host(
        tmp_path,
        install("ours", KEY_PROVIDER.format(name="our-hsm")),
        config="[key-providers.our-hsm]\nslot = 3\n",
    )
    assert host.broken == []
    assert host.key_provider_names() == ["our-hsm"]
    provider = host.key_provider("our-hsm")
    assert host.key_provider("our-hsm") is provider
    assert vars(provider)["config"] == Config.load(tmp_path).key_provider("our-hsm")
    assert host.key_provider("our-hsm", uuid4()) is provider, "it acts with no set's identity"
    assert vars(provider)["config"].options == {"slot": 3}
    host.close()
    assert vars(provider)["config"] is None


def test_virt_sse_register_encryption_layers_adds_a_layer(tmp_path: Path, install: InstallPlugin) -> None:
    host = make_host(tmp_path, install("ours", LAYER.format(name="ours")))
    assert host.broken == []
    assert host.encryption_layer_names() == ["ours"]
    assert host.encryption_layer(EncryptionType.CUSTOMER_KEY).name == "ours"
    with pytest.raises(ConfigError, match="no encryption layers serve EncryptionAtRestWithPlatformKey"):
        host.encryption_layer(EncryptionType.PLATFORM_KEY)


def test_virt_sse_add_commands_adds_a_command(tmp_path: Path, install: InstallPlugin) -> None:
    commands = """
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_add_commands(app):
            @app.command()
            def compliance() -> None: ...
    """
    failing = """
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_add_commands(app):
            raise RuntimeError("no typer today")
    """
    host = make_host(tmp_path, install("compliance", commands), install("broken-commands", failing))
    app = typer.Typer()
    host.add_commands(app)
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == [
        "compliance"
    ]
    assert [str(error) for error in host.broken] == [
        "plugin 'broken-commands': cannot add its commands: no typer today"
    ]


def test_virt_sse_validate_refuses_an_operation(tmp_path: Path, install: InstallPlugin) -> None:
    policy = """
        from virt_sse.api import PolicyError
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_validate(operation):
            if operation.name.startswith("web"):
                raise PolicyError("web servers have no disks", hint="ask in room 5")
    """
    allowing = """
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_validate(): ...
    """
    host = make_host(tmp_path, install("allowing", allowing))
    host.validate(operation(tmp_path))
    host = make_host(tmp_path, install("allowing", allowing), install("our-policy", policy))
    with pytest.raises(PolicyError, match="web servers have no disks") as caught:
        host.validate(operation(tmp_path))
    assert caught.value.hint == "ask in room 5"


def test_virt_sse_key_event_observes_every_use_of_a_key(
    tmp_path: Path, install: InstallPlugin, caplog: pytest.LogCaptureFixture
) -> None:
    observer = """
        from virt_sse.api import hookimpl

        seen = []

        @hookimpl
        def virt_sse_key_event(event):
            seen.append(event)
    """
    failing = """
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_key_event(event):
            raise SystemError("siren is out of order")
    """
    host = make_host(
        tmp_path,
        install("a-siren", failing),
        install("journal", observer),
        install("z-siren", failing),
    )
    event = KeyEvent(
        KeyAction.UNWRAP,
        KeyId("platform-managed", "default", "7f"),
        DekContext(UUID(int=1), "service"),
        error="key is disabled",
    )
    with caplog.at_level(logging.ERROR):
        host.key_event(event)
    assert sys.modules["journal"].seen == [event]
    assert [record.getMessage() for record in caplog.records] == [
        f"plugin '{name}' failed as an observer of key events" for name in ("a-siren", "z-siren")
    ]
    assert "siren is out of order" in caplog.text


def test_virt_sse_cloud_profile_of_a_site_precedes_the_built_in(
    tmp_path: Path, install: InstallPlugin
) -> None:
    profile = """
        from virt_sse.api import CloudProfile, hookimpl

        @hookimpl
        def virt_sse_cloud_profile(site):
            return {answer}
    """
    built_in = install("builtin-rules", profile.format(answer='CloudProfile("built-in")'))
    silent = install("a-silent", profile.format(answer="None"))
    ours = install("z-ours", profile.format(answer="CloudProfile(site.region)"))
    assert make_host(tmp_path).cloud_profile().sets_per_region is None
    assert make_host(tmp_path, built_in, silent).cloud_profile().name == "built-in"
    assert make_host(tmp_path, built_in, silent, ours).cloud_profile().name == "default"
    for answer, error in (
        ("site.nothing", "failed: AttributeError"),
        ("'2020'", "returned no cloud profile"),
    ):
        broken = install("a-broken", profile.format(answer=answer))
        sys.modules.pop("a_broken", None)
        importlib.invalidate_caches()
        with pytest.raises(PolicyError, match=error):
            make_host(tmp_path, built_in, broken).cloud_profile()


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_and_stands_in_the_readme(hook: str) -> None:
    assert any(name.startswith(f"test_{hook}_") for name in globals())
    assert f"### `{hook}(" in (REPOSITORY / "plugins/README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library", "does not import: ModuleNotFoundError: No module named 'no_such_library'"),
        ("def (", "does not import: SyntaxError"),
        ("raise SystemExit('no licence')", "does not import: SystemExit: no licence"),
        (
            "from virt_sse.api import hookimpl\n@hookimpl\ndef virt_sse_validat(operation): ...",
            "unknown hook 'virt_sse_validat'",
        ),
        (
            "from virt_sse.api import hookimpl\n@hookimpl\ndef virt_sse_validate(operations): ...",
            "{'operations'} are declared in the hookimpl but can not be found in the hookspec",
        ),
        (
            "from virt_sse.api import hookimpl\n"
            "@hookimpl\ndef virt_sse_register_key_providers(register): register('theirs')",
            "missing 1 required positional argument: 'load'",
        ),
        (
            "from virt_sse.api import hookimpl\n"
            "@hookimpl(wrapper=True)\ndef virt_sse_validate(operation): return (yield)",
            "virt_sse_validate cannot be a hook wrapper",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a-broken-one", "z-broken-one"])
def test_a_broken_plugin_is_named_in_one_line_and_the_others_work(
    tmp_path: Path, install: InstallPlugin, name: str, source: str, reason: str
) -> None:
    host = make_host(tmp_path, install(name, source), install("ours", KEY_PROVIDER.format(name="our-hsm")))
    [error] = host.broken
    assert error.plugin == name
    assert str(error).startswith(f"plugin '{name}': ")
    assert reason in str(error)
    assert "\n" not in str(error)
    assert host.key_provider("our-hsm").name == "our-hsm"
    host.validate(operation(tmp_path))
    with pytest.raises(ConfigError, match="no key provider named 'theirs'") as caught:
        host.key_provider("theirs")
    assert caught.value.hint == f"registered: our-hsm; {error}"


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    host = make_host(tmp_path, EntryPoint("gone", "no_such_module", ENTRY_POINT_GROUP))
    assert [str(error) for error in host.broken] == [
        "plugin 'gone': does not import: ModuleNotFoundError: No module named 'no_such_module'"
    ]


def test_a_provider_name_in_use_is_refused(tmp_path: Path, install: InstallPlugin) -> None:
    host = make_host(
        tmp_path,
        install("first", KEY_PROVIDER.format(name="hsm")),
        install("second", KEY_PROVIDER.format(name="hsm")),
    )
    assert [str(error) for error in host.broken] == [
        "plugin 'second': key provider 'hsm' is already registered by 'first'"
    ]
    assert type(host.key_provider("hsm")).__module__ == "first"


def test_a_plugin_name_in_use_is_refused(tmp_path: Path, install: InstallPlugin) -> None:
    ours = install("ours", KEY_PROVIDER.format(name="our-hsm"))
    theirs = install("theirs", KEY_PROVIDER.format(name="their-hsm"))
    host = make_host(tmp_path, ours, EntryPoint("ours", theirs.value, ENTRY_POINT_GROUP))
    assert [str(error) for error in host.broken] == ["plugin 'ours': another plugin has this name"]
    assert host.key_provider_names() == ["our-hsm"]


@pytest.mark.parametrize("when", ["load", "from_config"])
def test_a_provider_that_does_not_load_breaks_nothing_until_it_is_used(
    tmp_path: Path, install: InstallPlugin, when: str
) -> None:
    lazy = f"""
        from virt_sse.api import KeyringError
        from virt_sse.api import hookimpl

        class Provider:
            name = "lazy"

            @classmethod
            def from_config(cls, config):
                raise KeyringError("it is lost")

        def load():
            if {when!r} == "load":
                import no_such_library
            return Provider

        @hookimpl
        def virt_sse_register_key_providers(register):
            register("lazy", load)
    """
    host = make_host(tmp_path, install("lazy", lazy), install("ours", KEY_PROVIDER.format(name="our-hsm")))
    assert host.broken == []
    assert host.key_provider_names() == ["lazy", "our-hsm"]
    assert host.key_provider("our-hsm").name == "our-hsm"
    if when == "load":
        with pytest.raises(PluginError, match="key provider 'lazy' does not load: No module named") as caught:
            host.key_provider("lazy")
        assert caught.value.plugin == "lazy"
    else:
        with pytest.raises(KeyringError, match="it is lost"):
            host.key_provider("lazy")
    host.close()


def test_a_provider_that_calls_itself_otherwise_is_refused(tmp_path: Path, install: InstallPlugin) -> None:
    source = KEY_PROVIDER.format(name="our-hsm").replace('register("our-hsm"', 'register("hsm"')
    host = make_host(tmp_path, install("ours", source))
    with pytest.raises(PluginError, match="plugin 'ours': key provider 'hsm' has a class named 'our-hsm'"):
        host.key_provider("hsm")


def test_a_policy_that_crashes_is_a_refusal(tmp_path: Path, install: InstallPlugin) -> None:
    source = """
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_validate(operation):
            operation.no_such_field
    """
    host = make_host(tmp_path, install("our-policy", source))
    with pytest.raises(PolicyError, match="policy plugin 'our-policy' failed: AttributeError: ") as caught:
        host.validate(operation(tmp_path))
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_policy_that_answers_instead_of_raising_is_a_refusal(
    tmp_path: Path, install: InstallPlugin
) -> None:
    source = """
        from virt_sse.api import hookimpl

        @hookimpl
        def virt_sse_validate(operation):
            return False
    """
    with pytest.raises(PolicyError, match="'ours' returned a value"):
        make_host(tmp_path, install("ours", source)).validate(operation(tmp_path))


def test_two_layers_for_one_encryption_type_are_refused(tmp_path: Path, install: InstallPlugin) -> None:
    host = make_host(
        tmp_path, install("one", LAYER.format(name="one")), install("two", LAYER.format(name="two"))
    )
    with pytest.raises(ConfigError, match="2 encryption layers") as caught:
        host.encryption_layer(EncryptionType.CUSTOMER_KEY)
    assert caught.value.hint == "layers: one, two"


def test_a_layer_that_does_not_load_costs_the_others_nothing(tmp_path: Path, install: InstallPlugin) -> None:
    broken = LAYER.format(name="aaa").replace("lambda: Layer", "lambda: 1 / 0")
    host = make_host(tmp_path, install("aaa", broken), install("ours", LAYER.format(name="ours")))
    assert host.encryption_layer(EncryptionType.CUSTOMER_KEY).name == "ours"
    with pytest.raises(ConfigError) as caught:
        host.encryption_layer(EncryptionType.PLATFORM_KEY)
    assert "'aaa': encryption layer 'aaa' does not load" in str(caught.value.hint)


def test_an_installed_required_plugin_is_accepted(tmp_path: Path, install: InstallPlugin) -> None:
    ours = install("ours", KEY_PROVIDER.format(name="our-hsm"))
    host = make_host(tmp_path, ours, config='plugins.required = ["ours"]')
    assert host.key_provider_names() == ["our-hsm"]


def test_a_missing_required_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="plugin 'our-policy' is required by the configuration but not installed"
    ):
        make_host(tmp_path, config='plugins.required = ["our-policy"]')


def test_a_broken_required_plugin_is_refused(tmp_path: Path, install: InstallPlugin) -> None:
    with pytest.raises(PluginError, match="plugin 'our-policy': does not import"):
        make_host(
            tmp_path,
            install("our-policy", "import no_such_library"),
            config='plugins.required = ["our-policy"]',
        )


def test_the_built_in_plugins_come_in_through_the_entry_points(tmp_path: Path) -> None:
    host = PluginHost(Config.load(tmp_path))
    assert "platform-managed" in host.key_provider_names()
    assert "single" in host.encryption_layer_names()
    assert host.key_provider("platform-managed").name == "platform-managed"
    assert host.encryption_layer(EncryptionType.PLATFORM_KEY).name == "single"
