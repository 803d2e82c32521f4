"""Parsers of files of the host: configuration, records, keyring, audit log, marks, backups, tokens' URIs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from support import audit_logs
from support.folders import VECTORS
from support.fuzzing import Opened, Parse, Parser, always, texts
from virt_sse.agent.overlay_commit_record import Overlay, OverlayCommitRecord
from virt_sse.agent_client import configured_timeout
from virt_sse.audit.record import AuditEntry
from virt_sse.cli import audit as audit_command
from virt_sse.config import Config
from virt_sse.errors import (
    AgentError,
    CertificateError,
    ConfigError,
    KeyringError,
    PolicyError,
    StageError,
    VirtSseError,
)
from virt_sse.libvirt.users import User
from virt_sse.model.certificate import DeletionCertificate, encode_public_key, parse_public_key
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import HostCache, HostCaching, StorageNode
from virt_sse.model.vms import PendingUpdate, VmProperties
from virt_sse.pkcs11.options import TokenOptions
from virt_sse.pkcs11.uri import TokenUri
from virt_sse.stages.record import RECORD_NAME, StageRecord
from virt_sse.store import rows
from virt_sse.system.documents import DocumentError, from_json
from virt_sse_plugins.key_providers.hsm_simulated import HsmSimulatedKeyProvider
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey
from virt_sse_plugins.key_providers.platform_keyring import Keyring, KeyringRootKey
from virt_sse_plugins.policies.tables import CURRENT, Tables

_STAGES = StageRecord(
    disk_id=uuid.UUID(int=1),
    domain_id=uuid.UUID(int=2),
    domain="web",
    image=Path("/var/lib/libvirt/images/a.qcow2"),
    format=DiskFormat.QCOW2,
    owner=User(0, 0),
    qemu=User(64055, 108),
    storage=User(990, 990),
    guest_slot="service",
    stages=(HostCache(HostCaching.READ_ONLY), StorageNode("infrastructure")),
)
_STAGES_BELOW_QEMU = dataclasses.replace(
    _STAGES, guest_slot=None, stages=(StorageNode("service"), StorageNode("infrastructure"))
)
_OVERLAYS = OverlayCommitRecord(
    domain_id=uuid.UUID(int=2),
    domain="web",
    target="vda",
    disk_id=uuid.UUID(int=1),
    token="a",  # noqa: S106 -- names a run of a domain
    overlays=(Overlay(Path("/var/lib/libvirt/images/a.overlay"), (1, 2)),),
)
_CONFIG = b"""[store]
url = "sqlite:////var/lib/store.sqlite"
[disks]
directory = "/d"
infrastructure-cipher = "aes-256-cbc"
io-errors = "report"
reconnect-seconds = 30
[host]
region = "westus"
[agent]
timeout = 30.0
poll-seconds = 2
plaintext = "pause"
[key-providers.hsm-simulated]
uri = "pkcs11:token=a"
"""


def _in_file(name: str, parse: Callable[[Path], object]) -> Opened:
    """A parser of the file *name* in a folder."""

    @contextlib.contextmanager
    def opened(folder: Path) -> Iterator[Parse]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)

        def parse_file(content: bytes) -> None:
            path.write_bytes(content)
            parse(path)

        yield parse_file

    return opened


def _written(write: Callable[[Path], object], name: str) -> bytes:
    """The content of the file that *write* makes in a folder."""
    with TemporaryDirectory() as made:
        write(Path(made) / "folder")
        (file,) = (Path(made) / "folder").rglob(name)
        return file.read_bytes()


def _stages(path: Path) -> None:
    record = StageRecord.read(path.parent)
    assert record is not None
    assert "\0" not in str(record.image)
    copy = path.parent / "copy" / "again"
    record.write(copy)
    assert StageRecord.read(copy) == record


def _overlay_commits(path: Path) -> None:
    problems: list[AgentError] = []
    found = OverlayCommitRecord.read_all(path.parent, lambda _path, error: problems.append(error))
    for each in found:
        assert all("\0" not in str(overlay.path) for overlay in each.overlays)
    if problems:
        raise problems[0]


def _config(path: Path) -> None:
    root = path.parents[2]
    timeout = configured_timeout(root)
    assert 0 < timeout <= 1e9
    config = Config.load(root)
    assert "\0" not in str(config.disk_directory)
    assert "\0" not in str(config.operator_credential)
    assert max(config.agent.timeout, config.agent.poll_seconds, config.agent.probe_seconds) <= 1e9


_ROOT_KEY = KeyringRootKey(bytes(32))
_KEYRING = Keyring("0" * 32, _ROOT_KEY, {})._with_version("default", {}).with_new_version("default")


def _keyring(content: bytes) -> None:
    keyring = Keyring.parse(content, _ROOT_KEY, path=Path("/keyring.json"))
    again = Keyring.parse(keyring.dump(), _ROOT_KEY, path=Path("/keyring.json"))
    assert again.keys == keyring.keys
    for name, key in keyring.keys.items():
        for version in key.versions:
            with contextlib.suppress(KeyringError):
                keyring.kek(name, version)


def _audit_line(content: bytes) -> None:
    entry = AuditEntry.parse(content)
    for text in audit_command._row(entry).values():
        text.encode()


@contextlib.contextmanager
def _audit_log(folder: Path) -> Iterator[Parse]:
    """A log, its newest file replaced: verified, listed and continued."""
    log = audit_logs.fill(audit_logs.open_log(folder))

    def parse(content: bytes) -> None:
        log.path.write_bytes(content)
        for rolled in log.files()[:-1]:
            rolled.unlink()
        log.verify()
        list(log.records())
        list(log.tail(5))
        log.append(audit_logs.make(0))

    yield parse


def _log_content() -> bytes:
    return _written(lambda folder: audit_logs.fill(audit_logs.open_log(folder)), "audit.jsonl")


def _tables(path: Path) -> None:
    tables = Tables.load(path)
    for name in ("Standard_D2s_v3", "Basic_A1", "Standard_B2ms"):
        tables.series_of(name)
    tables.region("West US 2")


def _token_uri(text: str) -> None:
    uri = TokenUri.parse(text)
    assert TokenUri.parse(str(uri)) == uri


def _token_options(text: str) -> None:
    option = "uri" if text.startswith("pkcs11:") else "module"
    TokenOptions.parse("[key-providers.x]", Path("/token"), {option: text})


def _key_url(text: str) -> None:
    key = KeyVaultKey.parse(text)
    assert KeyVaultKey.parse(key.url).url == key.url


def _resealed_line(content: bytes) -> None:
    """A forged record: hash and MAC are in their places, and the hash is right."""
    body = content[: -len(b',"hash":"","mac":""}') - 128]
    digest = hashlib.sha256(body).hexdigest().encode()
    _audit_line(body + b',"hash":"' + digest + b'","mac":"' + b"0" * 64 + b'"}')


_VECTOR = json.loads((VECTORS / "deletion_certificate.json").read_text("utf-8"))
_VECTOR_KEY = parse_public_key(_VECTOR["certificate"]["signature"]["public-key"])
_LOG = _log_content()
_LINE = _LOG.splitlines()[0]
PARSERS = [
    Parser(
        "stage-record",
        _in_file(f"stages/{RECORD_NAME}", _stages),
        [_written(each.write, RECORD_NAME) for each in (_STAGES, _STAGES_BELOW_QEMU)],
        (StageError,),
        document=True,
    ),
    Parser(
        "overlay-commit-record",
        _in_file("commits/a.json", _overlay_commits),
        [_written(_OVERLAYS.write, "*.json")],
        (AgentError,),
        document=True,
    ),
    Parser("configuration", _in_file("root/etc/virt-sse/config.toml", _config), [_CONFIG], (ConfigError,)),
    Parser("keyring", always(_keyring), [_KEYRING.dump()], (KeyringError,), document=True),
    Parser(
        "policy-tables",
        _in_file("tables.toml", _tables),
        [CURRENT.read_bytes()[:4000], b"[regions.a]\nencryption-at-host = true\ndouble-encryption = true\n"],
        (PolicyError,),
    ),
    Parser(
        "deletion-certificate",
        always(lambda content: DeletionCertificate.parse(content).verify(_VECTOR_KEY)),
        [json.dumps(_VECTOR["certificate"]).encode()],
        (CertificateError,),
        document=True,
    ),
    Parser("public-key", texts(parse_public_key), [encode_public_key(_VECTOR_KEY).encode()]),
    Parser("audit-record", always(_resealed_line), [_LINE], (ValueError,), document=True),
    Parser("audit-line", always(_audit_line), [_LINE], (ValueError,)),
    Parser("audit-log", _audit_log, [_LOG]),
    Parser("audit-since", texts(audit_command._time), [b"30m", b"7d", b"2026-01-31T12:00Z", b"2026-01-31"]),
    Parser("audit-anchor", texts(audit_command._position), [b"12:" + b"0" * 64]),
    Parser(
        "pkcs11-uri",
        texts(_token_uri),
        [b"pkcs11:token=a%20b;slot-id=4;object=k;id=%01%02;type=private?module-name=x&pin-source=file:/p"],
    ),
    Parser("pkcs11-options", texts(_token_options), [b"pkcs11:token=a?pin-source=/p", b"/usr/lib/x.so"]),
    Parser(
        "hsm-key-name",
        texts(HsmSimulatedKeyProvider.parse_key),
        [b"pkcs11:object=k;id=%01;type=secret-key", b"k"],
    ),
    Parser(
        "key-url",
        texts(_key_url),
        [b"https://vault.example:8443/keys/key/" + b"1" * 32, b"https://[::1]/keys/k"],
    ),
    Parser("cipher", texts(Cipher.parse), [b"aes-256-xts", b"serpent-256-cbc-essiv:sha256"]),
    Parser(
        "pending-update",
        always(lambda content: rows._from_json(content.decode(errors="replace"))),
        [
            rows.pending_to_json(
                PendingUpdate(
                    VmProperties(True, "Standard_D2s_v3", 1 << 30), {uuid.UUID(int=1): HostCaching.NONE}
                )
            ).encode()
        ],
        (VirtSseError, DocumentError),
        document=True,
    ),
    Parser(
        "json-document",
        always(lambda content: from_json(content, dict[str, object])),
        [b'{"a": [1, {"b": "c"}]}'],
        (DocumentError,),
        document=True,
    ),
]
