"""The ServerApp with devices in the same process: who is asked when, what is granted, and when it is enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from test_offer import make_upload

from deepfusion.config import load_config, parse_config, save_config
from deepfusion.errors import InputError
from deepfusion.federation.flower import messages
from deepfusion.federation.flower.embedded import EmbeddedGrid
from deepfusion.federation.flower.server_app import Coordinator, seconds, task_config
from deepfusion.federation.offer import Offer
from deepfusion.federation.server.ledger import Ledger


@pytest.fixture(autouse=True, scope="module")
def identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0


@dataclass
class Spec:
    id: str


@dataclass
class ReadyDevice:
    """A device whose upload is ready. `asked` counts the tasks it got."""

    run: Path
    folder: Path
    spec: Spec
    error: InputError | None = None
    asked: int = 0
    receipts: list[dict[str, Any]] = field(default_factory=list)

    def train(self, task: messages.Task) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error

    def hand_in(self, offer: Offer, ticket: str) -> dict[str, Any]:
        ledger = Ledger(self.run)
        granted = ledger.ticket(ticket)
        assert granted is not None
        assert (granted.device, granted.digest, granted.spent) == (self.spec.id, offer.digest, False)
        receipt = ledger.finish(
            self.spec.id, {"device": self.spec.id, "digest": offer.digest, "size": offer.size}
        )
        self.receipts.append(receipt)
        return receipt


class Grid(EmbeddedGrid):
    """Devices whose processes can be started again, and whose errors do not stop the test."""

    started: str = ""

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=n.node_id, name=n.name, last_activated_at=self.started)
            for n in super().get_nodes()
        ]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        wanted = list(message_ids)
        while self._sent:
            name, message = self._sent.popitem()
            device = self._devices[message.metadata.dst_node_id]

            from deepfusion.federation.flower.client_app import Visit

            self._replies[name] = Visit(device).answer(message)
        return [self._replies.pop(name) for name in wanted if name in self._replies]


def federate(tmp_path: Path, names: str, **federation: Any) -> tuple[Coordinator, list[ReadyDevice], Ledger]:
    run = tmp_path / "run"
    run.mkdir()
    save_config(parse_config({"federation": federation}), run / "config.yaml")
    devices = [ReadyDevice(run, make_upload(tmp_path / name), Spec(name)) for name in names]
    ledger = Ledger(run)
    return Coordinator(Grid(devices, 1), ledger, run), devices, ledger


def states(ledger: Ledger) -> dict[str, str]:
    return {row.device: row.state for row in ledger.devices().values()}


def test_it_closes_as_soon_as_enough_are_in_and_later_ones_are_late(tmp_path):
    coordinator, devices, ledger = federate(tmp_path, "abc", wait_for=2)
    third = coordinator.grid._devices.pop(3)
    for _ in range(3):
        coordinator.step()
    assert states(ledger) == {"a": "done", "b": "done"}
    assert ledger.closed
    coordinator.grid._devices[3] = third
    for _ in range(3):
        coordinator.step()
    assert states(ledger) == {"a": "done", "b": "done", "c": "late"}
    assert [device.asked for device in devices] == [1, 1, 1]  # who is done is left in peace


def test_it_does_not_close_before(tmp_path):
    coordinator, _, ledger = federate(tmp_path, "ab", wait_for=3)
    for _ in range(4):
        coordinator.step()
    assert not ledger.closed


def test_it_closes_at_the_deadline_also_if_the_server_was_away(tmp_path):
    coordinator, _, ledger = federate(tmp_path, "ab", wait_for=3, deadline="1h")
    coordinator.step()
    assert not ledger.closed
    ledger.forget("began")
    ledger.remember("began", "0")
    Coordinator(coordinator.grid, ledger, tmp_path / "run").step()
    assert ledger.closed


def test_a_device_that_was_started_again_is_asked_again_and_gets_the_same_receipt(tmp_path):
    coordinator, (device,), ledger = federate(tmp_path, "a", wait_for=2)
    for _ in range(3):
        coordinator.step()
    coordinator.grid.started = "2100-01-01T00:00:00+00:00"
    for _ in range(3):
        coordinator.step()
    assert device.asked >= 2
    assert len(device.receipts) == 1  # nothing was uploaded twice
    assert states(ledger) == {"a": "done"}


def test_a_second_upload_of_other_weights_is_refused(tmp_path):
    coordinator, (device,), ledger = federate(tmp_path, "a", wait_for=2)
    for _ in range(3):
        coordinator.step()
    device.folder = make_upload(tmp_path / "other" / "a", {"model.safetensors": b"others"})
    coordinator.grid.started = "2100-01-01T00:00:00+00:00"
    coordinator.step()
    coordinator.step()
    assert states(ledger) == {"a": "done"}
    assert len(device.receipts) == 1
    assert '"already-uploaded"' in ledger.audit_path.read_text()


@pytest.mark.parametrize(
    ("federation", "folder", "code"), [({"max_upload_bytes": 10}, "a", "too-large"), ({}, "b", "folder-name")]
)
def test_an_offer_that_cannot_be_taken_is_refused_before_a_byte_moves(tmp_path, federation, folder, code):
    coordinator, (device,), ledger = federate(tmp_path, "a", wait_for=1, **federation)
    device.folder = make_upload(tmp_path / "other" / folder)
    for _ in range(3):
        coordinator.step()
    assert states(ledger) == {"a": "rejected"}
    assert f"[{code}]" in ledger.device("a").detail
    assert device.receipts == []
    assert device.asked == 1


def test_a_device_that_cannot_train_is_not_asked_again_until_it_is_started_again(tmp_path):
    coordinator, (device,), ledger = federate(tmp_path, "a", wait_for=1)
    device.error = InputError("no such file", where="/home/alice/private.jsonl", code="no-data")
    for _ in range(3):
        coordinator.step()
    assert states(ledger) == {"a": "failed"}
    assert device.asked == 1
    assert "alice" not in ledger.device("a").detail + ledger.audit_path.read_text()
    device.error, coordinator.grid.started = None, "2100-01-01T00:00:00+00:00"
    for _ in range(3):
        coordinator.step()
    assert states(ledger) == {"a": "done"}


def test_devices_learn_nothing_of_the_plans_and_places_of_the_server():
    text = task_config(load_config(overrides=["data.private=/srv/secret.jsonl", "distill.base=/srv/base"]))
    assert "secret" not in text
    assert set(yaml.safe_load(text)) == {"seed", "precision", "checkpoint_seconds", "data", "device"}


@pytest.mark.parametrize(("text", "length"), [("30s", 30), ("90m", 5400), ("12h", 43200), ("7d", 604800)])
def test_deadlines(text, length):
    assert seconds(text) == length
