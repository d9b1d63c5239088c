"""The upload of a device: every file from wherever the server has it, again and again until the receipt is there."""

from __future__ import annotations

import base64
import ipaddress
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from deepfusion import progress
from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.federation.device.connection import Connection, Refused
from deepfusion.federation.offer import Offer, OfferedFile

PIECE_BYTES = 16 * 2**20
_BLOCK_BYTES = 256 * 1024
_RESENDS = 3
_ASK_SECONDS, _TELL_SECONDS, _STORE_SECONDS = 1.0, 5.0, 60.0
_TUS = {"Tus-Resumable": "1.0.0"}


def hand_in(connection: Connection, folder: Path, offer: Offer, ticket: str) -> dict[str, Any]:
    """Send the files of an offer. Interrupted at any point, the next call with the same offer goes on from there.

    Args:
        folder: the upload folder, unchanged since it was offered.
        ticket: for this offer.

    Returns:
        The receipt: device, digest, size, files, received_at, state, server_version.

    Raises:
        InputError: the folder has changed, the server refuses, or it finds other digests time and again.
    """
    return _Transfer(connection, folder, offer, ticket).run()


class _Transfer:
    def __init__(self, connection: Connection, folder: Path, offer: Offer, ticket: str) -> None:
        self.connection, self.folder, self.offer, self.ticket = connection, folder, offer, ticket
        self.offsets = {file.name: 0 for file in offer.files}
        self.told_at, self.told_bytes = time.monotonic(), 0

    def run(self) -> dict[str, Any]:
        """All files, then the receipt."""
        files = list(self.offer.files)
        for _ in range(1 + _RESENDS):
            try:
                for file in files:
                    self._send(file)
                self._tell(last=True)
                return self._receipt()
            except Refused as refused:
                if refused.code == "ticket-spent":  # it was accepted, and the answer lost
                    return self._receipt()
                if "bad" not in refused.facts:
                    raise
                files = [file for file in self.offer.files if file.name in refused.facts["bad"]]
                self._compare(files)
        fix = "look for faulty memory or a proxy that alters what passes"
        raise InputError(
            "the server finds other SHA-256 than were sent",
            where=self.folder,
            fix=fix,
            code="digest-mismatch",
        )

    def _send(self, file: OfferedFile) -> None:
        offset, sink = self.connection.patiently(lambda: self._begin(file))
        self.told_bytes += self._advance(file, offset)
        if sink == "s3":
            while offset < file.size and self.connection.patiently(lambda: self._send_parts(file)):
                pass
            self.offsets[file.name] = file.size
        while self.offsets[file.name] < file.size:
            self.connection.patiently(lambda: self._send_piece(file))

    def _begin(self, file: OfferedFile) -> tuple[int, str]:
        """Where to go on with a file, and by what way."""
        name = base64.b64encode(file.name.encode()).decode()
        headers = {**_TUS, "Upload-Length": str(file.size), "Upload-Metadata": f"filename {name}"}
        answer = self.connection.call("POST", "/v1/uploads", self.ticket, headers=headers)
        return int(answer.headers["Upload-Offset"]), answer.headers.get("Deepfusion-Sink", "local")

    def _send_piece(self, file: OfferedFile) -> None:
        """Send some of a file. Fails only if nothing has arrived: whoever gets on, however slowly, need not pause."""
        before = self.offsets[file.name]
        size = min(PIECE_BYTES, file.size - before)
        headers = {
            **_TUS,
            "Upload-Offset": str(before),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(size),
        }
        try:
            body = self._read(file, before, size)
            answer = self.connection.call(
                "PATCH", f"/v1/uploads/{file.name}", self.ticket, headers=headers, content=body
            )
            self._advance(file, int(answer.headers["Upload-Offset"]))
        except httpx.TransportError:
            self._advance(file, self._begin(file)[0])
            if self.offsets[file.name] <= before:
                raise
        except Refused as refused:
            if refused.code not in ("offset", "not-created", "idle"):
                raise
            self._advance(file, self._begin(file)[0])

    def _send_parts(self, file: OfferedFile) -> bool:
        """Send some parts of a file to the object store. Fails only if not even one has arrived.

        Returns:
            Whether there may be more to send.
        """
        answer = self.connection.call("POST", f"/v1/uploads/{file.name}/parts", self.ticket).json()
        sent = 0
        # A client of its own: the store is not of the server's private authority, and is told neither key nor ticket.
        with httpx.Client(timeout=_STORE_SECONDS) as client:
            for part in answer["parts"]:
                offset, size, url = int(part["offset"]), int(part["size"]), httpx.URL(part["url"])
                _check_store(url)
                try:
                    body = self._read(file, offset, size)
                    stored = client.put(url, content=body, headers={"Content-Length": str(size)})
                    if stored.is_error:
                        raise httpx.WriteError(f"the object store {url.host} answered {stored.status_code}")
                except httpx.TransportError:
                    if not sent:
                        raise
                    break
                sent += size
        return bool(answer["parts"])

    def _read(self, file: OfferedFile, offset: int, size: int) -> Iterator[bytes]:
        path = self.folder / file.name
        if not path.is_file():
            raise self._changed(file)
        with open(path, "rb") as source:
            source.seek(offset)
            for begin in range(offset, offset + size, _BLOCK_BYTES):
                wanted = min(_BLOCK_BYTES, offset + size - begin)
                block = source.read(wanted)
                if len(block) < wanted:
                    raise self._changed(file)
                yield block
                self.offsets[file.name] = begin + wanted
                self._tell()

    def _receipt(self) -> dict[str, Any]:
        while True:
            answer = self.connection.patiently(
                lambda: self.connection.call("POST", "/v1/receipt", self.ticket)
            )
            if answer.status_code == 200:
                return dict(answer.json())
            time.sleep(_ASK_SECONDS)

    def _compare(self, files: list[OfferedFile]) -> None:
        """Look at files that arrived wrong: was it the way, or are they no longer what was offered?"""
        for file in files:
            self.offsets[file.name] = 0
            path = self.folder / file.name
            if not path.is_file() or path.stat().st_size != file.size or sha256_file(path) != file.sha256:
                raise self._changed(file)

    def _changed(self, file: OfferedFile) -> InputError:
        fix = "run the command again; it offers what is there now"
        return InputError(
            "changed while it was being uploaded",
            where=self.folder / file.name,
            fix=fix,
            code="upload-changed",
        )

    def _advance(self, file: OfferedFile, offset: int) -> int:
        """Take over what the server says.

        Returns:
            Bytes that are there and were not known to be.
        """
        gained = offset - self.offsets[file.name]
        self.offsets[file.name] = offset
        return gained

    def _tell(self, last: bool = False) -> None:
        now, done, size = time.monotonic(), sum(self.offsets.values()), self.offer.size
        passed = now - self.told_at
        if not last and passed < _TELL_SECONDS:
            return
        speed = max(0, done - self.told_bytes) / max(passed, 1e-6)
        self.told_at, self.told_bytes = now, done
        left = "" if last or not speed else f", eta {progress.duration((size - done) / speed)}"
        amount = f"{100 * done // max(size, 1)}% {done / 2**20:.1f} MiB of {size / 2**20:.1f} MiB"
        progress.say(f"[device {self.offer.card.device}] upload {amount}, {speed / 2**20:.1f} MiB/s{left}")


def _check_store(url: httpx.URL) -> None:
    """Weights travel encrypted, or not at all; only a store on this very machine may do without."""
    try:
        own = ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        own = url.host == "localhost"
    if url.scheme != "https" and not own:
        raise InputError(
            "the server names an object store without encryption", where=str(url.host), code="store-insecure"
        )
