"""The certificate for the network: the owner's, or one that signs itself and is made on this device.

The owner's comes as systemd credentials (`ai-assistant.tls.cert` and `.key` in /etc/credstore, which only root can
read), so that the key need not be readable for the daemon's user on disk. A certificate made here stays for
ten years: clients compare its fingerprint, and one that changes by itself teaches them not to.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ai_assistant.errors import InvalidConfig

OWN_CERTIFICATE = "ai-assistant.tls.cert"
OWN_KEY = "ai-assistant.tls.key"
_DAYS = 3650
_RENEW_DAYS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    path: Path
    key: Path
    made_here: bool
    fingerprint: str
    """SHA-256 of the certificate, as pairs of hexadecimal digits with colons."""
    expires: int
    """Unix seconds."""
    names: tuple[str, ...]
    """Host names and addresses that it is for."""

    def to_dict(self) -> dict[str, object]:
        return {
            "fingerprint_sha256": self.fingerprint,
            "source": "made on this device" if self.made_here else "the owner's",
            "expires": self.expires,
            "names": list(self.names),
        }


def certificate(
    folder: Path,
    hostname: str,
    addresses: Sequence[str],
    *,
    credentials: Path | None = None,
    now: datetime.datetime | None = None,
) -> Certificate:
    """The owner's certificate if there is one in `credentials`, else the one in `folder`, made if need be.

    Raises:
        InvalidConfig: the owner's is no certificate, or has expired.
        OSError: `folder` cannot be written.
    """
    moment = now or datetime.datetime.now(datetime.UTC)
    if credentials is not None and (credentials / OWN_CERTIFICATE).exists():
        try:
            found = _read(credentials / OWN_CERTIFICATE, credentials / OWN_KEY, made_here=False)
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"the certificate in /etc/credstore cannot be used: {error}") from error
        if found.expires <= moment.timestamp():
            raise InvalidConfig("the certificate in /etc/credstore has expired")
        return found
    path, key = folder / "cert.pem", folder / "key.pem"
    try:
        found = _read(path, key, made_here=True)
        context(found)
        if found.expires - moment.timestamp() > _RENEW_DAYS * 86400:
            return found
    except (OSError, ValueError, InvalidConfig):
        pass  # not there, or damaged: it holds nothing that another would not
    _make(path, key, hostname, addresses, moment)
    return _read(path, key, made_here=True)


def context(found: Certificate) -> ssl.SSLContext:
    """TLS 1.2 and later, forward secrecy, authenticated encryption.

    Raises:
        InvalidConfig: certificate and key do not belong together.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    made.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    made.set_alpn_protocols(["http/1.1"])
    try:
        made.load_cert_chain(found.path, found.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfig(
            f"certificate and key cannot be used: {error.strerror or error}", hint="do they belong together?"
        ) from error
    return made


def _read(path: Path, key: Path, *, made_here: bool) -> Certificate:
    from cryptography import x509  # not small, and only here when the network is on
    from cryptography.hazmat.primitives.serialization import Encoding

    parsed = x509.load_pem_x509_certificate(path.read_bytes())
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        listed = [
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        ]
    except x509.ExtensionNotFound:
        listed = []
    digest = hashlib.sha256(parsed.public_bytes(Encoding.DER)).hexdigest().upper()
    return Certificate(
        path=path,
        key=key,
        made_here=made_here,
        fingerprint=":".join(digest[k : k + 2] for k in range(0, 64, 2)),
        expires=int(parsed.not_valid_after_utc.timestamp()),
        names=tuple(listed),
    )


def _make(path: Path, key_path: Path, hostname: str, addresses: Sequence[str], now: datetime.datetime) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    bare = hostname.partition(".")[0] or "ai-assistant"
    hosts = list(dict.fromkeys([each for each in (hostname, bare, f"{bare}.local", "localhost") if each]))
    numbers = list(dict.fromkeys([*map(_address, addresses), _address("127.0.0.1"), _address("::1")]))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, bare[:64])])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(
            x509.SubjectAlternativeName(
                [*map(x509.DNSName, hosts), *(x509.IPAddress(each) for each in numbers if each is not None)]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The key first: a certificate without its key would be taken for whole.
    _write(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _write(path, made.public_bytes(Encoding.PEM))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0].partition("/")[0])
    except ValueError:
        return None


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
