"""Keys, signed requests, certificates in real handshakes, and trust in a server on first contact."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.server
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import example, given
from hypothesis import strategies as st

from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.federation.identity import KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER

KEY = ec.generate_private_key(ec.SECP384R1())
OTHER = ec.generate_private_key(ec.SECP384R1())
PEM = serialization.Encoding.PEM


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def private_pem(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, password: bytes | None = None
) -> bytes:
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, hidden)


def signed_at(when: str, key: ec.EllipticCurvePrivateKey = KEY) -> dict[str, str]:
    """Headers of a request that was soundly signed at any time, written in any way."""
    signature = key.sign(when.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    return identity.sign(key) | {TIME_HEADER: when, SIGNATURE_HEADER: base64.b64encode(signature).decode()}


def ago(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)).isoformat()


# Keys of devices


def test_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "home" / "key.pem"
    before = os.umask(0)
    try:
        key = identity.device_key(path)
    finally:
        os.umask(before)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert identity.device_key(path).private_numbers() == key.private_numbers()
    assert [entry.name for entry in path.parent.iterdir()] == ["key.pem"]


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o601])
def test_key_that_others_may_touch_is_refused(tmp_path: Path, open_to: int) -> None:
    path = tmp_path / "key.pem"
    identity.device_key(path)
    path.chmod(open_to)
    with pytest.raises(InputError, match="chmod 600") as caught:
        identity.device_key(path)
    assert caught.value.code == "open-secret"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        private_pem(KEY, b"password"),
        private_pem(ed25519.Ed25519PrivateKey.generate()),
        private_pem(ec.generate_private_key(ec.SECP256K1())),
        KEY.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    ],
    ids=["empty", "text", "encrypted", "ed25519", "secp256k1", "public"],
)
def test_file_that_is_no_key_of_a_device_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    identity.write_secret(path, content)
    with pytest.raises(InputError) as caught:
        identity.device_key(path)
    assert caught.value.code == "bad-key"
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_public_line_round_trip(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve).public_key()
    line = identity.public_line(key)
    assert identity.parse_public_line(line) == key
    assert identity.parse_public_line(f"  {line} owner@laptop of the clinic\n") == key
    assert "\n" not in line
    assert identity.fingerprint(key) != identity.fingerprint(KEY.public_key())


@given(st.text() | st.text().map("ecdsa-sha2-nistp384 {}".format))
@example(ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(
    serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode())  # fmt: skip
@example(identity.public_line(KEY.public_key())[:-8])
@example(identity.public_line(KEY.public_key()).replace("384", "256", 1))
def test_any_other_line_is_refused(line: str) -> None:
    with pytest.raises(InputError) as caught:
        identity.parse_public_line(line)
    assert caught.value.code == "bad-key"


# Signed requests


@pytest.mark.parametrize("seconds", [0, 290, -290])
def test_signed_request_names_its_signer(seconds: float) -> None:
    assert identity.signer(signed_at(ago(seconds))) == KEY.public_key()
    assert identity.signer(identity.sign(OTHER)) == OTHER.public_key()


@pytest.mark.parametrize("seconds", [310, -310, 86_400])
def test_request_of_another_time_is_refused(seconds: float) -> None:
    with pytest.raises(identity.Unsigned, match="clocks of device and server differ"):
        identity.signer(signed_at(ago(seconds)))


@pytest.mark.parametrize(
    "when", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2020-01-01", "2020-01-01T00:00:00"]
)
def test_soundly_signed_nonsense_for_a_time_is_refused(when: str) -> None:
    with pytest.raises(identity.Unsigned):
        identity.signer(signed_at(when))


def test_time_moved_after_signing_is_refused() -> None:
    with pytest.raises(identity.Unsigned, match="not of this key"):
        identity.signer(signed_at(ago(1000)) | {TIME_HEADER: ago(0)})


def test_key_swapped_after_signing_is_refused() -> None:
    with pytest.raises(identity.Unsigned, match="not of this key"):
        identity.signer(identity.sign(KEY) | {KEY_HEADER: identity.sign(OTHER)[KEY_HEADER]})


@pytest.mark.parametrize(
    "curve",
    [ec.SECP192R1(), ec.SECP224R1(), ec.SECP256K1(), ec.BrainpoolP256R1()],
    ids=lambda curve: curve.name,
)
def test_key_on_a_curve_that_cannot_be_enrolled_is_refused(curve: ec.EllipticCurve) -> None:
    with pytest.raises(identity.Unsigned, match="NIST curve"):
        identity.signer(identity.sign(ec.generate_private_key(curve)))


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()],
    ids=["rsa", "ed25519"],
)
def test_key_of_another_kind_is_refused(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> None:
    pem = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(identity.Unsigned):
        identity.signer(identity.sign(KEY) | {KEY_HEADER: base64.b64encode(pem).decode()})


@pytest.mark.parametrize("header", [KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER])
@given(
    value=st.text() | st.binary().map(lambda raw: base64.b64encode(raw).decode()) | st.datetimes().map(str)
)
@example(value=base64.b64encode(private_pem(KEY)).decode())
@example(value=base64.b64encode(b"-----BEGIN PUBLIC KEY-----\n\n-----END PUBLIC KEY-----").decode())
def test_a_header_of_anything_is_refused(header: str, value: str) -> None:
    with pytest.raises(identity.Unsigned):
        identity.signer(identity.sign(KEY) | {header: value})


@given(
    st.sampled_from([KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER]),
    st.floats(0, 0.99),
    st.characters(max_codepoint=127),
)
def test_a_changed_character_is_refused_or_harmless(header: str, share: float, character: str) -> None:
    headers = identity.sign(KEY)
    place = int(share * len(headers[header]))
    headers[header] = headers[header][:place] + character + headers[header][place + 1 :]
    with contextlib.suppress(identity.Unsigned):
        assert identity.signer(headers) == KEY.public_key()  # such as another line break within the PEM


@given(st.dictionaries(st.sampled_from([KEY_HEADER, TIME_HEADER, SIGNATURE_HEADER]), st.text(), max_size=2))
def test_missing_headers_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(identity.Unsigned):
        identity.signer(headers)


# Certificates, in handshakes


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority and a certificate for fusion.example.org and 203.0.113.7."""
    folder = tmp_path_factory.mktemp("server")
    identity.make_authority(folder)
    identity.issue_certificate(folder, ["fusion.example.org", "203.0.113.7"])
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of somebody else."""
    folder = tmp_path_factory.mktemp("stranger")
    identity.make_authority(folder)
    identity.issue_certificate(folder, ["fusion.example.org", "203.0.113.7"])
    return folder


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts https servers that answer GET /v1/ca, and stops them; gives HOST:PORT."""
    running = []

    def start(folder: Path, answer: bytes = b"", status: int = 200) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/v1/ca" else 404)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # refused handshakes are what some tests want

        server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((server, thread))
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def shake_hands(server: str, ca: Path, name: str) -> x509.Certificate:
    """What the server shows to somebody who trusts `ca` and believes to speak to `name`."""
    host, _, port = server.partition(":")
    with (
        socket.create_connection((host, int(port)), 10) as raw,
        identity.tls(ca).wrap_socket(raw, server_hostname=name) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown)


