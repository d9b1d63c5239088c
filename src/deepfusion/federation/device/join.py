"""A real device takes part: waits for its task, trains on its own file, hands its model in, once."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepfusion import progress
from deepfusion.config import parse_config
from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.federation.device.connection import Connection, Refused
from deepfusion.federation.device.transfer import hand_in
from deepfusion.federation.flower import messages
from deepfusion.federation.flower.client_app import Visit
from deepfusion.federation.flower.fleet import Fleet
from deepfusion.federation.offer import Offer
from deepfusion.folders import claim_file, local_path, write_whole
from deepfusion.schema import Config
from deepfusion.uploads.card import CARD, claim_upload

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
        """Train unless it is done. The server's settings are suggestions about training and nothing else."""
        if self.data is None:
            if not (self.folder / CARD).is_file():
                fix = "deepfusion device train"
                raise InputError(
                    "not an upload (no card.json)", where=self.folder, fix=fix, code="card-missing"
                )
            return
        from deepfusion.stages.device import train_alone

        config = device_config(task, self.type)
        try:
            train_alone(config, self.data, self.folder, self.type, self.memory, task.device or None)
        except InputError as error:
            if error.code != "another-upload":
                raise
            fix = f"--upload {self.folder} hands it in as it is; or choose another --out"
            raise InputError(error.what, where=self.folder, fix=fix, code=error.code) from None

    def hand_in(self, offer: Offer, ticket: str) -> dict[str, Any]:
        """Upload and keep the receipt beside the folder."""
        names = ", ".join(file.name for file in offer.files)
        progress.say(f"[device {offer.card.device}] hands in {self.folder}: {offer.size:,} bytes, {names}")
        receipt = hand_in(self.connection, self.folder, offer, ticket)
        try:
            write_whole(receipt_path(self.folder), json.dumps(receipt, indent=1))
        except OSError as error:  # the upload may lie where nothing can be written
            progress.say(f"[device {offer.card.device}] the receipt could not be kept ({error.strerror})")
        return receipt


def device_config(task: messages.Task, type: str | None) -> Config:
    """What a device takes over of the server's config.

    Raises:
        InputError: the server suggests a model type that is a path on this machine: it would read and send what
            lies there.
    """
    try:
        values = yaml.safe_load(task.config)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or not set(values) <= {
        "seed",
        "precision",
        "checkpoint_seconds",
        "data",
        "device",
    }:
        raise InputError("the settings are not those of a device", where="server", code="bad-message")
    config = parse_config(values, "settings of the server")
    for name in config.device.types if type is None else ():
        if not _HUB_NAME.fullmatch(name) or Path(name).exists():
            fix = "choose one yourself with --type"
            raise InputError("the server suggests the model type "
                             f"{name}", where="server", allowed="presets and hub names", fix=fix,
                             code="local-type")  # fmt: skip
    return config


def join(
    server: str, home: Path, *, folder: Path, data: Path | None = None, ca: Path | None = None,
    ca_sha256: str | None = None,
    type: str | None = None, memory: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Take part in the federation of `server`; what `deepfusion device join` runs.

    Returns:
        The receipt: device, digest, size, files, received_at, state (done, or late: kept for the next run).

    Raises:
        InputError: not enrolled, refused, not the server that was meant, bad data; the message says what to do.
    """
    if not re.fullmatch(r"[^\s/@]+:\d{1,5}", server):
        raise InputError(
            "not the address of a server", where=f"--server {server}", allowed="HOST:PORT", code="no-server"
        )
    if data is not None:
        if not data.is_file():
            fix = (
                f"--upload {folder} hands in the upload that is there" if (folder / CARD).is_file() else None
            )
            raise InputError("there is no such file", where=data, fix=fix, code="no-data")
        folder = claim_upload(folder, [data])
    receipt = receipt_path(folder)
    if data is not None or receipt.exists():
        claim_file(receipt, _is_receipt)
    home = local_path(home)
    key = identity.device_key(home / "key.pem")
    context = identity.tls(trusted := identity.trust(server, home, ca, ca_sha256))
    progress.say(f"[device] joins {server}, trusting {trusted or 'the authorities of this system'}")
    connection = Connection(server, key, context)
    device = LocalDevice(connection, folder, data, type, memory)
    try:
        return _visit(Visit(device), Fleet(connection, home / "node"))
    except Refused as error:
        if error.code == "not-enrolled":
            fix = (
                "give the operator this line: deepfusion server enroll NAME "
                f"'{identity.public_line(key.public_key())}'"
            )
            raise InputError(error.what, where=server, fix=fix, code=error.code) from None
        raise


def receipt_path(folder: Path) -> Path:
    """Where the receipt of an upload folder is kept: beside it, for nothing may be added to it."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.receipt.json")


def _is_receipt(text: str) -> bool:
    found = json.loads(text)
    return isinstance(found, dict) and {"device", "digest"} <= found.keys()


def _visit(visit: Visit, fleet: Fleet) -> dict[str, Any]:
    with fleet:
        progress.say("[device] connected, waits for its task")
        while not visit.over:
            message = fleet.receive()
            if message is None:
                time.sleep(POLL_SECONDS)
                continue
            fleet.reply(visit.answer(message))
    if visit.error is not None:
        raise visit.error
    assert visit.receipt is not None
    return visit.receipt
