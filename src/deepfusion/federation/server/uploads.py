"""Uploads on the server: tickets, files that grow from wherever they stopped, and the receipt once all digests are
right.

The length of a part file is how much of it is here. Nothing else is recorded, so there is nothing to repair after
a crash.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from deepfusion import __version__
from deepfusion.digests import sha256_file
from deepfusion.federation.offer import Offer, OfferedFile
from deepfusion.federation.server.home import now
from deepfusion.federation.server.ledger import Ledger, Ticket
from deepfusion.federation.server.sinks import S3Sink
from deepfusion.folders import sync

SPARE_BYTES = 64 * 2**20  # of the disk, that uploads leave free
_BLOCK_BYTES = 512 * 1024
_IDLE_SECONDS = 120.0
_ANSWER_SECONDS = 5.0

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Refusal(Exception):
    """A request that is not granted.

    Args:
        status: of HTTP.
        code: stable kebab-case name.
        message: for the person at the device.
        headers: for the program there.
        facts: further keys of the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, **facts: object
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers, self.facts = (
            status,
            code,
            message,
            dict(headers or {}),
            facts,
        )


@dataclass(frozen=True)
class Upload:
    """An offer on its way.

    Attributes:
        folder: holds a file for each file of the offer that has begun, and nothing else.
    """

    device: str
    offer: Offer
    folder: Path

    def file(self, name: str) -> OfferedFile:
        """The file of the offer that is called so.

        Raises:
            Refusal: there is none.
        """
        for file in self.offer.files:
            if file.name == name:
                return file
        raise Refusal(400, "unknown-file", f"{name[:100]} is no file of the offer")

    def offset(self, file: OfferedFile) -> int:
        """Bytes of a file that are here.

        Raises:
            Refusal: it was not created.
        """
        try:
            return (self.folder / file.name).stat().st_size
        except FileNotFoundError:
            raise Refusal(404, "not-created", f"{file.name} has not begun") from None


