from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path

import pytest

from virt_sse.config import Config
from virt_sse.config import file as config_file
from virt_sse.config.file import AgentConfig, IoErrors, PlaintextPolicy
from virt_sse.errors import ConfigError
from virt_sse.model.ciphers import AES_256_XTS


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


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://virt-sse:secret@db/virt_sse",
        "postgresql://virt-sse:se/cret@db/virt_sse",
        "postgresql://virt-sse@db/virt_sse?sslmode=verify-full&password=secret",
        "postgresql://virt-sse@db/virt_sse?sslpassword=secret",
    ],
)
def test_a_file_with_a_password_is_private(tmp_path: Path, url: str) -> None:
    path = write(tmp_path, f'store.url = "{url}"')
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"other users may read .* has a password") as caught:
        Config.load(tmp_path)
    assert caught.value.hint == f"chmod go-r {path}"
    assert "cret" not in str(caught.value)
    path.chmod(0o600)
    config = Config.load(tmp_path)
    assert config.store_url == url
    assert "cret" not in repr(config)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://virt-sse@db:5432/virt_sse?passfile=/etc/virt-sse/pgpass",
        "postgresql://virt-sse@/virt_sse?host=/run/postgresql",
        "postgresql://db:5432/virt_sse?host=a:1&host=b:2",
        "sqlite:////a:b@c",
    ],
)
def test_a_file_without_a_password_may_be_read(tmp_path: Path, url: str) -> None:
    write(tmp_path, f'store.url = "{url}"').chmod(0o644)
    assert Config.load(tmp_path).store_url == url


EVERY_OPTION = """
[store]
url = "postgresql://db/virt_sse"
[libvirt]
uri = "qemu:///session"
copies-without-tls = true
[disks]
directory = "/srv/images"
infrastructure-cipher = "aes-256-xts"
placement = "storage"
io-errors = "report"
reconnect-seconds = 60
retention-days = 30
[plugins]
required = ["policy"]
[host]
subscription = "production"
region = "north"
storage-uids = "70000-80000"
storage-user = "storage"
stale-images = "warn"
[encryption-sets]
limit = 5
operator-credential = "/etc/operator.json"
[policy]
profile = "2025-01-01"
tables = "/etc/tables.toml"
enforce = false
[agent]
timeout = 7
poll-seconds = 7
probe-seconds = 7
rotation-seconds = 7
plaintext = "pause"
[page]
listen = "127.0.0.1:9000"
group = "operators"
[ceph]
monitors = ["mon.example"]
user = "images"
keyring = "/etc/keyring"
[key-providers.customer-managed]
vault = "other"
"""


def test_every_option_has_an_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    default = Config.load(tmp_path / "without")
    write(tmp_path, EVERY_OPTION)
    config = Config.load(tmp_path)
    fields = [each.name for each in dataclasses.fields(Config)]
    assert [name for name in fields if getattr(config, name) == getattr(default, name)] == []
    tables = tomllib.loads(EVERY_OPTION)
    del tables["key-providers"]
    assert {(table, option) for table in tables for option in tables[table]} == set(config_file.options())


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
        ("[disks]\nio-errors = 'ignore'\n", r"'io-errors' in \[disks\] must be one of 'pause', 'report'"),
        ("[disks]\nreconnect-seconds = 3601\n", r"'reconnect-seconds' in \[disks\] .* from 1 to 3600"),
        (
            "[disks]\ninfrastructure-cipher = 'rot13'\n",
            r"'infrastructure-cipher' in \[disks\]: unknown cipher",
        ),
        ("[encryption-sets]\nlimit = -1\n", r"'limit' in \[encryption-sets\] must be a number"),
        ("[[store]]\nurl = 'x'\n", "'store' must be a table"),
        ("regionn = 'west'\n", r"unknown table \[regionn\]"),
        (f"[agent]\ntimeout = {'9' * 400}\n", r"'timeout' in \[agent\] must be a number of seconds above 0"),
        (f"[encryption-sets]\nlimit = {'9' * 400}\n", r"'limit' in \[encryption-sets\] must be a number"),
        (
            f"[key-providers.hsm]\nslot = {'9' * 400}\n",
            r"'hsm.slot' in \[key-providers\]: .* out of the range",
        ),
        (f"[store]\nurl = {'9' * 5000}\n", "cannot read"),
        (f"[store]\nurl = {'[' * 5000}{']' * 5000}\n", "nested too deeply"),
        (f"[key-providers.hsm]\na{'.a' * 5000} = 1\n", "nested too deeply"),
        ('[store]\nurl = "\\ud800"\n', "cannot read"),
        (b"[store]\nurl = '\xed\xa0\x80'\n", "cannot read"),
    ],
)
def test_an_invalid_setting_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(tmp_path)
    assert str(path) in str(caught.value)


