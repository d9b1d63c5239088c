"""The gateway process over TLS: tus, tickets, receipts, what is refused, what survives a kill, and Flower behind it."""

from __future__ import annotations

import base64
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from gateways import Device, Gateway, make_card, make_upload, offer_of

from deepfusion.digests import sha256_file
from deepfusion.federation import identity
from deepfusion.federation.flower.superlink import SuperLink
from deepfusion.federation.offer import read_offer
from deepfusion.uploads.card import read_card

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("gateway")).start()
    yield gateway
    gateway.end()
    assert "Traceback" not in gateway.log


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A second one, for tests that leave traces."""
    gateway = Gateway(tmp_path_factory.mktemp("spoiled")).start()
    yield gateway
    gateway.end()


def refusals(gateway: Gateway, code: str) -> list[dict[str, object]]:
    return [line for line in gateway.audit if line["event"] == "refused" and line["code"] == code]


def check_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def open_patch(device: Device, name: str, length: int) -> ssl.SSLSocket:
    """A PATCH whose headers were sent and whose body may follow, on a connection of its own."""
    headers = {
        **identity.sign(device.key), "Tus-Resumable": "1.0.0", "Authorization": f"Bearer {device.ticket}",
        "Host": "localhost",
        "Content-Type": "application/offset+octet-stream", "Upload-Offset": "0", "Content-Length": str(length),
    }  # fmt: skip
    plain = socket.create_connection(("127.0.0.1", device.gateway.port), timeout=10)
    tunnel = device.gateway.context.wrap_socket(plain, server_hostname="localhost")
    lines = [
        f"PATCH /v1/uploads/{name} HTTP/1.1",
        *(f"{key}: {value}" for key, value in headers.items()),
        "",
        "",
    ]
    tunnel.sendall("\r\n".join(lines).encode())
    return tunnel


def answer_on(tunnel: ssl.SSLSocket) -> bytes:
    answer = b""
    while block := tunnel.recv(65536):
        answer += block
    return answer


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("did not come true in 10 seconds")


def test_health_and_authority_need_no_signature(gateway: Gateway) -> None:
    assert gateway.request("GET", "/v1/health").json() == {"ok": True}
    answer = gateway.request("GET", "/v1/ca")
    assert answer.content == gateway.home.ca.read_bytes()
    assert "server" not in answer.headers
    trusted = identity.trust(
        f"localhost:{gateway.port}",
        gateway.folder / "trust",
        None,
        identity.certificate_digest(answer.content),
    )
    assert trusted is not None
    assert trusted.read_bytes() == answer.content


def test_upload_in_pieces_and_the_receipt(gateway: Gateway) -> None:
    device = gateway.device("pieces", {WEIGHTS: 300_000, "merges.txt": 0})
    content = (device.folder / WEIGHTS).read_bytes()
    answer = device.create(WEIGHTS)
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/v1/uploads/{WEIGHTS}"
    assert answer.headers["Upload-Offset"] == "0"
    assert device.patch(WEIGHTS, 0, content[:100_000]).headers["Upload-Offset"] == "100000"
    again = device.create(WEIGHTS)
    assert (again.status_code, again.headers["Upload-Offset"]) == (201, "100000")
    found = device.call("HEAD", f"/v1/uploads/{WEIGHTS}")
    assert (found.headers["Upload-Offset"], found.headers["Upload-Length"]) == ("100000", "300000")
    assert found.headers["Cache-Control"] == "no-store"
    chunked = device.patch(
        WEIGHTS, 100_000, (content[at : at + 7_000] for at in range(100_000, 300_000, 7_000))
    )
    assert (chunked.status_code, chunked.headers["Upload-Offset"]) == (204, "300000")
    incomplete = device.receipt()
    check_refused(incomplete, 409, "incomplete")
    assert sorted(incomplete.json()["bad"]) == ["card.json", "merges.txt"]
    assert gateway.ledger.devices()["pieces"].state == "uploading"
    device.create("merges.txt")
    device.create("card.json")
    device.patch("card.json", 0, (device.folder / "card.json").read_bytes())
    assert gateway.ledger.devices()["pieces"].received == device.offer.size
    answer = device.receipt()
    receipt = answer.json()
    assert answer.status_code == 200
    assert (receipt["device"], receipt["digest"], receipt["size"]) == (
        "pieces",
        device.offer.digest,
        device.offer.size,
    )
    assert (receipt["files"], receipt["state"]) == (3, "done")
    assert {path.name: sha256_file(path) for path in device.received.iterdir()} == {
        file.name: file.sha256 for file in device.offer.files
    }
    assert not device.incoming.parent.exists()
    assert device.receipt().json() == receipt, "asked again"
    check_refused(device.create(WEIGHTS), 403, "ticket-spent")
    assert [
        line["digest"] for line in gateway.audit if line["event"] == "accepted" and line["device"] == "pieces"
    ] == [device.offer.digest]


def test_late_uploads_say_so(spoiled: Gateway) -> None:
    device = spoiled.device("late")
    device.send_all()
    spoiled.ledger.close()
    assert device.receipt().json()["state"] == "late"
    assert spoiled.ledger.devices()["late"].state == "late"


def test_bytes_are_counted_at_the_wire(gateway: Gateway) -> None:
    device = gateway.device("counted")
    device.send_all()
    device.patch(WEIGHTS, 0, b"x")  # refused, but sent
    # Counted once the answer is out.
    wait_until(lambda: gateway.ledger.devices()["counted"].up > device.offer.size + 5 * 400)
    row = gateway.ledger.devices()["counted"]
    assert row.up < device.offer.size + 5 * 2_000
    assert 5 * 50 < row.down < 5 * 1_000
    assert row.control_up == row.control_down == 0
    assert row.seen is not None


def test_nothing_else_exists(gateway: Gateway) -> None:
    paths = [
        "/v1/control/list-runs",
        "/v1/runtime/get-run",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
    ]
    paths += ["/docs", "/openapi.json", "/", "/v1/uploads/", "/v1/uploads/../ca"]
    for path in paths:
        check_refused(gateway.request("POST", path), 404, "not-here")
    check_refused(gateway.request("GET", "/v1/uploads"), 404, "not-here")
    assert refusals(gateway, "not-here")[0]["peer"] == "127.0.0.1"


def test_strangers_are_refused(gateway: Gateway) -> None:
    device = gateway.device("signed")
    for path in ("/v1/uploads", "/v1/receipt", "/v1/fleet/pull-messages"):
        check_refused(gateway.request("POST", path, {"Tus-Resumable": "1.0.0"}), 401, "unsigned")
    stranger = ec.generate_private_key(ec.SECP384R1())
    name = identity.fingerprint(stranger.public_key())
    answer = gateway.request("POST", "/v1/receipt", identity.sign(stranger))
    check_refused(answer, 403, "not-enrolled")
    assert name in answer.json()["error"]["message"]
    assert [line["key"] for line in refusals(gateway, "not-enrolled")] == [name]
    signature = identity.sign(stranger)[identity.SIGNATURE_HEADER]
    stolen = identity.sign(device.key) | {identity.SIGNATURE_HEADER: signature}
    check_refused(gateway.request("POST", "/v1/receipt", stolen), 401, "unsigned")
    old = identity.sign(device.key) | {identity.TIME_HEADER: "2020-01-01T00:00:00+00:00"}
    old[identity.SIGNATURE_HEADER] = sign_text(device.key, old[identity.TIME_HEADER])
    check_refused(gateway.request("POST", "/v1/receipt", old), 401, "clock")


def sign_text(key: ec.EllipticCurvePrivateKey, text: str) -> str:
    return base64.b64encode(key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode()


def test_tickets(gateway: Gateway) -> None:
    device, other = gateway.device("holder"), gateway.device("thief")
    no_ticket = gateway.request("POST", "/v1/receipt", identity.sign(device.key))
    check_refused(no_ticket, 401, "ticket-missing")
    check_refused(device.call("POST", "/v1/receipt", ticket="made-up"), 403, "ticket-unknown")
    check_refused(other.call("POST", "/v1/receipt", ticket=device.ticket), 403, "ticket-foreign")
    newer = gateway.ledger.issue(device.offer)
    check_refused(device.create(WEIGHTS), 403, "ticket-spent")
    old, device.ticket = device.ticket, newer
    assert device.create(WEIGHTS).status_code == 201
    everything = gateway.ledger.audit_path.read_text() + gateway.log
    assert not any(secret in everything for secret in (old, newer, "made-up"))


def test_requests_that_do_not_fit_the_offer(gateway: Gateway) -> None:
    device = gateway.device("misfit")
    check_refused(device.create("other.safetensors"), 400, "unknown-file")
    check_refused(
        device.call("POST", "/v1/uploads", Upload_Length="1", Upload_Metadata="filename ?"),
        400,
        "unknown-file",
    )
    check_refused(device.create(WEIGHTS, length=300_001), 400, "length-differs")
    check_refused(device.create(WEIGHTS, Tus_Resumable="0.2.2"), 412, "tus-version")
    check_refused(device.patch(WEIGHTS, 0, b"x"), 404, "not-created")
    device.create(WEIGHTS)
    check_refused(device.patch(WEIGHTS, 0, b"x", Content_Type="text/plain"), 415, "content-type")
    check_refused(device.patch(WEIGHTS, 0, b"x", Upload_Offset="-1"), 400, "bad-header")
    device.patch(WEIGHTS, 0, b"abc")
    wrong = device.patch(WEIGHTS, 7, b"x")
    check_refused(wrong, 409, "offset")
    assert wrong.headers["Upload-Offset"] == "3"
    check_refused(device.call("POST", f"/v1/uploads/{WEIGHTS}/parts"), 404, "not-here")
    assert device.call("OPTIONS", "/v1/uploads").headers["Tus-Version"] == "1.0.0"


def test_not_a_byte_too_many(gateway: Gateway) -> None:
    device = gateway.device("greedy")
    device.create(WEIGHTS)
    check_refused(device.patch(WEIGHTS, 0, b"x" * 300_001), 413, "too-large")
    assert (device.incoming / WEIGHTS).stat().st_size == 0, "announced: refused before it came"
    check_refused(device.patch(WEIGHTS, 0, (b"x" * 1_000 for _ in range(301))), 413, "too-large")
    assert (device.incoming / WEIGHTS).stat().st_size == 300_000


def test_a_disk_without_room(gateway: Gateway) -> None:
    device = gateway.device("huge")
    digest = {"sha256": "0" * 64}
    files = [{"name": "card.json", "size": 10, **digest}, {"name": WEIGHTS, "size": 10**15, **digest}]
    device.offer = offer_of(make_card("huge"), files)
    device.ticket = gateway.ledger.issue(device.offer)
    check_refused(device.create(WEIGHTS), 507, "server-full")
    assert not (device.incoming / WEIGHTS).exists()


def test_wrong_bytes_are_thrown_away_and_sent_again(gateway: Gateway) -> None:
    device = gateway.device("corrupt")
    device.send_all()
    with open(device.incoming / WEIGHTS, "r+b") as file:
        file.write(b"flipped")
    answer = device.receipt()
    check_refused(answer, 409, "digest-mismatch")
    assert answer.json()["bad"] == [WEIGHTS]
    assert not (device.incoming / WEIGHTS).exists()
    assert [line["device"] for line in refusals(gateway, "digest-mismatch")] == ["corrupt"]
    assert device.create(WEIGHTS).headers["Upload-Offset"] == "0"
    device.patch(WEIGHTS, 0, (device.folder / WEIGHTS).read_bytes())
    assert device.receipt().status_code == 200


def test_a_broken_connection_keeps_what_came(gateway: Gateway) -> None:
    device = gateway.device("broken")
    device.create(WEIGHTS)
    with open_patch(device, WEIGHTS, 300_000) as tunnel:
        tunnel.sendall((device.folder / WEIGHTS).read_bytes()[:50_000])
        wait_until(lambda: (device.incoming / WEIGHTS).stat().st_size == 50_000)
    content = (device.folder / WEIGHTS).read_bytes()
    assert device.patch(WEIGHTS, 50_000, content[50_000:]).status_code == 204
    assert (device.incoming / WEIGHTS).read_bytes() == content


def test_a_newer_request_takes_over_from_one_that_hangs(gateway: Gateway) -> None:
    device = gateway.device("hanging")
    content = (device.folder / WEIGHTS).read_bytes()
    device.create(WEIGHTS)
    with open_patch(device, WEIGHTS, 300_000) as tunnel:
        tunnel.sendall(content[:50_000])
        wait_until(lambda: (device.incoming / WEIGHTS).stat().st_size == 50_000)
        tunnel.sendall(content[50_000:60_000])
        offset = int(device.create(WEIGHTS).headers["Upload-Offset"])
        assert offset in (50_000, 60_000)
        assert device.patch(WEIGHTS, offset, content[offset:]).status_code == 204
        assert b"taken-over" in answer_on(tunnel)
    assert (device.incoming / WEIGHTS).read_bytes() == content


def test_many_requests_for_one_file_never_mix(gateway: Gateway) -> None:
    device = gateway.device("racing", {WEIGHTS: 3_000_000})
    content = (device.folder / WEIGHTS).read_bytes()
    device.create(WEIGHTS)

    def push() -> None:
        with httpx.Client(verify=gateway.context, trust_env=False, timeout=30) as client:
            for _ in range(10):
                headers = identity.sign(device.key) | {
                    "Tus-Resumable": "1.0.0",
                    "Authorization": f"Bearer {device.ticket}",
                }
                url = f"https://127.0.0.1:{gateway.port}/v1/uploads/{WEIGHTS}"
                offset = int(client.head(url, headers=headers).headers["Upload-Offset"])
                body = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": str(offset)}
                try:
                    client.patch(url, headers=headers | body, content=content[offset : offset + 400_000])
                except httpx.TransportError:
                    continue  # cut off by another

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    here = (device.incoming / WEIGHTS).read_bytes()
    assert len(here) >= 400_000
    assert here == content[: len(here)]


def test_revoked_in_the_middle_of_an_upload(gateway: Gateway) -> None:
    device = gateway.device("revoked")
    device.create(WEIGHTS)
    with open_patch(device, WEIGHTS, 300_000) as tunnel:
        tunnel.sendall(b"x" * 1000)
        wait_until(lambda: (device.incoming / WEIGHTS).stat().st_size == 1000)
        gateway.home.revoke("revoked")
        assert b'"revoked"' in answer_on(tunnel)
    check_refused(device.create(WEIGHTS), 403, "revoked")
    assert refusals(gateway, "revoked")[0]["device"] == "revoked"


def test_a_new_offer_replaces_the_old_one(gateway: Gateway) -> None:
    device = gateway.device("changed")
    device.send_all()
    old, first = device.incoming, (device.offer, device.folder)
    device.folder = make_upload(gateway.folder / "devices" / "changed-2", "changed", {WEIGHTS: 1000})
    device.offer = read_offer(device.folder)
    device.ticket = gateway.ledger.issue(device.offer)
    device.send_all()
    assert not old.exists()
    device.offer, device.folder = first
    device.ticket = gateway.ledger.issue(device.offer)
    assert device.create(WEIGHTS).headers["Upload-Offset"] == "0", "and back again"
    device.send_all()
    assert device.receipt().json()["digest"] == device.offer.digest
    assert read_card(device.received).files == read_card(device.folder).files


def test_killed_at_any_moment(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path).start()
    device = gateway.device("killed", {WEIGHTS: 2_000_000})
    content = (device.folder / WEIGHTS).read_bytes()
    try:
        device.create(WEIGHTS)
        with open_patch(device, WEIGHTS, len(content)) as tunnel:
            tunnel.sendall(content[:1_500_000])
            wait_until(lambda: (device.incoming / WEIGHTS).stat().st_size > 1_000_000)
            gateway.end(signal.SIGKILL)
        gateway.start()
        offset = int(device.create(WEIGHTS).headers["Upload-Offset"])
        assert 1_000_000 < offset <= 1_500_000
        assert device.patch(WEIGHTS, offset, content[offset:]).status_code == 204
        device.create("card.json")
        device.patch("card.json", 0, (device.folder / "card.json").read_bytes())
        gateway.end(signal.SIGKILL)
        # As a kill leaves it between the move of the folder and the note of it.
        device.incoming.rename(device.received)
        gateway.start()
        assert device.receipt().json()["digest"] == device.offer.digest
        assert sha256_file(device.received / WEIGHTS) == sha256_file(device.folder / WEIGHTS)
    finally:
        gateway.end()
    assert "Traceback" not in gateway.log


def test_refusals_of_one_peer_do_not_fill_the_disk(spoiled: Gateway) -> None:
    for _ in range(30):
        check_refused(spoiled.request("POST", "/v1/receipt"), 401, "unsigned")
    assert len(refusals(spoiled, "unsigned")) == 20


def test_a_defect_tells_the_device_nothing_of_it(spoiled: Gateway) -> None:
    device = spoiled.device("unlucky")
    (spoiled.run / "federation" / "incoming" / "unlucky").write_text("a file where a folder belongs")
    answer = device.create(WEIGHTS)
    check_refused(answer, 500, "defect")
    assert "Error" not in answer.text
    wait_until(lambda: "FileExistsError" in spoiled.log)
    assert device.ticket not in spoiled.log


def test_memory_stays_small(gateway: Gateway) -> None:
    assert gateway.process is not None
    device = gateway.device("large", {WEIGHTS: 40 * 2**20})
    before = psutil.Process(gateway.process.pid).memory_info().rss
    device.send_all()
    assert psutil.Process(gateway.process.pid).memory_info().rss < min(before + 20 * 2**20, 200 * 2**20)


def test_command_line_reports_bad_input_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    line = [
        "--home",
        tmp_path,
        "--run",
        tmp_path / "run",
        "--host",
        "127.0.0.1",
        "--port",
        1,
        "--superlink",
        "127.0.0.1:2",
    ]
    command = [sys.executable, "-m", "deepfusion.federation.server.gateway", *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("deepfusion: ")
    assert "[no-config]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_flower_is_away(gateway: Gateway) -> None:
    device = gateway.device("alone")
    check_refused(device.call("POST", "/v1/fleet/pull-messages", b"x"), 503, "superlink-away")
    check_refused(device.call("POST", "/v1/fleet/push-object", b"x" * (8 * 2**20 + 1)), 413, "too-large")
    wait_until(lambda: gateway.ledger.devices()["alone"].control_up > 8 * 2**20)
    row = gateway.ledger.devices()["alone"]
    assert row.up == row.down == 0


@pytest.mark.slow
def test_flower_through_the_gateway(tmp_path: Path) -> None:
    """A real SuperLink takes a registered device, and no other, by way of the gateway."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
    from flwr.proto.node_pb2 import Node

    gateway = Gateway(tmp_path).start()
    link = SuperLink(gateway.home, gateway.superlink)
    device = gateway.device("registered")
    superlink = subprocess.Popen(
        link.command(), env=link.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def call(who: Device, name: str, request: bytes) -> httpx.Response:
        return who.call(
            "POST",
            f"/v1/fleet/{name}",
            request,
            Content_Type="application/protobuf",
            Accept="application/protobuf",
        )

    def activate(who: Device, claimed: Device) -> httpx.Response:
        pem = claimed.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return call(
            who,
            "activate-node",
            ActivateNodeRequest(public_key=pem, heartbeat_interval=30).SerializeToString(),
        )

    try:
        wait_until(lambda: call(device, "pull-messages", b"").status_code != 503)
        link.register()
        other = gateway.device("unregistered")
        answer = activate(device, device)
        assert answer.status_code == 200, answer.text
        node = ActivateNodeResponse.FromString(answer.content).node_id
        beat = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30)
        answer = call(device, "send-node-heartbeat", beat.SerializeToString())
        assert answer.headers["content-type"] == "application/protobuf"
        assert SendNodeHeartbeatResponse.FromString(answer.content).success
        assert activate(other, other).status_code >= 400
        assert activate(other, device).status_code == 401, "Flower looks at the signature too"
        row = gateway.ledger.devices()["registered"]
        assert row.control_up > 2 * 400
        assert row.control_down > 0
        assert row.up == 0
    finally:
        gateway.end()
        superlink.terminate()
        superlink.wait(30)
