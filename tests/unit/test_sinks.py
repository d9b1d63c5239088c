"""Uploads by way of an object store: a real server of S3's protocol, presigned addresses, and the gateway that
collects.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from gateways import Device, Faults, Gateway, free_port
from moto.server import ThreadedMotoServer

from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.federation.device import transfer
from deepfusion.federation.device.transfer import hand_in
from deepfusion.federation.offer import read_offer
from deepfusion.federation.server.sinks import S3Sink
from deepfusion.sections import S3Section
from deepfusion.uploads.card import read_card, write_card

WEIGHTS = "model.safetensors"
MIB = 2**20
PART = 5 * MIB


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings of an object store with an empty bucket."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        endpoint = f"http://127.0.0.1:{port}"
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="uploads")
        yield {"bucket": "uploads", "endpoint": endpoint, "region": "us-east-1", "part_bytes": PART}
    server.stop()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, store: dict[str, Any]) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("sinks"), {"sink": "s3", "s3": store}).start()
    yield gateway
    gateway.end()
    assert "Traceback" not in gateway.log


@pytest.fixture
def client(store: dict[str, Any]) -> Any:
    return boto3.client("s3", endpoint_url=store["endpoint"], region_name="us-east-1")


def is_empty(client: Any, device: str) -> bool:
    prefix = {"Bucket": "uploads", "Prefix": f"deepfusion/run/{device}/"}
    return not client.list_objects_v2(**prefix).get("Contents") and not client.list_multipart_uploads(
        **prefix
    ).get("Uploads")


def parts(device: Device) -> list[dict[str, Any]]:
    answer = device.call("POST", f"/v1/uploads/{WEIGHTS}/parts").json()
    assert answer["part_bytes"] == PART
    return answer["parts"]


def put(device: Device, part: dict[str, Any]) -> None:
    content = (device.folder / WEIGHTS).read_bytes()[part["offset"] :][: part["size"]]
    httpx.put(part["url"], content=content).raise_for_status()


def check_arrived(device: Device, receipt: dict[str, Any]) -> None:
    assert (receipt["digest"], receipt["state"]) == (device.offer.digest, "done")
    assert {path.name: sha256_file(path) for path in device.received.iterdir()} == {
        file.name: file.sha256 for file in device.offer.files
    }


@pytest.mark.parametrize("name", ["stored", "клиника-模型一"])
def test_hand_in_by_the_store(
    name: str, gateway: Gateway, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = gateway.device(name, {WEIGHTS: 12 * MIB, "merges.txt": 0})
    check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))
    assert is_empty(client, name)
    row = gateway.ledger.devices()[name]
    assert device.offer.size < row.up < device.offer.size + 20_000
    assert row.received == device.offer.size


def test_goes_on_with_parts_that_are_there(gateway: Gateway, client: Any) -> None:
    device = gateway.device("resumed", {WEIGHTS: 12 * MIB})
    created = device.create(WEIGHTS)
    assert (created.status_code, created.headers["Deepfusion-Sink"]) == (201, "s3")
    wanted = parts(device)
    assert [(part["number"], part["offset"], part["size"]) for part in wanted] == [
        (1, 0, PART),
        (2, PART, PART),
        (3, 2 * PART, 2 * MIB),
    ]
    put(device, wanted[2])
    httpx.put(wanted[0]["url"], content=b"short").raise_for_status()
    assert [part["number"] for part in parts(device)] == [1, 2], "one of a wrong size counts for nothing"
    assert gateway.ledger.devices()["resumed"].received == 2 * MIB
    up = gateway.ledger.devices()["resumed"].up
    put(device, wanted[0])
    parts(device)
    assert PART <= gateway.ledger.devices()["resumed"].up - up < PART + 10_000
    answer = device.receipt()
    assert answer.status_code == 409
    assert answer.json()["bad"] == ["card.json", WEIGHTS]
    gateway.end(9)
    gateway.start()
    assert [part["number"] for part in parts(device)] == [2], "nothing is forgotten with the process"
    assert gateway.ledger.devices()["resumed"].up - up < PART + 20_000, "nor counted twice"
    check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))
    assert is_empty(client, "resumed")


def test_wrong_bytes_in_the_store_are_sent_again(gateway: Gateway, client: Any) -> None:
    device = gateway.device("spoiled", {WEIGHTS: MIB})
    device.create(WEIGHTS)
    [part] = parts(device)
    httpx.put(part["url"], content=b"x" * MIB).raise_for_status()
    assert parts(device) == []
    check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))


def test_an_object_put_together_before_a_kill(gateway: Gateway, client: Any) -> None:
    device = gateway.device("collected", {WEIGHTS: MIB})
    key = f"deepfusion/run/collected/{device.offer.digest[:16]}/{WEIGHTS}"
    content = (device.folder / WEIGHTS).read_bytes()
    client.put_object(Bucket="uploads", Key=key, Body=content)
    device.create(WEIGHTS)
    (device.incoming / WEIGHTS).write_bytes(content[:1000])  # and half fetched
    assert parts(device) == []
    check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))
    assert is_empty(client, "collected")


def test_a_new_offer_clears_the_store_of_the_old_one(gateway: Gateway, client: Any) -> None:
    device = gateway.device("renewed", {WEIGHTS: MIB})
    device.create(WEIGHTS)
    put(device, parts(device)[0])
    (device.folder / WEIGHTS).write_bytes(b"another")
    write_card(device.folder, read_card(device.folder))
    device.offer = read_offer(device.folder)
    device.ticket = gateway.ledger.issue(device.offer)
    device.create(WEIGHTS)
    assert is_empty(client, "renewed")


def test_bytes_do_not_come_to_the_gateway(gateway: Gateway) -> None:
    device = gateway.device("direct", {WEIGHTS: MIB})
    device.create(WEIGHTS)
    assert device.patch(WEIGHTS, 0, b"x").json()["error"]["code"] == "not-here"


def test_the_store_is_away_for_a_while(tmp_path: Path, store: dict[str, Any]) -> None:
    port = free_port()
    own = ThreadedMotoServer(port=port, verbose=False)
    own.start()
    own_store = store | {"endpoint": f"http://127.0.0.1:{port}"}
    boto3.client("s3", endpoint_url=own_store["endpoint"], region_name="us-east-1").create_bucket(
        Bucket="uploads"
    )
    gateway = Gateway(tmp_path, {"sink": "s3", "s3": own_store}).start()
    try:
        device = gateway.device("patient", {WEIGHTS: MIB})
        device.create(WEIGHTS)
        own.stop()
        answer = device.call("POST", f"/v1/uploads/{WEIGHTS}/parts")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store-away")
        assert not any(line["event"] == "refused" for line in gateway.audit), "not its fault"
    finally:
        gateway.end()


@pytest.mark.slow
def test_a_store_behind_a_network_that_fails(tmp_path: Path, store: dict[str, Any]) -> None:
    with Faults(httpx.URL(store["endpoint"]).port or 0) as faults:
        gateway = Gateway(
            tmp_path, {"sink": "s3", "s3": store | {"endpoint": f"http://127.0.0.1:{faults.port}"}}
        ).start()
        try:
            device = gateway.device("unsteady", {WEIGHTS: 64 * MIB})
            faults.resets = (0.3, 0.6)
            check_arrived(device, hand_in(device.connection, device.folder, device.offer, device.ticket))
        finally:
            gateway.end()
    assert faults.count > 1


def test_a_store_that_cannot_be_used(store: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        S3Sink(S3Section(bucket="other", endpoint=store["endpoint"], region="us-east-1"), "run")
    assert caught.value.code == "no-s3"
    with pytest.raises(InputError) as caught:
        S3Sink(S3Section(), "run")
    assert caught.value.where == "federation.s3.bucket"


def test_addresses_hold_for_one_part_of_one_size(store: dict[str, Any], gateway: Gateway) -> None:
    device = gateway.device("signed", {WEIGHTS: MIB})
    device.create(WEIGHTS)
    [part] = parts(device)
    query = dict(httpx.URL(part["url"]).params)
    assert "content-length" in query["X-Amz-SignedHeaders"]
    assert query["partNumber"] == "1"
    assert query["X-Amz-Expires"] == "3600"


def test_no_plain_http_to_stores_elsewhere() -> None:
    with pytest.raises(InputError) as caught:
        transfer._check_store(httpx.URL("http://store.example/part"))
    assert caught.value.code == "store-insecure"
    transfer._check_store(httpx.URL("https://store.example/part"))