@pytest.mark.parametrize("name", ["fusion.example.org", "203.0.113.7", "localhost", "127.0.0.1"])
def test_certificate_holds_for_every_name_of_the_server(authority: Path, serve: Serve, name: str) -> None:
    shown = shake_hands(serve(authority), authority / "ca.pem", name)
    assert shown == x509.load_pem_x509_certificate((authority / "server.pem").read_bytes())


@pytest.mark.parametrize("name", ["evil.example.org", "203.0.113.8", "fusion.example.org.evil.example"])
def test_certificate_holds_for_no_other_name(authority: Path, serve: Serve, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        shake_hands(serve(authority), authority / "ca.pem", name)


def test_certificate_of_another_authority_is_refused(authority: Path, stranger: Path, serve: Serve) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(serve(stranger), authority / "ca.pem", "fusion.example.org")


def test_certificate_of_the_server_signs_no_others(authority: Path, serve: Serve, tmp_path: Path) -> None:
    """Who steals server.key cannot make certificates for other names: it passes for no authority."""
    shutil.copy(authority / "server.pem", tmp_path / "ca.pem")
    shutil.copy(authority / "server.key", tmp_path / "ca.key")
    identity.issue_certificate(tmp_path, ["evil.example.org"])
    chain = (tmp_path / "server.pem").read_bytes() + (authority / "server.pem").read_bytes()
    (tmp_path / "server.pem").write_bytes(chain)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(serve(tmp_path), authority / "ca.pem", "evil.example.org")


def test_without_a_file_the_authorities_of_the_system_decide(authority: Path, serve: Serve) -> None:
    host, _, port = serve(authority).partition(":")
    context = identity.tls(None)
    with socket.create_connection((host, int(port)), 10) as raw, pytest.raises(ssl.SSLCertVerificationError):
        context.wrap_socket(raw, server_hostname="localhost")


def test_file_without_certificates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(InputError) as caught:
        identity.tls(tmp_path / "ca.pem")
    assert caught.value.code == "bad-ca"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_keys_of_the_server_are_secret(authority: Path) -> None:
    assert {path.name: mode(path) for path in authority.glob("*.key")} == {
        "ca.key": 0o600,
        "server.key": 0o600,
    }
    assert sorted(content(authority)) == ["ca.key", "ca.pem", "server.key", "server.pem"]


def test_certificates_are_made_once(authority: Path, tmp_path: Path) -> None:
    home = copy(authority, tmp_path)
    identity.make_authority(home)
    identity.issue_certificate(home, ["203.0.113.7", "fusion.example.org", "localhost"])
    assert content(home) == content(authority)


def test_two_ways_to_write_an_address_are_one_host(authority: Path, tmp_path: Path) -> None:
    home = copy(authority, tmp_path)
    identity.issue_certificate(home, ["2001:db8::7"])
    before = content(home)
    identity.issue_certificate(home, ["2001:0db8:0:0:0:0:0:7"])
    assert content(home) == before


def test_other_hosts_get_a_new_certificate_of_the_same_authority(
    authority: Path, serve: Serve, tmp_path: Path
) -> None:
    home = copy(authority, tmp_path)
    identity.issue_certificate(home, ["moved.example.org"])
    assert (home / "ca.pem").read_bytes() == (authority / "ca.pem").read_bytes()
    server = serve(home)
    shake_hands(server, authority / "ca.pem", "moved.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, authority / "ca.pem", "fusion.example.org")


@pytest.mark.parametrize(("days", "kept"), [(31, True), (29, False), (-1, False)])
def test_certificate_is_renewed_before_it_expires(
    authority: Path, tmp_path: Path, days: int, kept: bool
) -> None:
    home = copy(authority, tmp_path)
    made = x509.load_pem_x509_certificate((home / "server.pem").read_bytes())
    issuer = serialization.load_pem_private_key((home / "ca.key").read_bytes(), None)
    assert isinstance(issuer, ec.EllipticCurvePrivateKey)
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1)
    builder = x509.CertificateBuilder(
        made.issuer, made.subject, made.public_key(), made.serial_number, end - datetime.timedelta(days=397), end,
        list(made.extensions),
    )  # fmt: skip
    (home / "server.pem").write_bytes(builder.sign(issuer, hashes.SHA256()).public_bytes(PEM))
    before = (home / "server.pem").read_bytes()
    identity.issue_certificate(home, ["203.0.113.7", "fusion.example.org"])
    assert ((home / "server.pem").read_bytes() == before) is kept


@pytest.mark.parametrize("damage", ["server.key", "server.pem", "ca.key"])
def test_what_does_not_fit_together_is_made_again(
    authority: Path, stranger: Path, serve: Serve, tmp_path: Path, damage: str
) -> None:
    """A kill between two files or a back-up of another day leaves certificates whose key or authority is another
    one."""
    home = copy(authority, tmp_path)
    shutil.copy(stranger / damage, home / damage)
    if damage == "ca.key":
        shutil.copy(stranger / "ca.pem", home / "ca.pem")
    identity.issue_certificate(home, ["203.0.113.7", "fusion.example.org"])
    shake_hands(serve(home), home / "ca.pem", "fusion.example.org")


@pytest.mark.parametrize("lost", ["server.key", "server.pem"])
def test_what_is_lost_is_made_again(authority: Path, serve: Serve, tmp_path: Path, lost: str) -> None:
    home = copy(authority, tmp_path)
    (home / lost).unlink()
    identity.issue_certificate(home, ["203.0.113.7", "fusion.example.org"])
    shake_hands(serve(home), authority / "ca.pem", "fusion.example.org")


def test_authority_without_its_key_is_named(authority: Path, tmp_path: Path) -> None:
    home = copy(authority, tmp_path)
    (home / "ca.key").unlink()
    identity.issue_certificate(
        home, ["203.0.113.7", "fusion.example.org"]
    )  # still good: the key may lie in a safe
    with pytest.raises(InputError) as caught:
        identity.issue_certificate(home, ["moved.example.org"])
    assert caught.value.code == "no-ca-key"


@pytest.mark.parametrize(
    "host",
    ["", "https://fusion.example.org", "fusion.example.org:9443", "[::1]", "a b", "*.org", "bücher.example"],
)
def test_what_is_no_host_is_refused(authority: Path, tmp_path: Path, host: str) -> None:
    home = copy(authority, tmp_path)
    with pytest.raises(InputError) as caught:
        identity.issue_certificate(home, [host])
    assert caught.value.code == "bad-host"
    assert content(home) == content(authority)


# Trust on first contact


def digest(folder: Path) -> str:
    return identity.certificate_digest((folder / "ca.pem").read_bytes())


def test_digest_is_that_of_openssl(authority: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert((authority / "ca.pem").read_text())
    whole = hashes.Hash(hashes.SHA256())
    whole.update(der)
    assert digest(authority) == whole.finalize().hex()
    with pytest.raises(ValueError, match="PEM"):
        identity.certificate_digest(b"nothing")


def test_authority_is_fetched_once_and_verifies_the_server(
    authority: Path, serve: Serve, tmp_path: Path
) -> None:
    server = serve(authority, (authority / "ca.pem").read_bytes())
    kept = identity.trust(server, tmp_path / "home", None, digest(authority))
    assert kept is not None
    shake_hands(server, kept, "localhost")
    assert (
        identity.trust("127.0.0.1:1", tmp_path / "home", None, digest(authority)) == kept
    )  # nobody is asked again


def test_digest_with_colons_and_capitals_is_the_same(authority: Path, serve: Serve, tmp_path: Path) -> None:
    as_openssl = ":".join(digest(authority)[i : i + 2] for i in range(0, 64, 2)).upper()
    server = serve(authority, (authority / "ca.pem").read_bytes())
    assert identity.trust(server, tmp_path, None, as_openssl) == identity.trust(
        server, tmp_path, None, digest(authority)
    )


def test_another_authority_is_refused_and_not_kept(
    authority: Path, stranger: Path, serve: Serve, tmp_path: Path
) -> None:
    server = serve(stranger, (stranger / "ca.pem").read_bytes())
    with pytest.raises(InputError, match="in between") as caught:
        identity.trust(server, tmp_path, None, digest(authority))
    assert caught.value.code == "wrong-ca"
    assert list(tmp_path.iterdir()) == []


def test_authority_smuggled_in_behind_the_right_one_is_not_trusted(
    authority: Path, stranger: Path, serve: Serve, tmp_path: Path
) -> None:
    both = (authority / "ca.pem").read_bytes() + (stranger / "ca.pem").read_bytes()
    server = serve(stranger, both)
    kept = identity.trust(server, tmp_path, None, digest(authority))
    assert kept is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, kept, "localhost")


@pytest.mark.parametrize(
    ("answer", "status"), [(b"", 200), (b"<html>", 200), (b'{"detail":"Not Found"}', 404)]
)
def test_other_servers_are_refused(
    authority: Path, serve: Serve, tmp_path: Path, answer: bytes, status: int
) -> None:
    with pytest.raises(InputError, match="no DeepFusion server") as caught:
        identity.trust(serve(authority, answer, status), tmp_path, None, digest(authority))
    assert caught.value.code == "wrong-ca"


@pytest.mark.parametrize("server", ["127.0.0.1:1", "127.0.0.1:http", "", "ä" * 70 + ":1"])
def test_server_that_cannot_be_reached(tmp_path: Path, server: str) -> None:
    with pytest.raises(InputError, match="cannot be reached") as caught:
        identity.trust(server, tmp_path, None, "0" * 64)
    assert caught.value.code == "no-server"


def test_file_of_the_operator_and_public_authorities_need_no_server(authority: Path, tmp_path: Path) -> None:
    assert identity.trust("127.0.0.1:1", tmp_path, authority / "ca.pem", None) == authority / "ca.pem"
    assert identity.trust("127.0.0.1:1", tmp_path, None, None) is None
    with pytest.raises(InputError) as caught:
        identity.trust("127.0.0.1:1", tmp_path, tmp_path / "none.pem", None)
    assert caught.value.code == "bad-ca"


def test_errors_of_a_connection_say_what_to_do(authority: Path, stranger: Path, serve: Serve) -> None:
    with pytest.raises(ssl.SSLError) as untrusted:
        shake_hands(serve(stranger), authority / "ca.pem", "localhost")
    assert identity.unreachable("fusion:9443", untrusted.value).code == "wrong-ca"
    assert identity.unreachable("fusion:9443", TimeoutError()).code == "no-server"


# Secrets on disk


def test_secret_replaces_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o644)
    (tmp_path / ".secret.part").write_bytes(b"not ours")
    (tmp_path / ".secret.part").chmod(0o644)
    identity.write_secret(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".secret.part", "secret"]
    assert (tmp_path / ".secret.part").read_bytes() == b"not ours"
