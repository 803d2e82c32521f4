"""The plugin host: a typed façade over pluggy."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import pluggy

from virt_sse import hookspecs
from virt_sse.errors import ConfigError, KeyDeniedError, PluginError, PolicyError
from virt_sse.model.cloud import CloudProfile
from virt_sse.model.layers import EncryptionLayer, HostLayer
from virt_sse.system.entry_points import installed_entry_points
from virt_sse.system.extras import extra_error

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    import typer

    from virt_sse.config import Config
    from virt_sse.model.events import KeyEvent
    from virt_sse.model.keys import KeyProvider
    from virt_sse.model.layers import EncryptionType
    from virt_sse.model.operations import Operation

_log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "virt_sse"

T = TypeVar("T")
L = TypeVar("L", EncryptionLayer, HostLayer)


class EntryPoint(Protocol):
    """An entry point, as in :mod:`importlib.metadata` and :mod:`virt_sse.system.entry_points`."""

    @property
    def name(self) -> str:
        """The plugin's name."""

    def load(self) -> object:
        """Import the plugin."""


class _Registry(Generic[T]):
    """Registered classes by name, imported at first use."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._loaders: dict[str, tuple[str, Callable[[], type[T]]]] = {}

    def registrar(self, plugin: str) -> Callable[[str, Callable[[], type[T]]], None]:
        """The ``register`` callable for *plugin*."""

        def register(name: str, load: Callable[[], type[T]]) -> None:
            if name in self._loaders:
                owner = self._loaders[name][0]
                raise PluginError(plugin, f"{self._kind} {name!r} is already registered by {owner!r}")
            self._loaders[name] = (plugin, load)

        return register

    def forget(self, plugin: str) -> None:
        self._loaders = {name: entry for name, entry in self._loaders.items() if entry[0] != plugin}

    def names(self) -> list[str]:
        return sorted(self._loaders)

    def plugin(self, name: str) -> str:
        return self._loaders[name][0]

    def load(self, name: str, broken: Iterable[PluginError]) -> type[T]:
        if name not in self._loaders:
            known = ", ".join(self.names()) or "none"
            hint = f"registered: {known}" + "".join(f"; {error}" for error in broken)
            raise ConfigError(f"no {self._kind} named {name!r}", hint=hint)
        plugin, load = self._loaders[name]
        try:
            return load()
        except Exception as exc:
            missing = extra_error(exc) if isinstance(exc, ModuleNotFoundError) else None
            raise PluginError(
                plugin,
                f"{self._kind} {name!r} does not load: {missing or exc}",
                hint=missing.hint if missing else None,
            ) from exc


def _only(serving: list[type[L]], what: str, broken: Iterable[PluginError]) -> type[L]:
    """The only layer of *serving*.

    :param what: the layer's service, for the message.
    :raise ConfigError: When *serving* has no layer, or more than one.
    """
    if len(serving) != 1:
        hint = f"layers: {', '.join(layer.name for layer in serving)}" if serving else None
        raise ConfigError(
            f"{len(serving) or 'no'} encryption layers {what}",
            hint=hint or "; ".join(map(str, broken)) or None,
        )
    return serving[0]


def _call(implementation: pluggy.HookImpl, **arguments: object) -> object:
    """Call one plugin's implementation with only the arguments in its signature, as pluggy does."""
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def _stamp(path: Path) -> object:
    """A value that changes when the file is replaced; ``None`` for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns)


class PluginHost:
    """Loads plugins and calls their hooks.

    A plugin is left out, and added to :attr:`broken`, when its import fails or when it implements an unknown
    hook. All other plugins keep working.

    :param entry_points: entry points to load; by default all of group ``virt_sse``.
    :raise PluginError: When a plugin required by the configuration is broken.
    :raise ConfigError: When a required plugin is not installed.
    """

    def __init__(self, config: Config, entry_points: Iterable[EntryPoint] | None = None) -> None:
        self._config = config
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._provider_classes: _Registry[KeyProvider] = _Registry("key provider")
        self._layer_classes: _Registry[EncryptionLayer | HostLayer] = _Registry("encryption layer")
        self._providers: dict[tuple[str, UUID | None], KeyProvider] = {}
        self._identities: dict[tuple[str, UUID | None], object] = {}
        self._lock = threading.RLock()
        self.broken: list[PluginError] = []
        """Errors of the plugins left out."""

        if entry_points is None:
            entry_points = installed_entry_points(ENTRY_POINT_GROUP)
        for entry_point in sorted(entry_points, key=lambda point: point.name):
            self._load(entry_point)
        self._require(config.required_plugins)

    def _load(self, entry_point: EntryPoint) -> None:
        try:
            self.register(entry_point.load(), entry_point.name)
        except PluginError as exc:
            self.broken.append(exc)
        except (Exception, SystemExit) as exc:  # noqa: BLE001 -- a failing import must affect only its plugin
            self.broken.append(PluginError(entry_point.name, f"does not import: {type(exc).__name__}: {exc}"))

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            for error in self.broken:
                if error.plugin == name:
                    raise error
            if not self._manager.has_plugin(name):
                raise ConfigError(f"plugin {name!r} is required by the configuration but not installed")

    def register(self, plugin: object, name: str) -> None:
        """Add *plugin*, a module or an object, under *name*.

        :raise PluginError: When the plugin implements an unknown hook, or a hook with wrong arguments, or
            when its registration hooks fail; the plugin is then left out entirely.
        """
        if self._manager.has_plugin(name):
            raise PluginError(name, "another plugin has this name")
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            self._refuse_wrappers(plugin, name)
            hooks = self._manager.hook
            for hook, registry in (
                (hooks.virt_sse_register_key_providers, self._provider_classes),
                (hooks.virt_sse_register_encryption_layers, self._layer_classes),
            ):
                for implementation in hook.get_hookimpls():
                    if implementation.plugin_name == name:
                        _call(implementation, register=registry.registrar(name))
        except Exception as exc:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._provider_classes.forget(name)
            self._layer_classes.forget(name)
            if isinstance(exc, PluginError):
                raise
            raise PluginError(name, " ".join(str(exc).split())) from exc

    def _refuse_wrappers(self, plugin: object, name: str) -> None:
        """Refuse hook wrappers: each implementation is called separately, so that failures stay isolated."""
        for caller in self._manager.get_hookcallers(plugin) or ():
            for implementation in caller.get_hookimpls():
                if implementation.plugin is plugin and (implementation.wrapper or implementation.hookwrapper):
                    raise PluginError(name, f"{caller.name} cannot be a hook wrapper")

    def key_provider_names(self) -> list[str]:
        """The names of all registered key providers, loaded or not."""
        return self._provider_classes.names()

    def encryption_layer_names(self) -> list[str]:
        """The names of all registered encryption layers, loaded or not."""
        return self._layer_classes.names()

    def key_provider(self, name: str, set_id: UUID | None = None) -> KeyProvider:
        """The key provider *name*, made from the configuration at first use and then kept.

        A provider that uses the identities of disk encryption sets is made for each set, and made again after
        the set's credential has changed.

        :param set_id: disk encryption set whose identity the provider uses.
        :raise KeyDeniedError: When the provider needs an identity, and the set has none.
        :raise ConfigError: When no provider of this name is registered, or its options are invalid.
        :raise PluginError: When its class cannot be loaded, or has a different name.
        """
        with self._lock:
            provider_class = self._provider_classes.load(name, self.broken)
            if provider_class.name != name:
                # Wrapped DEKs would carry the name of a provider that is not registered.
                plugin = self._provider_classes.plugin(name)
                raise PluginError(plugin, f"key provider {name!r} has a class named {provider_class.name!r}")
            config = self._config.key_provider(name, set_id)
            if set_id and not provider_class.needs_identity(config):
                return self.key_provider(name)
            stamp = _stamp(config.identity) if config.identity else None
            if set_id and self._identities.get((name, set_id)) != stamp:
                self.forget(set_id)
            if (name, set_id) not in self._providers:
                if config.identity and not config.identity.exists():
                    raise KeyDeniedError(
                        f"disk encryption set {set_id} has no identity",
                        hint="assign an identity with 'virt-sse des update SET --assign-identity'",
                    )
                self._providers[name, set_id] = provider_class.from_config(config)
                self._identities[name, set_id] = stamp
            return self._providers[name, set_id]

    def parse_key(self, provider: str, text: str) -> tuple[str, str | None]:
        """Name and optional version of a key of *provider*.

        :raise InvalidValueError: When *text* is not a valid key of this provider.
        :raise ConfigError: When no provider of this name is registered.
        """
        return self._provider_classes.load(provider, self.broken).parse_key(text)

    def needs_identity(self, name: str) -> bool:
        """Whether the key provider *name* acts with the identity of a disk encryption set.

        :raise ConfigError: When no provider of this name is registered.
        """
        provider_class = self._provider_classes.load(name, self.broken)
        return provider_class.needs_identity(self._config.key_provider(name))

    def forget(self, set_id: UUID) -> None:
        """Close the key providers of a disk encryption set, after its identity has changed."""
        with self._lock, contextlib.ExitStack() as closing:
            for key in [key for key in self._providers if key[1] == set_id]:
                closing.callback(self._providers.pop(key).close)

    def encryption_layer(self, encryption_type: EncryptionType) -> EncryptionLayer:
        """The layer serving *encryption_type*.

        :raise ConfigError: When no layer or more than one serves this type.
        """
        loaded, broken = self._load_layers(EncryptionLayer)  # type: ignore[type-abstract]
        serving = [layer for layer in loaded if encryption_type in layer.encryption_types]
        return _only(serving, f"serve {encryption_type.value}", broken)()

    def host_layer(self) -> HostLayer:
        """The layer serving VMs with encryption at host.

        :raise ConfigError: When no layer or more than one serves encryption at host.
        """
        loaded, broken = self._load_layers(HostLayer)  # type: ignore[type-abstract]
        return _only(loaded, "serve encryption at host", broken)()

    def _load_layers(self, kind: type[L]) -> tuple[list[type[L]], list[PluginError]]:
        """The layers of a kind, and the errors of plugins which cannot be loaded."""
        loaded = []
        broken = list(self.broken)
        for name in self._layer_classes.names():
            try:
                layer = self._layer_classes.load(name, self.broken)
            except PluginError as exc:
                broken.append(exc)
                continue
            if issubclass(layer, kind):
                loaded.append(layer)
        return loaded, broken

    def add_commands(self, app: typer.Typer) -> None:
        """Let every plugin add its commands to *app*; failures are added to :attr:`broken`."""
        for implementation in self._manager.hook.virt_sse_add_commands.get_hookimpls():
            try:
                _call(implementation, app=app)
            except Exception as exc:  # noqa: BLE001 -- a failing plugin must not affect the rest
                self.broken.append(PluginError(implementation.plugin_name, f"cannot add its commands: {exc}"))

    def validate(self, operation: Operation) -> None:
        """Ask every plugin whether *operation* is allowed.

        :raise PolicyError: When a plugin refuses or fails.
        """
        for implementation in self._manager.hook.virt_sse_validate.get_hookimpls():
            try:
                answer = _call(implementation, operation=operation, site=self._config.site)
            except PolicyError:
                raise
            except Exception as exc:
                plugin = implementation.plugin_name
                raise PolicyError(f"policy plugin {plugin!r} failed: {type(exc).__name__}: {exc}") from exc
            if answer is not None:  # perhaps meant as a refusal
                raise PolicyError(
                    f"policy plugin {implementation.plugin_name!r} returned a value instead of raising"
                )

    def cloud_profile(self) -> CloudProfile:
        """The limits and exceptions of the cloud that the site follows; none without a plugin.

        The built-in plugins answer last.

        :raise PolicyError: When a plugin fails or returns anything else.
        """
        implementations = self._manager.hook.virt_sse_cloud_profile.get_hookimpls()
        for implementation in sorted(
            implementations, key=lambda each: each.plugin_name.startswith("builtin-")
        ):
            try:
                answer = _call(implementation, site=self._config.site)
            except PolicyError:
                raise
            except Exception as exc:
                plugin = implementation.plugin_name
                raise PolicyError(f"policy plugin {plugin!r} failed: {type(exc).__name__}: {exc}") from exc
            if isinstance(answer, CloudProfile):
                return answer
            if answer is not None:
                raise PolicyError(f"policy plugin {implementation.plugin_name!r} returned no cloud profile")
        return CloudProfile()

    def key_event(self, event: KeyEvent) -> None:
        """Pass *event* to every observer; exceptions of an observer are logged and isolated."""
        for implementation in self._manager.hook.virt_sse_key_event.get_hookimpls():
            try:
                _call(implementation, event=event)
            except Exception:  # noqa: BLE001 -- the key was used; a failing observer cannot undo the use
                _log.exception("plugin %r failed as an observer of key events", implementation.plugin_name)

    def close(self) -> None:
        """Close all key providers made so far."""
        with self._lock, contextlib.ExitStack() as closing:
            while self._providers:
                closing.callback(self._providers.popitem()[1].close)