@dataclass
class _Turn:
    """Who may touch a part file: one request at a time, and the newest makes the others stop."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    newest: asyncio.Event = field(default_factory=asyncio.Event)


class Uploads:
    """All uploads of a run, below `RUN`/federation/incoming and, once they are verified, `RUN`/federation/received.

    Args:
        store: the object store that bytes come through; None if devices send them here.
    """

    def __init__(self, run: Path, ledger: Ledger, store: S3Sink | None) -> None:
        self.incoming, self.received = run / "federation" / "incoming", run / "federation" / "received"
        self.ledger, self.store = ledger, store
        self._current: dict[str, Upload] = {}
        self._turns: dict[Path, _Turn] = {}
        self._sound: dict[Path, tuple[int, int]] = {}
        self._verifying: dict[Path, asyncio.Future[dict[str, Any]]] = {}
        self._moving = threading.Lock()
        self._hashing = ThreadPoolExecutor(
            2, "verify"
        )  # of its own, or long files would hold up short requests
        for folder in (self.incoming, self.received):
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, device: str, text: str | None) -> Upload:
        """The upload that a ticket is good for.

        Raises:
            Refusal: no such ticket, or it is of another device or spent.
        """
        ticket = self._ticket(device, text)
        with self._moving:
            offer = self._wanted(device, "" if ticket.spent else ticket.digest)
            upload = Upload(device, offer, self.incoming / device / ticket.digest[:16])
            if self._current.get(device) != upload:
                self._settle(upload)
                self._current[device] = upload
                self.ledger.set_state(device, "uploading")
            return upload

    def receipt(self, device: str, text: str | None) -> dict[str, Any] | None:
        """What the device was told when this offer was accepted, or None if it was not yet. The ticket may be spent.

        Raises:
            Refusal: no such ticket, or it is of another device.
        """
        ticket = self._ticket(device, text)
        row = self.ledger.device(device)
        receipt = row.receipt if row else None
        return receipt if receipt and receipt["digest"] == ticket.digest else None

    async def create(self, upload: Upload, file: OfferedFile) -> int:
        """Begin a file unless it has begun.

        Returns:
            Bytes of it that are here.

        Raises:
            Refusal: the disk is too full for the rest of the upload.
        """
        async with self._turn(upload.folder / file.name):
            return await run_in_threadpool(self._create, upload, file)

    async def offset(self, upload: Upload, file: OfferedFile) -> int:
        """Bytes of a file that are here, for good: a request that still sends some is ended first.

        Raises:
            Refusal: it was not created.
        """
        async with self._turn(upload.folder / file.name):
            return upload.offset(file)

    async def append(
        self,
        upload: Upload,
        file: OfferedFile,
        offset: int,
        receive: Receive,
        each_second: Callable[[], None],
    ) -> int:
        """Add the body of a request to a file; what arrived before a connection broke counts.

        Args:
            offset: where the device believes to be.
            receive: of ASGI.
            each_second: called in a thread at the end and once a second meanwhile; may refuse to go on.

        Returns:
            Bytes of the file that are here now, on the disk.

        Raises:
            Refusal: not the right offset, more bytes than offered, the disk is full, or a newer request took over.
        """
        path = upload.folder / file.name
        async with self._turn(path) as newer:
            here = upload.offset(file)
            if offset != here:
                raise Refusal(
                    409, "offset", f"{here} bytes are here, not {offset}", {"Upload-Offset": str(here)}
                )
            told = time.monotonic()
            try:
                async for block in _blocks(receive, newer):
                    await run_in_threadpool(_append, path, block[: file.size - here])
                    here += len(block)
                    if here > file.size:
                        raise Refusal(413, "too-large", f"{file.name} has {file.size} bytes in the offer")
                    if time.monotonic() - told >= 1:
                        told = time.monotonic()
                        await run_in_threadpool(self._tell, upload, each_second)
            finally:
                await run_in_threadpool(_sync, path)
            await run_in_threadpool(self._tell, upload, each_second)
            return here

    def parts(self, upload: Upload, file: OfferedFile) -> dict[str, Any]:
        """What of a file is to be sent to the object store next, see `S3Sink.parts`; counts what has come there.

        Raises:
            Refusal: devices send their bytes here, or the store cannot be reached.
        """
        if self.store is None:
            raise Refusal(404, "not-here", "this server has no object store")
        with self._reaching():
            answer = self.store.parts(upload.device, upload.offer, file)
        row, received = self.ledger.device(upload.device), self._received(upload)
        self.ledger.count(upload.device, up=max(0, received - (row.received if row else 0)))
        self.ledger.set_received(upload.device, received)
        return answer

    async def finish(self, upload: Upload, peer: str | None) -> dict[str, Any] | None:
        """Verify all files and move them to where the run finds them.

        Args:
            peer: address that the upload came from, for the audit log.

        Returns:
            The receipt, or None if it is not ready after some seconds: ask again.

        Raises:
            Refusal: files are missing or wrong; `bad` names them. Wrong ones are gone and have to be sent again.
        """
        working = self._verifying.get(upload.folder)
        if working is None:
            working = asyncio.get_running_loop().run_in_executor(self._hashing, self._accept, upload, peer)
            self._verifying[upload.folder] = working
            working.add_done_callback(
                lambda done: done.exception()
            )  # or Python complains when nobody asks again
        done, _ = await asyncio.wait({working}, timeout=_ANSWER_SECONDS)
        if not done:
            return None
        self._verifying.pop(upload.folder, None)  # not before somebody was told
        return working.result()

    def _ticket(self, device: str, text: str | None) -> Ticket:
        if text is None:
            raise Refusal(
                401, "ticket-missing", "the request carries no ticket", {"WWW-Authenticate": "Bearer"}
            )
        ticket = self.ledger.ticket(text)
        if ticket is None:
            raise Refusal(403, "ticket-unknown", "this ticket was never issued")
        if ticket.device != device:
            raise Refusal(403, "ticket-foreign", "this ticket was issued to another device")
        return ticket

    def _wanted(self, device: str, digest: str) -> Offer:
        """The offer of this digest, if it is the one that the device is to hand in."""
        row = self.ledger.device(device)
        if row is None or row.receipt or row.offer is None or row.offer.digest != digest:
            raise Refusal(403, "ticket-spent", "this ticket was used before, or there is a newer one")
        return row.offer

    def _settle(self, upload: Upload) -> None:
        """Make the folder of an upload, remove those of earlier offers, and undo an acceptance that a crash cut
        short.
        """
        home = upload.folder.parent
        home.mkdir(exist_ok=True)
        for other in home.iterdir():
            if other != upload.folder:
                shutil.rmtree(other)
        if self.store:
            with self._reaching():
                self.store.forget(upload.device, keep=upload.offer)
        moved = self.received / upload.device
        if not upload.folder.exists() and _listing(moved) == {
            file.name: file.size for file in upload.offer.files
        }:
            moved.rename(upload.folder)
        upload.folder.mkdir(exist_ok=True)

    def _create(self, upload: Upload, file: OfferedFile) -> int:
        here = _listing(upload.folder)
        if file.name not in here:
            rest = upload.offer.size - sum(here.values())
            free = shutil.disk_usage(upload.folder).free
            if free < rest + SPARE_BYTES:
                raise Refusal(
                    507, "server-full", f"the server has no room for the {rest} bytes that are missing"
                )
            (upload.folder / file.name).touch()
        return here.get(file.name, 0)

    def _tell(self, upload: Upload, each_second: Callable[[], None]) -> None:
        self.ledger.set_received(upload.device, self._received(upload))
        each_second()

    def _received(self, upload: Upload) -> int:
        here = _listing(upload.folder)
        if self.store is None:
            return sum(here.values())
        with self._reaching():
            held = self.store.held(upload.device, upload.offer)
        return sum(max(size, here.get(name, 0)) for name, size in held.items())

    def _accept(self, upload: Upload, peer: str | None) -> dict[str, Any]:
        device, offer = upload.device, upload.offer
        self.ledger.set_state(device, "verifying")
        if self.store:
            with self._reaching():
                self.store.collect(device, offer, upload.folder)
        here = _listing(upload.folder)
        missing = [file.name for file in offer.files if here.get(file.name, -1) < file.size]
        wrong = [
            file.name for file in offer.files if file.name not in missing and not self._is_sound(upload, file)
        ]
        for name in wrong:
            if self.store:
                with self._reaching():
                    self.store.remove(device, offer, name)
            (upload.folder / name).unlink()
        if missing or wrong:
            self.ledger.set_state(device, "uploading")
            self.ledger.set_received(device, self._received(upload))
            code, what = ("digest-mismatch", "of another SHA-256") if wrong else ("incomplete", "not whole")
            raise Refusal(409, code, f"{', '.join(wrong or missing)[:200]}: {what}", bad=missing + wrong)
        if self.store:
            with self._reaching():
                self.store.forget(device)
        with self._moving:
            receipt = self._move(upload, peer)
        for file in offer.files:
            self._sound.pop(upload.folder / file.name, None)
        return receipt

    def _move(self, upload: Upload, peer: str | None) -> dict[str, Any]:
        device, offer, moved = upload.device, upload.offer, self.received / upload.device
        self._wanted(
            device, offer.digest
        )  # the device may have made another offer while this one was verified
        # Until the ledger knows, nothing has happened: after a crash in between, `_settle` moves the folder back.
        self._current.pop(device, None)
        shutil.rmtree(moved, ignore_errors=True)
        upload.folder.rename(moved)
        for folder in (moved, self.received, upload.folder.parent):
            _sync(folder)
        facts = {"digest": offer.digest, "size": offer.size, "files": len(offer.files)}
        receipt = self.ledger.finish(
            device, {"device": device, **facts, "received_at": now(), "server_version": __version__}
        )
        self.ledger.audit("accepted", device=device, peer=peer, state=receipt["state"], **facts)
        upload.folder.parent.rmdir()
        return receipt

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Around every use of the store: without it devices have to wait."""
        assert self.store is not None
        try:
            yield
        except self.store.errors as error:
            raise Refusal(503, "store-away", f"the object store: {str(error)[:200]}") from error

    def _is_sound(self, upload: Upload, file: OfferedFile) -> bool:
        path = upload.folder / file.name
        found = path.stat()
        version = found.st_size, found.st_mtime_ns
        if self._sound.get(path) != version:
            if found.st_size != file.size or sha256_file(path) != file.sha256:
                return False
            self._sound[path] = version
        return True

    @asynccontextmanager
    async def _turn(self, path: Path) -> AsyncIterator[asyncio.Event]:
        """Alone with a part file. A request whose connection is dead would hold it for minutes, so the newest makes
        others stop.

        Yields:
            What is set as soon as a newer request waits.
        """
        turn = self._turns.setdefault(path, _Turn())
        turn.newest.set()
        turn.newest = mine = asyncio.Event()
        try:
            async with turn.lock:
                yield mine
        finally:
            if turn.newest is mine:
                del self._turns[path]


