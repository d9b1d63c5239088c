"""Handing in from the device's side: through resets, black holes and kills, and what it says when it cannot."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from gateways import Device, Faults, Gateway, free_port, make_card, offer_of

from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.federation.device.connection import Connection, Refused
from deepfusion.federation.device.transfer import hand_in
from deepfusion.federation.server import uploads
from deepfusion.federation.server.gateway import create_app
from deepfusion.federation.server.home import Home
from deepfusion.sections import FederationSection

WEIGHTS = "model.safetensors"
MIB = 2**20


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("transfer")).start()
    yield gateway
    gateway.end()
    assert "Traceback" not in gateway.log


def check_arrived(device: Device, receipt: dict[str, object]) -> None:
    assert (receipt["device"], receipt["digest"], receipt["state"]) == (
        device.name,
        device.offer.digest,
        "done",
    )
    assert {path.name: sha256_file(path) for path in device.received.iterdir()} == {
        file.name: file.sha256 for file in device.offer.files
    }


def part_size(device: Device) -> int:
    path = device.incoming / WEIGHTS
    return path.stat().st_size if path.exists() else 0


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("did not come true in 10 seconds")


@pytest.mark.parametrize("name", ["plain", "клиника-模型一"])
def test_hand_in_and_again(name: str, gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    device = gateway.device(name, {WEIGHTS: 20 * MIB, "merges.txt": 0})
    receipt = hand_in(device.connection, device.folder, device.offer, device.ticket)
    check_arrived(device, receipt)
    assert receipt["files"] == 3
    assert f"[device {name}] upload 100% 20.0 MiB of 20.0 MiB, " in capfd.readouterr().err
    again = hand_in(device.connection, device.folder, device.offer, device.ticket)
    assert again == receipt, "as after a crash that lost the answer"
    row = gateway.ledger.devices()[name]
    assert device.offer.size < row.up < device.offer.size + 20_000


def test_connections_that_break_at_random_moments(gateway: Gateway) -> None:
    device = gateway.device("resets", {WEIGHTS: 32 * MIB})
    with Faults(gateway.port, resets=(0.05, 0.2)) as faults:
        connection = gateway.connect(device.key, faults.port)
        check_arrived(device, hand_in(connection, device.folder, device.offer, device.ticket))
    assert faults.count > 1
    # What the network lost on its way depends on how busy the machine is; what the server has had does not.
    up = gateway.ledger.devices()["resets"].up
    lost = uploads._BLOCK_BYTES + 20_000  # of each break: a block that was not yet written, and headers
    assert up < device.offer.size + lost * faults.count, "what has arrived is not sent again"


def test_a_network_that_swallows_everything(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    device = gateway.device("hole", {WEIGHTS: 48 * MIB})
    with Faults(gateway.port) as faults:
        connection = gateway.connect(device.key, faults.port, seconds=0.5)

        def outage() -> None:
            wait_until(lambda: part_size(device) > MIB)
            faults.swallow(True)
            time.sleep(1.5)
            faults.swallow(False)

        thread = threading.Thread(target=outage)
        thread.start()
        check_arrived(device, hand_in(connection, device.folder, device.offer, device.ticket))
        thread.join()
    said = capfd.readouterr().err
    assert f"[device] no connection to 127.0.0.1:{faults.port} for 0:0" in said
    assert f"[device] goes on at 127.0.0.1:{faults.port}\n" in said


@pytest.mark.slow
def test_both_sides_are_killed(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path).start()
    device = gateway.device("killed", {WEIGHTS: 192 * MIB})
    first = device.process()
    try:
        wait_until(lambda: part_size(device) > 10 * MIB)
        first.send_signal(signal.SIGKILL)
        first.wait()
        reached = part_size(device)
        assert reached < device.offer.size, "killed too late to show anything"
        second = device.process()
        wait_until(lambda: part_size(device) > reached + 5 * MIB)
        gateway.end(signal.SIGKILL)
        gateway.start()
        out, errors = second.communicate(timeout=60)
        assert second.returncode == 0, errors
        done = json.loads(out)
        check_arrived(device, done["receipt"])
        assert done["peak"] < 120 * MIB
        row = gateway.ledger.devices()["killed"]
        assert row.up < 1.5 * device.offer.size
    finally:
        first.kill()
        gateway.end()


def test_wrong_bytes_on_the_server_are_sent_again(gateway: Gateway) -> None:
    device = gateway.device("mended")
    device.create(WEIGHTS)
    device.patch(WEIGHTS, 0, b"x" * 200_000)
    check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))


def test_bytes_that_go_wrong_each_time(gateway: Gateway) -> None:
    device = gateway.device("hopeless", {WEIGHTS: 8 * MIB, "tokenizer.json": 1000, "vocab.json": 1000})
    wrong = bytes([(device.folder / WEIGHTS).read_bytes()[0] ^ 255])
    over = threading.Event()

    def spoil() -> None:
        while not over.wait(0.001):
            if part_size(device):
                with open(device.incoming / WEIGHTS, "r+b") as file:
                    file.write(wrong)

    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        with pytest.raises(InputError) as caught:
            hand_in(device.connection, device.folder, device.offer, device.ticket)
    finally:
        over.set()
        thread.join()
    assert caught.value.code == "digest-mismatch"
    assert not device.received.exists()
    # The first time and three times more.
    assert sum(line["event"] == "refused" and line["device"] == "hopeless" for line in gateway.audit) == 4


def test_files_that_take_long_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_ANSWER_SECONDS", 0)  # any file takes long now
    gateway = Gateway(tmp_path)
    app = create_app(gateway.home, gateway.run, FederationSection(), gateway.superlink)
    certificate, key = gateway.home.certificate, gateway.home.certificate_key
    server = uvicorn.Server(
        uvicorn.Config(
            app, port=gateway.port, ssl_certfile=certificate, ssl_keyfile=key, log_level="error", ws="none"
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        device = gateway.device("long", {WEIGHTS: MIB})
        device.create(WEIGHTS)
        device.patch(WEIGHTS, 0, b"wrong" * (MIB // 5))
        check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))
    finally:
        gateway.end()
        server.should_exit = True
        thread.join(30)


@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
def test_files_that_changed_after_the_offer(gateway: Gateway, change: str) -> None:
    device = gateway.device(f"changed-{change}")
    path = device.folder / WEIGHTS
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if change == "shorter" else b"x"))
    with pytest.raises(InputError) as caught:
        hand_in(device.connection, device.folder, device.offer, device.ticket)
    assert caught.value.code == "upload-changed"
    assert WEIGHTS in str(caught.value)


def test_refusals_reach_the_person(gateway: Gateway) -> None:
    device = gateway.device("owner")
    stranger = gateway.connect(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(Refused) as caught:
        hand_in(stranger, device.folder, device.offer, device.ticket)
    assert (caught.value.status, caught.value.code) == (403, "not-enrolled")
    with pytest.raises(Refused) as caught:
        hand_in(device.connection, device.folder, device.offer, "made-up")
    assert caught.value.code == "ticket-unknown"
    gateway.ledger.issue(device.offer)
    with pytest.raises(Refused) as caught:
        hand_in(device.connection, device.folder, device.offer, device.ticket)
    assert caught.value.code == "ticket-spent"


def test_another_authority_is_not_tried_again(gateway: Gateway, tmp_path: Path) -> None:
    other = Home(tmp_path)
    other.prepare([])
    device = gateway.device("deceived")
    connection = Connection(f"127.0.0.1:{gateway.port}", device.key, identity.tls(other.ca))
    with pytest.raises(InputError) as caught:
        hand_in(connection, device.folder, device.offer, device.ticket)
    assert caught.value.code == "wrong-ca"


def test_patience_ends(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    connection = gateway.connect(ec.generate_private_key(ec.SECP256R1()), port, patience=1.0)
    with pytest.raises(InputError) as caught:
        connection.patiently(lambda: connection.call("GET", "/v1/health"))
    assert caught.value.code == "no-server"
    assert capfd.readouterr().err.count(f"no connection to 127.0.0.1:{port} for 0:00, still trying (") == 1


def test_a_full_server_is_waited_for(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    device = gateway.device("huge")
    files = [file.model_dump() for file in device.offer.files]
    device.offer = offer_of(make_card("huge"), [files[0], {**files[1], "size": 10**15}])
    ticket, impatient = gateway.ledger.issue(device.offer), gateway.connect(device.key, patience=0.5)
    with pytest.raises(InputError) as caught:
        hand_in(impatient, device.folder, device.offer, ticket)
    assert "no room" in str(caught.value)
    said = capfd.readouterr().err
    assert (
        f"[device] cannot go on at 127.0.0.1:{gateway.port} for 0:00, still trying (the server has no room"
        in said
    )


def test_a_server_that_is_away_is_waited_for(gateway: Gateway) -> None:
    device = gateway.device("waiting")
    with pytest.raises(httpx.TransportError):  # Flower is not running here
        device.connection.call("POST", "/v1/fleet/pull-messages")
    impatient = gateway.connect(device.key, patience=0.0)
    with pytest.raises(InputError) as caught:
        impatient.patiently(lambda: impatient.call("POST", "/v1/fleet/pull-messages"))
    assert "cannot take messages" in str(caught.value)