OPTIONS = {
    "store": {"url": "'sqlite:////x'"},
    "libvirt": {"uri": "'qemu:///session'"},
    "disks": {
        "directory": "'/x'",
        "infrastructure-cipher": "'aes-256-xts'",
        "io-errors": "'report'",
        "reconnect-seconds": "3600",
    },
    "plugins": {"required": "['a', 'b']"},
    "host": {"subscription": "'s'", "region": "'r'", "storage-uids": "'7-9'", "storage-user": "'64055'"},
    "encryption-sets": {"limit": "0", "operator-credential": "'/c'"},
    "policy": {"tables": "'/t'", "enforce": "false", "profile": "'2020'"},
    "agent": {
        "timeout": "1",
        "poll-seconds": "0.5",
        "probe-seconds": "1e3",
        "rotation-seconds": "7",
        "plaintext": "'pause'",
    },
}
ALL = [(table, option) for table, options in OPTIONS.items() for option in options]
VALUES = {
    "string": "'x'",
    "empty string": "''",
    "integer": "5",
    "zero": "0",
    "negative": "-5",
    "float": "1.5",
    "infinite": "inf",
    "true": "true",
    "date": "2026-01-31",
    "time": "12:00:00",
    "list": "[1]",
    "list of strings": "['x']",
    "empty list": "[]",
    "table": "{x = 1}",
    "empty table": "{}",
}
TEXT, NUMBER, SECONDS = {"string", "empty string"}, {"integer", "zero"}, {"integer", "float"}
VALID = {
    "infrastructure-cipher": {"empty string"},
    "io-errors": {"empty string"},
    "storage-uids": {"empty string"},
    "reconnect-seconds": {"integer"},
    "required": {"list of strings", "empty list"},
    "limit": NUMBER,
    "enforce": {"true"},
    "timeout": SECONDS,
    "poll-seconds": SECONDS,
    "probe-seconds": SECONDS,
    "rotation-seconds": SECONDS,
    "plaintext": set(),
}


def test_every_option_is_accepted(tmp_path: Path) -> None:
    lines = []
    for table, options in OPTIONS.items():
        lines += [f"[{table}]", *(f"{option} = {value}" for option, value in options.items())]
    write(tmp_path, "\r\n".join(lines))
    assert Config.load(tmp_path) == Config(
        root=tmp_path,
        store_url="sqlite:////x",
        libvirt_uri="qemu:///session",
        disk_directory=Path("/x"),
        operator_credential=Path("/c"),
        infrastructure_cipher=AES_256_XTS,
        io_errors=IoErrors.REPORT,
        reconnect_seconds=3600,
        storage_uids=range(7, 10),
        storage_user="64055",
        subscription="s",
        region="r",
        encryption_set_limit=0,
        policy_profile="2020",
        policy_tables=Path("/t"),
        enforce_policy=False,
        required_plugins=("a", "b"),
        agent=AgentConfig(1.0, 0.5, 1000.0, 7.0, PlaintextPolicy.PAUSE),
    )


@pytest.mark.parametrize(
    "uids",
    ["7", "9-7", "0-9", f"7-{2**32 - 1}", "7-9-11", " 7-9", "-7-9", "\u0667-9", "7-" + "9" * 5000, "a-b"],
)
def test_an_invalid_range_of_user_ids_is_refused(tmp_path: Path, uids: str) -> None:
    write(tmp_path, f"[host]\nstorage-uids = '{uids}'")
    with pytest.raises(ConfigError, match=r"'storage-uids' in \[host\] must be FIRST-LAST"):
        Config.load(tmp_path)