async def _blocks(receive: Receive, newer: asyncio.Event) -> AsyncIterator[bytes]:
    """The body of a request in blocks of about 512 KiB, at least one a second, until it ends or breaks off.

    Raises:
        Refusal: it stalls, or a newer request waits; after all that came was given.
    """
    block = bytearray()

    async def fill() -> bool:
        while len(block) < _BLOCK_BYTES:
            message = await receive()
            block.extend(message.get("body", b""))
            if not message.get("more_body", False):  # a broken connection has no more either
                return False
        return True

    stop, filling = asyncio.create_task(newer.wait()), asyncio.create_task(fill())
    more, last = True, time.monotonic()
    try:
        while more and not stop.done() and time.monotonic() - last < _IDLE_SECONDS:
            await asyncio.wait({filling, stop}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            taken = bytes(block)
            block.clear()
            if taken:
                last = time.monotonic()
            if filling.done():
                more = filling.result()
                filling = asyncio.create_task(fill()) if more else filling
            yield taken
        if more and newer.is_set():
            raise Refusal(409, "taken-over", "a newer request goes on with this file")
        if more:
            raise Refusal(408, "idle", f"nothing came for {_IDLE_SECONDS:.0f} seconds")
    finally:
        stop.cancel()
        filling.cancel()


def _append(path: Path, block: bytes) -> None:
    try:
        with open(path, "r+b") as file:  # never made again here: a newer offer may have removed it
            file.seek(0, os.SEEK_END)
            file.write(block)
    except FileNotFoundError:
        raise Refusal(404, "not-created", f"{path.name} is gone") from None
    except OSError as error:
        raise Refusal(507, "server-full", f"the server cannot store more ({error.strerror})") from error


def _sync(path: Path) -> None:
    with suppress(FileNotFoundError):
        sync(path)


def _listing(folder: Path) -> dict[str, int]:
    """Sizes of the files of a folder by name."""
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except FileNotFoundError:
        return {}
