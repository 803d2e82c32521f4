from __future__ import annotations

from pathlib import Path

import pytest

from virt_sse.config import Config
from virt_sse.errors import ConfigError


def write(root: Path, content: str | bytes) -> Path:
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_without_a_file_everything_has_a_default(tmp_path: Path) -> None:
    config = Config.load(tmp_path)
    assert config.root == tmp_path
    assert config.state_directory == tmp_path / "var/lib/virt-sse"
    assert config.log_directory == tmp_path / "var/log/virt-sse"
    assert config.store_url == f"sqlite:///{tmp_path}/var/lib/virt-sse/store.sqlite"
    assert config.libvirt_uri == "qemu:///system"
    assert config.disk_directory == tmp_path / "var/lib/libvirt/images"
    assert config.hook_path == tmp_path / "etc/libvirt/hooks/qemu.d/virt-sse"
    assert config.agent_socket == tmp_path / "run/virt-sse/agent.sock"
    assert config.required_plugins == ()
    provider = config.key_provider("platform-managed")
    assert provider.directory == tmp_path / "var/lib/virt-sse/platform-managed"
    assert provider.options == {}


def test_the_environment_moves_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRT_SSE_ROOT", str(tmp_path))
    assert Config.load().root == tmp_path
    assert Config.load(Path("/elsewhere")).root == Path("/elsewhere")
    monkeypatch.setenv("VIRT_SSE_ROOT", "")
    assert Config.load().root == Path("/")


def test_settings_of_the_file_are_used(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
        store.url = "postgresql://virt-sse@db/virt_sse"
        libvirt.uri = "qemu:///session"
        disks.directory = "/srv/disks"
        plugins.required = ["our-policy"]

        [key-providers.kek-file]
        folder = "/etc/site-keks"
        """,
    )
    config = Config.load(tmp_path)
    assert config.store_url == "postgresql://virt-sse@db/virt_sse"
    assert config.libvirt_uri == "qemu:///session"
    assert config.disk_directory == Path("/srv/disks")
    assert config.required_plugins == ("our-policy",)
    assert config.key_provider("kek-file").options == {"folder": "/etc/site-keks"}
    assert config.key_provider("platform-managed").options == {}


def test_libvirts_own_variable_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 'libvirt.uri = "qemu:///session"')
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/run/lab")
    assert Config.load(tmp_path).libvirt_uri == "qemu+unix:///system?socket=/run/lab"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("store", "cannot read"),
        ("[store\n", "cannot read"),
        (b"[store]\nurl = '\xff'\n", "cannot read"),
        ("[stor]\nurl = 'x'\n", r"unknown table \[stor\]"),
        ("[store]\nulr = 'x'\n", r"unknown option 'ulr' in \[store\]"),
        ("store = 'sqlite://'\n", "'store' must be a table"),
        ("[store]\nurl = 1\n", r"'url' in \[store\] must be a string"),
        ("[libvirt]\nuri = ['x']\n", r"'uri' in \[libvirt\] must be a string"),
        ("[disks]\ndirectory = true\n", r"'directory' in \[disks\] must be a string"),
        ("[plugins]\nrequired = 'our-policy'\n", "list of names"),
        ("[plugins]\nrequired = [1]\n", "list of names"),
        ("key-providers = ['vault']\n", "must be a table"),
        ("[key-providers]\nvault = 'https://vault'\n", "one table per provider"),
    ],
)
def test_an_invalid_setting_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc/virt-sse/config.toml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot read"):
        Config.load(tmp_path)


def test_passwords_and_pins_do_not_show(tmp_path: Path) -> None:
    write(
        tmp_path,
        'store.url = "postgresql://virt-sse:hunter2@db/virt_sse"\nkey-providers.hsm.pin = "hunter2"\n',
    )
    assert "hunter2" not in repr(Config.load(tmp_path))
