"""Certificates for migrations between lab hosts by TLS (libvirt's ``migrate_tls_x509_cert_dir``)."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from virt_sse.lab.host import LabHost

TLS = ("--tls", "--migrateuri", "tcp://127.0.0.1", "--listen-address", "127.0.0.1")
"""Options of ``virsh migrate``: the hosts share the network of this machine.

By TCP: libvirt 9.0 copies storage by TLS over no Unix socket.
"""

_PORTS = range(61000, 65530)
"""Above the ports that Linux gives to outgoing connections; hosts of other tests have others of these."""

_ADDRESS = ipaddress.ip_address("127.0.0.1")


@contextlib.contextmanager
def migration_tls(hosts: Sequence[LabHost]) -> Iterator[None]:
    """Let the hosts migrate by TLS; each proves to the other that the authority in common knows it."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("authority", authority_key.public_key(), None, authority_key)
    with contextlib.ExitStack() as stack:
        for host in hosts:
            folder = host.directory / "migration-tls"
            folder.mkdir(mode=0o755)
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _certificate(host.name, key.public_key(), authority, authority_key)
            (folder / "ca-cert.pem").write_bytes(authority.public_bytes(Encoding.PEM))
            private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            for side in ("server", "client"):
                (folder / f"{side}-cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
                (folder / f"{side}-key.pem").write_bytes(private)
            for path in folder.iterdir():
                path.chmod(0o644)  # QEMU's user reads the files
            stack.callback(_remove, folder)
            config = host.directory / "etc/libvirt/qemu.conf"
            before = config.read_text()
            first = _PORTS.start + 10 * secrets.randbelow(len(_PORTS) // 10)
            config.write_text(
                f'{before}migrate_tls_x509_cert_dir = "{folder}"\nmigrate_tls_x509_verify = 1\n'
                f"migration_port_min = {first}\nmigration_port_max = {first + 9}\n"
            )
            stack.callback(host.restart_libvirtd)
            stack.callback(config.write_text, before)
            host.restart_libvirtd()
        yield


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for *name* at this machine's loopback address; of an authority without *issuer*."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=10))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer:
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        names = x509.SubjectAlternativeName([x509.IPAddress(_ADDRESS)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
