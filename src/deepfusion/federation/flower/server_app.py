"""The ServerApp: asks every device that appears to train, grants tickets for what they offer, and decides when it is
enough.

It holds no weights. Messages are pushed and pulled one by one: `send_and_receive` would keep every reply.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from flwr.app import Context, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp

from deepfusion import progress
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.federation.flower import messages
from deepfusion.federation.offer import Offer, check_offer
from deepfusion.federation.server.ledger import Ledger, Row
from deepfusion.schema import Config

POLL_SECONDS = 1.0
SILENT_SECONDS = 10.0  # a device that has its model ready offers it sooner
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve devices until the run is closed, or for ever if `stay` is set: late uploads are kept for the next run."""
    run, stay = Path(str(context.run_config["run"])), bool(context.run_config["stay"])
    coordinator = Coordinator(grid, Ledger(run), run)
    while stay or not coordinator.ledger.closed:
        if not coordinator.step():
            time.sleep(POLL_SECONDS)


@dataclass
class _Pending:
    """A message on its way; `sent` in seconds since the epoch, `task` while the ledger has yet to say "training"."""

    message: str
    sent: float
    task: bool


class Coordinator:
    """The state of one ServerApp. Everything that must outlive it is in the ledger."""

    def __init__(self, grid: Grid, ledger: Ledger, run: Path) -> None:
        self.grid, self.ledger = grid, ledger
        self.config: Config = load_config(run / "config.yaml")
        self.task = task_config(self.config)
        self.pending: dict[int, _Pending] = {}
        self.dismissed: dict[int, float] = {}  # when the process behind a node was told the last word
        ledger.remember("began", str(time.time()))

    def step(self) -> bool:
        """Send what is due and take what has come; whether anything has."""
        nodes = [node for node in self.grid.get_nodes() if node.name]
        for node in nodes:
            if self._due(node):
                self.ledger.set_state(node.name, "connected")
                self.dismissed.pop(node.node_id, None)
                self._send(node.node_id, messages.task(node.node_id, node.name, self.task))
        names = {node.node_id: node.name for node in nodes}
        busy = False
        for node_id, pending in list(self.pending.items()):
            if pending.task and time.time() - pending.sent > SILENT_SECONDS and node_id in names:
                self.ledger.set_state(names[node_id], "training")
                pending.task = False  # told once: every access to the ledger takes a lock
            for reply in self.grid.pull_messages([pending.message]):
                busy = True
                del self.pending[node_id]
                self._take(node_id, names.get(node_id, ""), reply)
        self._close_if_enough()
        return busy

    def _due(self, node: NodeInfo) -> bool:
        """Whether a device must be asked (again): it is new, or its process is, which knows nothing of a message to
        the old one.
        """
        since = (
            datetime.datetime.fromisoformat(node.last_activated_at).timestamp()
            if node.last_activated_at
            else 0.0
        )
        if node.node_id in self.dismissed:
            return since > self.dismissed[node.node_id]
        pending = self.pending.get(node.node_id)
        return pending is None or since > pending.sent

    def _send(self, node: int, message: Message) -> None:
        now = time.time()
        for identity in self.grid.push_messages([message]):
            self.pending[node] = _Pending(identity, now, message.metadata.message_type == messages.TRAIN)

    def _take(self, node: int, device: str, reply: Message) -> None:
        if reply.has_error():
            progress.say(f"[{device}] no answer: {reply.error.reason}")
            return  # asked again at the next step
        try:
            answer = messages.read(reply)
            if answer.offer is not None:
                self._grant(node, device, answer.offer)
            elif answer.refusal is not None:
                self.ledger.set_state(device, "failed", str(answer.refusal))
                self.ledger.audit(
                    "failed", device=device, code=answer.refusal.code, message=str(answer.refusal)
                )
                progress.say(f"[{device}] {answer.refusal}")
                self.dismissed[node] = time.time()
            else:
                self.dismissed[node] = time.time()  # it is done: nothing more to ask of this process
        except InputError as error:
            self._refuse(node, device, error)

    def _grant(self, node: int, device: str, offer: Offer) -> None:
        row = self.ledger.device(device)
        if row is not None and row.receipt is not None:
            self._already(node, device, offer, row)
            return
        check_offer(offer, device, self.config.federation.max_upload_bytes)
        self.ledger.set_state(device, "uploading")
        self._send(node, messages.ticket(node, self.ledger.issue(offer)))

    def _already(self, node: int, device: str, offer: Offer, row: Row) -> None:
        if row.offer is None or row.offer.digest != offer.digest or row.receipt is None:
            raise InputError(
                "it has handed in another upload", where=f"device {device}", code="already-uploaded"
            )
        self._send(node, messages.receipt_again(node, row.receipt))

    def _refuse(self, node: int, device: str, error: InputError) -> None:
        self.ledger.set_state(device, "rejected", str(error))
        self.ledger.audit("refused", device=device, code=error.code, message=str(error))
        progress.say(f"[{device}] rejected: {error}")
        self._send(node, messages.refusal(node, error))
        del self.pending[node]  # its answer would say no more
        self.dismissed[node] = time.time()

    def _close_if_enough(self) -> None:
        if self.ledger.closed:
            return
        federation = self.config.federation
        done = sum(row.state == "done" for row in self.ledger.devices().values())
        enough = federation.wait_for is not None and done >= federation.wait_for
        began = float(self.ledger.recall("began") or 0)
        over = federation.deadline is not None and time.time() >= began + seconds(federation.deadline)
        if enough or over:
            self.ledger.close()


def task_config(config: Config) -> str:
    """What a device must know of a config, as YAML: nothing of the server's data, paths and plans."""
    data = {"max_chars": config.data.max_chars, "prompt_loss_weight": config.data.prompt_loss_weight}
    values = {name: getattr(config, name) for name in ("seed", "precision", "checkpoint_seconds")}
    return yaml.safe_dump(
        {**values, "data": data, "device": config.device.model_dump(mode="json")}, sort_keys=True
    )


def seconds(deadline: str) -> int:
    """A time span such as 90m, 12h or 7d in seconds."""
    return int(deadline[:-1]) * _UNITS[deadline[-1]]
