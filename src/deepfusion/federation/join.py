"""A real device takes part: waits for its task, trains on its own file, hands its model in, once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, RecordDict

from deepfusion import progress
from deepfusion.config import Config, parse_config
from deepfusion.errors import InputError
from deepfusion.federation import identity, messages
from deepfusion.federation.client_app import Visit
from deepfusion.federation.connection import Connection, Refused
from deepfusion.federation.flower import Fleet
from deepfusion.federation.offer import Offer
from deepfusion.federation.transfer import hand_in

DEFAULT_HOME = Path("~/.deepfusion/device")
POLL_SECONDS = 2.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class LocalDevice:
    """The device that this process runs on.

    Attributes:
        folder: the upload folder, made here or before.
        data: private JSONL; None where `folder` is to be handed in as it is.
        type: model type chosen by the owner; or else `memory` decides among those that the server suggests.
    """

    connection: Connection
    folder: Path
    data: Path | None = None
    type: str | None = None
    memory: str | None = None

    def train(self, task: messages.Task) -> None:
        """Train unless the upload is there. The server's settings are suggestions about training and nothing else."""
        if (self.folder / "card.json").is_file():
            return
        if self.data is None:
            raise InputError("not an upload (no card.json)", where=self.folder, fix="deepfusion device train", code="card-missing")
        from deepfusion.stages.device import train_alone

        config = device_config(task, self.type)
        work = self.folder.with_name(f".{self.folder.name}.work")
        digest = hashlib.sha256(f"{task} {self.type} {self.memory}".encode()).hexdigest()
        if work.exists() and not ((work / "task").is_file() and (work / "task").read_text() == digest):
            shutil.rmtree(work)  # half a training by other settings
        work.mkdir(parents=True, exist_ok=True)
        (work / "task").write_text(digest)
        train_alone(config, self.data, self.folder, self.type, self.memory, task.device or None)

    def hand_in(self, offer: Offer, ticket: str) -> dict[str, Any]:
        """Upload and keep the receipt beside the folder."""
        names = ", ".join(file.name for file in offer.files)
        progress.say(f"[device {offer.card.device}] hands in {self.folder}: {offer.size:,} bytes, {names}")
        receipt = hand_in(self.connection, self.folder, offer, ticket)
        receipt_path(self.folder).write_text(json.dumps(receipt, indent=1), "utf-8")
        return receipt


def device_config(task: messages.Task, type: str | None) -> Config:
    """What a device takes over of the server's config.

    Raises:
        InputError: the server suggests a model type that is a path on this machine: it would read and send what lies there.
    """
    try:
        values = yaml.safe_load(task.config)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or not set(values) <= {"seed", "precision", "checkpoint_seconds", "data", "device"}:
        raise InputError("the settings are not those of a device", where="server", code="bad-message")
    config = parse_config(values, "settings of the server")
    for name in config.device.types if type is None else ():
        if not _HUB_NAME.fullmatch(name) or Path(name).exists():
            fix = "choose one yourself with --type"
            raise InputError(f"the server suggests the model type {name}", where="server", allowed="presets and hub names", fix=fix,
                             code="local-type")  # fmt: skip
    return config


def join(
    server: str, home: Path, *, folder: Path, data: Path | None = None, ca: Path | None = None, ca_sha256: str | None = None,
    type: str | None = None, memory: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Take part in the federation of `server`; what `deepfusion device join` runs.

    Returns:
        The receipt: device, digest, size, files, received_at, state (done, or late: kept for the next run).

    Raises:
        InputError: not enrolled, refused, not the server that was meant, bad data; the message says what to do.
    """
    if not re.fullmatch(r"[^\s/@]+:\d{1,5}", server):
        raise InputError("not the address of a server", where=f"--server {server}", allowed="HOST:PORT", code="no-server")
    if data is not None and not data.is_file() and not (folder / "card.json").is_file():
        raise InputError("there is no such file", where=data, code="no-data")
    home = home.expanduser()
    key = identity.device_key(home / "key.pem")
    context = identity.tls(trusted := identity.trust(server, home, ca, ca_sha256))
    progress.say(f"[device] joins {server}, trusting {trusted or 'the authorities of this system'}")
    connection = Connection(server, key, context)
    device = LocalDevice(connection, folder, data, type, memory)
    try:
        return _visit(Visit(device), Fleet(connection, home / "node"))
    except Refused as error:
        if error.code == "not-enrolled":
            fix = f"give the operator this line: deepfusion server enroll NAME '{identity.public_line(key.public_key())}'"
            raise InputError(error.what, where=server, fix=fix, code=error.code) from None
        raise


def receipt_path(folder: Path) -> Path:
    """Where the receipt of an upload folder is kept: beside it, for nothing may be added to it."""
    return folder.with_name(f"{folder.resolve().name}.receipt.json")


def _visit(visit: Visit, fleet: Fleet) -> dict[str, Any]:
    with fleet:
        progress.say("[device] connected, waits for its task")
        while not visit.over:
            message = fleet.receive()
            if message is None:
                time.sleep(POLL_SECONDS)
                continue
            context = Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})
            fleet.reply(visit.app(message, context))
    if visit.error is not None:
        raise visit.error
    assert visit.receipt is not None
    return visit.receipt
