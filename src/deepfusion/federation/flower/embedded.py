"""The same ServerApp and ClientApps in one process: a federation simulated without a network, and without Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from deepfusion.config import save_config
from deepfusion.errors import InputError
from deepfusion.federation.flower import messages
from deepfusion.federation.flower.client_app import Visit
from deepfusion.federation.flower.server_app import app
from deepfusion.federation.offer import Offer
from deepfusion.federation.server.ledger import Ledger
from deepfusion.jobs import run_jobs
from deepfusion.pipeline import STAGES, Stage
from deepfusion.report.artefacts import write_transport
from deepfusion.schema import Config
from deepfusion.sections import DeviceSpec
from deepfusion.text.rows import Document


@dataclass
class SimulatedDevice:
    """A device of a simulated federation; its upload folder lies where the server takes it."""

    run: Path
    folder: Path
    config: Config
    spec: DeviceSpec
    private: list[Document]
    held_out: list[Document]

    def train(self, task: messages.Task) -> None:
        """As the local pipeline trains it."""
        from deepfusion.stages.device import train_device

        work = self.run / "work" / str(self.spec.id)
        train_device(self.config, self.spec, self.private, self.held_out, self.folder, work)

    def hand_in(self, offer: Offer, ticket: str) -> dict[str, Any]:
        """Nothing has to move; the ticket is checked as the gateway would."""
        ledger = Ledger(self.run)
        granted = ledger.ticket(ticket)
        if (
            granted is None
            or granted.spent
            or (granted.device, granted.digest) != (offer.card.device, offer.digest)
        ):
            raise InputError(
                "the ticket is not for this upload", where=f"device {self.spec.id}", code="ticket-foreign"
            )
        return ledger.finish(
            offer.card.device, {"device": offer.card.device, "digest": offer.digest, "size": offer.size}
        )


class EmbeddedGrid(Grid):
    """Messages to simulated devices, answered in worker processes as soon as replies are asked for.

    Args:
        devices: they are nodes 1, 2, ... in this order.
        workers: processes side by side; results do not depend on it.
    """

    def __init__(self, devices: list[SimulatedDevice], workers: int | None) -> None:
        self._devices = dict(enumerate(devices, start=1))
        self._workers = workers
        self._sent: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All devices, always."""
        return list(self._devices)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All devices with their names."""
        return [NodeInfo(node_id=node, name=str(device.spec.id)) for node, device in self._devices.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until replies are asked for."""
        names = []
        for message in messages:
            self._count += 1
            name = str(self._count)
            message.metadata.__dict__["_message_id"] = name
            self._sent[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the devices answer all that was sent, and give the replies asked for."""
        if self._sent:
            waiting, self._sent = self._sent, {}
            jobs = [{"device": self._devices[m.metadata.dst_node_id], "message": m} for m in waiting.values()]
            self._replies |= dict(zip(waiting, run_jobs(_answer, jobs, self._workers), strict=True))
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))


def collect(config: Config, devices: list[SimulatedDevice], out: Path) -> None:
    """Let the ServerApp work until all devices have handed in; their folders are `out`/uploads/<device>."""
    grid = EmbeddedGrid(devices, config.jobs)
    federation = config.federation.model_copy(update={"wait_for": len(devices)})
    save_config(config.model_copy(update={"federation": federation}), out / "config.yaml")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    app(grid=grid, context=Context(1, 0, {}, RecordDict(), {"run": str(out), "stay": False}))


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """The stage that trains devices, by way of the federation's apps; the uploads are those of the local pipeline."""
    from deepfusion.stages.device import simulated_devices

    simulated = simulated_devices(config)
    if config.federation.wait_for not in (None, len(simulated)):
        what = f"federation.wait_for={config.federation.wait_for}: a simulation waits for all {len(simulated)} devices"
        raise InputError(what, fix="--set federation.wait_for=null", code="contradiction")
    devices = [
        SimulatedDevice(
            out,
            out / "uploads" / str(job["device"].id),
            config,
            job["device"],
            job["private"],
            job["held_out"],
        )
        for job in simulated
    ]
    collect(config, devices, out)
    write_transport(out / "uploads", out / "transport.json")
    return {"devices": len(devices)}


def source() -> Stage:
    """In place of the local device stage: the same devices, by way of the federation."""
    return replace(STAGES[0], run=run)


def _answer(device: SimulatedDevice, message: Message) -> Message:
    visit = Visit(device)
    reply = visit.answer(message)
    if visit.error is not None:
        raise visit.error  # a simulation with a broken device stops, as the local pipeline does
    return reply
