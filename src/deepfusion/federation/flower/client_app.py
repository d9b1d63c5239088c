"""The ClientApp: what a device does when the server asks. It runs the code that is installed on the device, no
other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from deepfusion.errors import InputError
from deepfusion.federation.flower import messages
from deepfusion.federation.offer import Offer, read_offer


class Device(Protocol):
    """What the ClientApp needs of the device that it runs on."""

    folder: Path

    def train(self, task: messages.Task) -> None:
        """Write the upload to `folder` by the settings of the server, or leave the one that is there."""
        ...

    def hand_in(self, offer: Offer, ticket: str) -> dict[str, Any]:
        """Upload `folder` and return the receipt."""
        ...


class Visit:
    """One device's stay in a federation: its ClientApp, and how it ended.

    Attributes:
        app: to be called with each message of the server.
        receipt: of the server, once the upload is there.
        error: why it ended without.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.receipt: dict[str, Any] | None = None
        self.error: InputError | None = None
        self.app = ClientApp()
        self.app.train()(self._train)
        self.app.query("upload")(self._upload)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.receipt is not None or self.error is not None

    def answer(self, message: Message) -> Message:
        """Answer one message of the server."""
        return self.app(
            message, Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})
        )

    def _train(self, message: Message, context: Context) -> Message:
        try:
            task = messages.read(message).task
            if task is None:
                raise InputError("a task without a config", where="server", code="bad-message")
            self.device.train(task)
            return messages.reply_offer(message, read_offer(self.device.folder))
        except InputError as error:
            self.error = error
            return messages.reply_refusal(message, error)

    def _upload(self, message: Message, context: Context) -> Message:
        try:
            answer = messages.read(message)
            if answer.refusal is not None:
                raise answer.refusal
            if answer.ticket is not None:
                self.receipt = self.device.hand_in(read_offer(self.device.folder), answer.ticket)
            elif answer.receipt is not None:
                self.receipt = answer.receipt
            else:
                raise InputError("neither a ticket nor a receipt", where="server", code="bad-message")
            return messages.reply_receipt(message, self.receipt)
        except InputError as error:
            self.error = error
            return messages.reply_refusal(message, error)
