"""Who is who: keys of devices, the server's certificates, and the signature on every request of a device.

Requests carry the three headers that Flower's SuperNodes sign themselves with, so that messages and uploads are
authenticated alike: the public key, the time, and the time signed with the private key.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import hashlib
import ipaddress
import re
import ssl
import sys
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deepfusion.errors import InputError
from deepfusion.folders import write_whole

KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER = "flwr-public-key", "flwr-timestamp", "flwr-signature"
MAX_CLOCK_SECONDS = 300  # as far as Flower lets a signed time be off
_CA_DAYS, _SERVER_DAYS, _RENEW_DAYS = 3650, 397, 30
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)  # a key on another curve has no line of OpenSSH


def device_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The private key of a device, made on first use and readable by its owner only.

    Raises:
        InputError: the file is no private key on a NIST curve, or others may read it.
    """
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_secret(path, _private_pem(key))
        return key
    if sys.platform != "win32" and path.stat().st_mode & 0o077:  # there the mode does not say who may read
        raise InputError(
            "others may read this private key", where=path, fix=f"chmod 600 {path}", code="open-secret"
        )
    try:
        loaded = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        loaded = None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or not isinstance(loaded.curve, _CURVES):
        what = "not an unencrypted PEM key on a NIST curve of 256 bits or more"
        raise InputError(what, where=path, fix="name another --home", code="bad-key")
    return loaded


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as one line of OpenSSH, to be given to the operator."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def public_pem(line: str) -> bytes:
    """A line of OpenSSH as PEM, as Flower knows keys."""
    key = parse_public_line(line)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def parse_public_line(line: str) -> ec.EllipticCurvePublicKey:
    """The inverse of `public_line`; a comment after the key is ignored.

    Raises:
        InputError: not such a line.
    """
    try:
        key = serialization.load_ssh_public_key(" ".join(line.split()[:2]).encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        allowed = "the line 'ecdsa-sha2-nistp384 AAAA...' that deepfusion device join prints"
        raise InputError("not the public key of a device", where=line[:40], allowed=allowed, code="bad-key")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Short name of a public key for people and logs: 16 hex digits of its SHA-256."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:16]


def sign(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Headers that prove, for the next minutes, who sends a request."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signature = key.sign(now.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    return {
        KEY_HEADER: base64.b64encode(public).decode("ascii"),
        TIME_HEADER: now,
        SIGNATURE_HEADER: base64.b64encode(signature).decode("ascii"),
    }


class Unsigned(Exception):
    """A request whose sender is not proven; the text says why."""


def signer(headers: httpx.Headers | dict[str, str]) -> ec.EllipticCurvePublicKey:
    """The public key that signed a request.

    Raises:
        Unsigned: headers are missing or malformed, the time is off, or the signature is of another key.
    """
    try:
        pem = base64.b64decode(headers[KEY_HEADER], validate=True)
        signature = base64.b64decode(headers[SIGNATURE_HEADER], validate=True)
        signed_at = datetime.datetime.fromisoformat(headers[TIME_HEADER])
        key = serialization.load_pem_public_key(pem)
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
            raise Unsigned("the key is not on a NIST curve of 256 bits or more")
        age = (datetime.datetime.now(datetime.UTC) - signed_at).total_seconds()
        key.verify(signature, headers[TIME_HEADER].encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (KeyError, ValueError, TypeError, binascii.Error, UnsupportedAlgorithm, UnicodeError):
        raise Unsigned("the request is not signed with a device key") from None
    except InvalidSignature:
        raise Unsigned("the signature is not of this key") from None
    if abs(age) > MAX_CLOCK_SECONDS:
        raise Unsigned(
            f"the clocks of device and server differ by {abs(age):.0f} seconds, allowed are {MAX_CLOCK_SECONDS}"
        )
    return key


def make_authority(folder: Path) -> None:
    """Write ca.pem and ca.key, the private authority of a server, unless they are there."""
    if (folder / "ca.pem").exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("DeepFusion private CA")
    certificate = (
        _builder(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_secret(folder / "ca.key", _private_pem(key))
    _write(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def issue_certificate(folder: Path, hosts: list[str]) -> None:
    """Write server.pem and server.key, signed by the authority in `folder`, valid for `hosts` and this machine itself.

    A certificate that is there is kept as long as it names the same hosts and is good for another 30 days.

    Args:
        hosts: DNS names or IP addresses under which devices reach the server.

    Raises:
        InputError: not such a name, or the key of the authority is gone.
    """
    names = [_alternative(name) for name in sorted({"localhost", "127.0.0.1", *hosts})]
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    if _is_good(folder, authority, names):
        return
    try:
        authority_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except OSError:
        fix = "restore it from the back-up; or remove ca.pem, and give all devices the digest of the new one"
        raise InputError(
            "the key of the authority cannot be read", where=folder / "ca.key", fix=fix, code="no-ca-key"
        ) from None
    assert isinstance(authority_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("DeepFusion server"), authority.subject, key, _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    write_secret(folder / "server.key", _private_pem(key))
    _write(folder / "server.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _is_good(folder: Path, authority: x509.Certificate, names: list[x509.GeneralName]) -> bool:
    """Whether the server's certificate can be kept. A kill or a back-up may have left one without its key or
    authority.
    """
    try:
        known = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
        known.verify_directly_issued_by(authority)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    issued = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = known.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    same = key.public_key() == known.public_key() and set(issued) == set(names)
    return same and left > datetime.timedelta(days=_RENEW_DAYS)


def certificate_digest(pem: bytes) -> str:
    """SHA-256 of a certificate, 64 hex digits, as `openssl x509 -fingerprint -sha256` prints it without colons.

    Raises:
        ValueError: no certificate.
    """
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()


def trust(server: str, folder: Path, ca: Path | None, ca_sha256: str | None) -> Path | None:
    """The file of certificates that a device verifies `server` with; None trusts the public authorities of the system.

    Args:
        server: HOST:PORT.
        folder: where a fetched authority is kept.
        ca: the file, if the operator handed it over.
        ca_sha256: or else the digest of the server's private authority. The certificate itself is fetched without
            verification once, and taken only if it has this digest.

    Raises:
        InputError: another authority than expected, or the server cannot be reached.
    """
    if ca is not None:
        if not ca.is_file():
            raise InputError("there is no such file of certificates", where=ca, code="bad-ca")
        return ca
    if ca_sha256 is None:
        return None
    wanted = ca_sha256.replace(":", "").lower()
    kept = folder / f"ca-{wanted[:16]}.pem"
    if not kept.exists():
        try:
            answer = httpx.get(
                f"https://{server}/v1/ca", verify=False, timeout=15
            )  # checked against the digest below
            certificate = x509.load_pem_x509_certificate(answer.content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(server, error) from None
        except ValueError:
            raise InputError("this is no DeepFusion server", where=server, code="wrong-ca") from None
        found = certificate.fingerprint(hashes.SHA256()).hex()
        if found != wanted:
            fix = "ask the operator for the line that deepfusion server start prints; somebody may stand in between"
            raise InputError(
                f"its authority has digest {found[:16]}..., not {wanted[:16]}...",
                where=server,
                fix=fix,
                code="wrong-ca",
            )
        # Not the answer itself: behind the certificate with the right digest it may hold others.
        _write(kept, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return kept


def unreachable(server: str, error: Exception) -> InputError:
    """The error of a server that cannot be spoken to at all."""
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        fix = "--ca FILE or --ca-sha256 HEX, as deepfusion server start prints it"
        return InputError(
            f"its certificate is not trusted ({reason})", where=server, fix=fix, code="wrong-ca"
        )
    return InputError(
        f"cannot be reached ({reason})",
        where=server,
        fix="check --server HOST:PORT and the network",
        code="no-server",
    )


def tls(ca: Path | None) -> ssl.SSLContext:
    """What verifies the server: the file `trust` gave, or the public authorities of the system.

    Raises:
        InputError: the file holds no certificate.
    """
    try:
        return ssl.create_default_context(cafile=str(ca) if ca else None)
    except ssl.SSLError:
        raise InputError("no PEM certificates in this file", where=ca, code="bad-ca") from None


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    _write(path, content, 0o600)


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(path, content, mode)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of devices run behind
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
        allowed = "a name or an address without a port, such as fusion.example.org or 203.0.113.7"
        raise InputError("not what devices could call a server", where=host, allowed=allowed, code="bad-host")
    return x509.DNSName(host)