def test_the_range_of_user_ids_has_a_default_apart_from_other_ranges(tmp_path: Path) -> None:
    found = Config.load(tmp_path).storage_uids
    nspawn, sssd = range(524_288, 1_879_048_192), range(200_000, 2_000_200_001)
    for other in (range(65_536), nspawn, sssd, range(2_147_352_576, 2**32)):
        assert found[-1] < other[0] or found[0] > other[-1]
    assert len(found) == 65_536


@pytest.mark.parametrize(("table", "option"), ALL)
def test_a_value_of_another_type_is_refused(tmp_path: Path, table: str, option: str) -> None:
    path = write(tmp_path, "")
    for name, value in VALUES.items():
        path.write_text(f"[{table}]\n{option} = {value}\n")
        if name in VALID.get(option, TEXT):
            Config.load(tmp_path)
            continue
        with pytest.raises(ConfigError) as caught:
            Config.load(tmp_path)
        assert str(caught.value).startswith(f"{path}: '{option}' in [{table}]")


def test_a_key_providers_table_is_passed_on_unchanged(tmp_path: Path) -> None:
    options = ", ".join(
        f"o{number} = {value}" for number, value in enumerate(VALUES.values()) if value != "inf"
    )
    write(tmp_path, f"key-providers.any = {{{options}}}\n")
    found = Config.load(tmp_path).key_provider("any").options
    assert dict(found) == tomllib.loads(f"x = {{{options}}}")["x"]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc/virt-sse/config.toml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot read"):
        Config.load(tmp_path)


def test_passwords_and_pins_do_not_show(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'store.url = "postgresql://virt-sse:hunter2@db/virt_sse"\nkey-providers.hsm.pin = "hunter2"\n',
    )
    path.chmod(0o600)
    assert "hunter2" not in repr(Config.load(tmp_path))


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602, 0o4777])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, "")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"other users may write .*config\.toml") as caught:
        Config.load(tmp_path)
    assert "chmod go-w" in str(caught.value.hint)
    path.chmod(0o644)
    Config.load(tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_file_in_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    write(tmp_path, "").parent.chmod(mode)
    with pytest.raises(ConfigError, match="other users may write"):
        Config.load(tmp_path)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("name", ["etc/virt-sse/config.toml", "etc/virt-sse"])
def test_a_file_of_another_user_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, "")
    os.chown(tmp_path / name, 65534, 0)
    with pytest.raises(ConfigError, match="belongs to user 65534"):
        Config.load(tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1:8088", "[::1]:1"])
def test_the_page_listens_on_loopback(tmp_path: Path, address: str) -> None:
    write(tmp_path, f'[page]\nlisten = "{address}"\ngroup = "adm"\n')
    host, port = Config.load(tmp_path).page.address
    assert (host, port) == (address.rpartition(":")[0].strip("[]"), int(address.rpartition(":")[2]))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:80",
        "192.0.2.1:80",
        "127.0.0.1",
        "127.0.0.1:0",
        "localhost:80",
        "[::]:80",
        ":80",
        "127.0.0.1:80\\n",
    ],
)
def test_the_page_listens_nowhere_else(tmp_path: Path, address: str) -> None:
    write(tmp_path, f'[page]\nlisten = "{address}"\n')
    with pytest.raises(ConfigError, match=r"'listen' in \[page\] must be .*loopback only"):
        Config.load(tmp_path)


def test_a_ceph_cluster_is_described(tmp_path: Path) -> None:
    assert Config.load(tmp_path).ceph is None
    write(tmp_path, '[ceph]\nmonitors = ["mon-1", "10.0.0.2:6789", "[fd00::3]:3300"]\n')
    found = Config.load(tmp_path).ceph
    assert found is not None
    assert found.monitors == (("mon-1", 3300), ("10.0.0.2", 6789), ("fd00::3", 3300))
    assert (found.user, found.keyring) == ("virt-sse", tmp_path / "etc/ceph/ceph.client.virt-sse.keyring")


@pytest.mark.parametrize(
    "options",
    ['monitors = ["a b"]', 'monitors = ["a:0"]', 'monitors = ["a"]\nuser = "client:x"', 'monitors = "a"'],
)
def test_a_malformed_ceph_cluster_is_refused(tmp_path: Path, options: str) -> None:
    write(tmp_path, f"[ceph]\n{options}\n")
    with pytest.raises(ConfigError, match=r"'monitors' in \[ceph\] must be a list of HOST or HOST:PORT"):
        Config.load(tmp_path)
