"""``cowfs tls init``: an authority, and certificates for a server and a client, for a trial of the TLS door.

The files have the names that the docker command looks for in ``DOCKER_CERT_PATH``: ``ca.pem``, ``cert.pem``, ``key.pem``;
the server's are ``server-cert.pem`` and ``server-key.pem``.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cowfs.errors import AlreadyExists, Unsupported

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["FILES", "make_certificates"]

FILES = ("ca.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", "cert.pem", "key.pem")


def make_certificates(directory: str, names: Sequence[str], *, days: float = 365) -> None:
    """Make the six files.

    Args:
        directory: made if need be, 0700.
        names: host names and addresses of the server.
        days: how long the certificates are valid; below zero they have expired (for tests).

    Raises:
        AlreadyExists: one of the files exists: a key is never overwritten.
        Unsupported: the package ``cryptography`` is missing.
    """
    try:
        import cryptography  # noqa: F401  only to name a missing package
    except ImportError:
        raise Unsupported(
            "certificates are made by the package cryptography", remedy="pip install 'cowfs-storage[daemon]'"
        ) from None
    os.makedirs(directory, mode=0o700, exist_ok=True)
    for name in FILES:
        if os.path.lexists(os.path.join(directory, name)):
            raise AlreadyExists(f"{os.path.join(directory, name)} exists", remedy="name a new directory")
    authority_key, authority = _issue("cowfs trial authority", None, None, (), days, authority=True)
    made = {"ca": (authority, authority_key)}
    for common_name, files, server in (("cowfs server", "server-", True), ("cowfs client", "", False)):
        key, certificate = _issue(
            common_name, authority, authority_key, names if server else (), days, server=server, client=not server
        )
        made[files] = (certificate, key)
    for prefix, (certificate, key) in made.items():
        certificate_name, key_name = (
            ("ca.pem", "ca-key.pem") if prefix == "ca" else (f"{prefix}cert.pem", f"{prefix}key.pem")
        )
        _write(os.path.join(directory, certificate_name), _pem(certificate), 0o644)
        _write(os.path.join(directory, key_name), _pem_key(key), 0o600)


def _issue(
    common_name: str,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey | None,
    names: Sequence[str],
    days: float,
    *,
    authority: bool = False,
    server: bool = False,
    client: bool = False,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer is not None else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - datetime.timedelta(days=1))
        .not_valid_after(end if not authority else max(end, now + datetime.timedelta(days=1)))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer_key is not None:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(identifier, critical=False)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = builder.add_extension(usage, critical=True)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(each) for each in names]), critical=False)
    return key, builder.sign(issuer_key or key, hashes.SHA256())


def _name(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: str, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
