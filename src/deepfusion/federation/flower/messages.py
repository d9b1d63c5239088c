"""The messages between server and device: what Flower carries. All are small; weights go another way (transfer.py).

train          server -> device: the settings of the run                 device -> server: its offer, or why it cannot
query.upload   server -> device: a ticket, a receipt, or a refusal       device -> server: the receipt, or why it failed
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict

from deepfusion.errors import InputError
from deepfusion.federation.offer import Offer, parse_offer

TRAIN, UPLOAD = "train", "query.upload"


class Task(NamedTuple):
    """What a device is asked to do: its name in this run, and the config as YAML."""

    device: str
    config: str


class Answer(NamedTuple):
    """The other side's word; exactly one is set."""

    task: Task | None = None
    offer: Offer | None = None
    ticket: str | None = None
    receipt: dict[str, Any] | None = None
    refusal: InputError | None = None


def task(node: int, device: str, config: str) -> Message:
    """Ask a device to train."""
    digest = hashlib.sha256(config.encode()).hexdigest()
    return Message(_content(device=device, config=config, sha256=digest), node, TRAIN)


def ticket(node: int, ticket: str) -> Message:
    """Let a device upload what it offered."""
    return Message(_content(ticket=ticket), node, UPLOAD)


def receipt_again(node: int, receipt: dict[str, Any]) -> Message:
    """Tell a device that has forgotten it that its upload is here."""
    return Message(_content(receipt=json.dumps(receipt)), node, UPLOAD)


def refusal(node: int, error: InputError) -> Message:
    """Turn an offer down."""
    return Message(_content(**_error(error)), node, UPLOAD)


def reply_offer(message: Message, offer: Offer) -> Message:
    """Answer a task with what was made."""
    return Message(_content(offer=offer.model_dump_json()), reply_to=message)


def reply_receipt(message: Message, receipt: dict[str, Any]) -> Message:
    """Confirm that the upload is over."""
    return Message(_content(receipt=json.dumps(receipt)), reply_to=message)


def reply_refusal(message: Message, error: InputError) -> Message:
    """Say that the device cannot do what it was asked: the code of the error only, for its text may quote private
    data.
    """
    return Message(
        _content(what="the device has stopped; its owner sees why", code=error.code), reply_to=message
    )


def read(message: Message) -> Answer:
    """What a message says.

    Raises:
        InputError: it is none of ours, or damaged.
    """
    record = message.content.get("deepfusion") if message.has_content() else None
    if not isinstance(record, ConfigRecord):
        raise InputError("a message of another program", where="server", code="bad-message")
    values = {key: str(value) for key, value in record.items()}
    if "config" in values:
        if hashlib.sha256(values["config"].encode()).hexdigest() != values.get("sha256"):
            raise InputError(
                "the config is not the one that its digest names", where="server", code="bad-message"
            )
        return Answer(task=Task(values.get("device", ""), values["config"]))
    if "offer" in values:
        return Answer(offer=parse_offer(values["offer"]))
    if "ticket" in values:
        return Answer(ticket=values["ticket"])
    if "receipt" in values:
        return Answer(receipt=_read_receipt(values["receipt"]))
    if "code" in values:
        fields = {key: values[key][:2000] for key in ("where", "allowed", "fix") if key in values}
        return Answer(refusal=InputError(values.get("what", "")[:2000], code=values["code"][:60], **fields))
    raise InputError("a message that this version does not know", where="server", code="bad-message")


def _read_receipt(text: str) -> dict[str, Any]:
    try:
        receipt = json.loads(text)
    except (ValueError, RecursionError):
        receipt = None
    if not isinstance(receipt, dict) or not {"device", "digest", "size", "state"} <= set(receipt):
        raise InputError("not a receipt", where="server", code="bad-message")
    return receipt


def _content(**values: str) -> RecordDict:
    return RecordDict({"deepfusion": ConfigRecord(dict(values))})


def _error(error: InputError) -> dict[str, str]:
    parts = {
        "what": error.what,
        "code": error.code,
        "where": error.where,
        "allowed": error.allowed,
        "fix": error.fix,
    }
    return {key: str(value) for key, value in parts.items() if value is not None}
