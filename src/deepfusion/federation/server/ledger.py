"""The ledger of a federated run: who has come how far, which tickets are out, how many bytes have moved.

An SQLite file in the run folder, written by the gateway and the ServerApp and read by the operator's display. It holds
no secret: of a ticket only the hash.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepfusion.federation.offer import Offer, parse_offer
from deepfusion.folders import locked

State = Literal[
    "enrolled", "connected", "training", "uploading", "verifying", "done", "late", "rejected", "failed"
]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    device TEXT PRIMARY KEY, state TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '', changed REAL NOT NULL, seen REAL,
    offer TEXT, receipt TEXT, received INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL DEFAULT 0,
    up INTEGER NOT NULL DEFAULT 0, down INTEGER NOT NULL DEFAULT 0,
    control_up INTEGER NOT NULL DEFAULT 0, control_down INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS tickets (
    hash TEXT PRIMARY KEY, device TEXT NOT NULL, digest TEXT NOT NULL, issued REAL NOT NULL,
    spent INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Row:
    """One device.

    Attributes:
        state: how far it is; `detail` says why where that is not plain.
        seen: when a signed request of it last arrived, seconds since the epoch.
        offer: what it hands in.
        receipt: what it was told at the end.
        received, size: bytes of its upload that are here, and of all of it.
        up, down: bytes of upload requests at the wire, both ways, with what was sent again.
        control_up, control_down: the same of Flower messages.
    """

    device: str
    state: State
    detail: str
    changed: float
    seen: float | None
    offer: Offer | None
    receipt: dict[str, Any] | None
    received: int
    size: int
    up: int
    down: int
    control_up: int
    control_down: int


@dataclass(frozen=True)
class Ticket:
    """Leave to upload one offer of one device, once."""

    device: str
    digest: str
    spent: bool


class Ledger:
    """The ledger in `RUN`/federation/ledger.sqlite; safe for several processes."""

    def __init__(self, run: Path) -> None:
        folder = run / "federation"
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.audit_path = folder / "ledger.sqlite", folder / "audit.jsonl"
        with self._open() as db:
            for table in _SCHEMA.split(";"):
                db.execute(table)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # A connection for each access: they are rare, and none is shared between threads or outlives a crash.
        # SQLite's own waiting asks ever more seldom, and starves beside a busy process.
        with locked(self.path.with_suffix(".lock"), poll_seconds=0.001):
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            db.row_factory = sqlite3.Row
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            finally:
                db.close()  # rolls back what was not committed

    def devices(self) -> dict[str, Row]:
        """All devices that were ever heard of in this run, by name."""
        with self._open() as db:
            return {row["device"]: _row(row) for row in db.execute("SELECT * FROM devices ORDER BY device")}

    def device(self, device: str) -> Row | None:
        """One device, or None."""
        with self._open() as db:
            row = db.execute("SELECT * FROM devices WHERE device=?", (device,)).fetchone()
        return _row(row) if row else None

    def set_state(self, device: str, state: State, detail: str = "") -> None:
        """Note how far a device is. What is done or late stays so."""
        with self._open() as db:
            _touch(db, device)
            db.execute(
                "UPDATE devices SET state=?, detail=?, changed=? WHERE device=? AND state NOT IN ('done', 'late')"
                " AND (state != ? OR detail != ?)",
                (state, detail, time.time(), device, state, detail),
            )

    def count(
        self, device: str, *, up: int = 0, down: int = 0, control_up: int = 0, control_down: int = 0
    ) -> None:
        """Add bytes that crossed the wire, and that the device is alive."""
        with self._open() as db:
            _touch(db, device)
            db.execute(
                "UPDATE devices SET up=up+?, down=down+?, control_up=control_up+?, control_down=control_down+?, seen=?"
                " WHERE device=?",
                (up, down, control_up, control_down, time.time(), device),
            )

    def set_received(self, device: str, received: int) -> None:
        """Note how many bytes of the upload are here; nothing changes once it has a receipt."""
        with self._open() as db:
            db.execute("UPDATE devices SET received=? WHERE device=? AND receipt IS NULL", (received, device))

    def issue(self, offer: Offer) -> str:
        """A new ticket for an offer; earlier tickets of the device become worthless.

        Returns:
            The ticket, which is kept nowhere.
        """
        ticket, device = secrets.token_urlsafe(32), offer.card.device
        with self._open() as db:
            _touch(db, device)
            db.execute("UPDATE tickets SET spent=1 WHERE device=?", (device,))
            db.execute(
                "INSERT INTO tickets VALUES (?, ?, ?, ?, 0)",
                (_hash(ticket), device, offer.digest, time.time()),
            )
            db.execute(
                "UPDATE devices SET offer=?, size=? WHERE device=?",
                (offer.model_dump_json(), offer.size, device),
            )
        return ticket

    def ticket(self, ticket: str) -> Ticket | None:
        """What a ticket is good for, or None if it was never issued."""
        with self._open() as db:
            row = db.execute("SELECT * FROM tickets WHERE hash=?", (_hash(ticket),)).fetchone()
        return Ticket(row["device"], row["digest"], bool(row["spent"])) if row else None

    def finish(self, device: str, receipt: dict[str, Any]) -> dict[str, Any]:
        """An upload is here and verified: spend the ticket and give the receipt. A second call gives the first
        receipt again.

        Returns:
            The receipt, with `state`: done, or late if the run has already begun without it.
        """
        with self._open() as db:
            row = db.execute("SELECT state, receipt FROM devices WHERE device=?", (device,)).fetchone()
            if row["receipt"]:
                return dict(json.loads(row["receipt"]))
            closed = db.execute("SELECT 1 FROM facts WHERE name='closed'").fetchone()
            receipt = {**receipt, "state": "late" if closed else "done"}
            db.execute("UPDATE tickets SET spent=1 WHERE device=?", (device,))
            db.execute(
                "UPDATE devices SET state=?, detail='', receipt=?, received=size, changed=? WHERE device=?",
                (receipt["state"], json.dumps(receipt), time.time(), device),
            )
        return receipt

    def close(self) -> None:
        """From now on uploads are late."""
        self.remember("closed", str(time.time()))

    @property
    def closed(self) -> bool:
        """Whether the run has begun to work on what is in."""
        return self.recall("closed") is not None

    def remember(self, name: str, value: str) -> None:
        """Keep a fact about the run; the first value stays."""
        with self._open() as db:
            db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, value))

    def recall(self, name: str) -> str | None:
        """A fact about the run."""
        with self._open() as db:
            row = db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchone()
        return row["value"] if row else None

    def forget(self, name: str) -> None:
        """Drop a fact about the run."""
        with self._open() as db:
            db.execute("DELETE FROM facts WHERE name=?", (name,))

    def audit(
        self, event: str, *, device: str | None = None, peer: str | None = None, **facts: object
    ) -> None:
        """Add a line to `RUN`/federation/audit.jsonl: who was let in, what was taken, who was refused and why."""
        line = json.dumps(
            {"time": round(time.time(), 3), "event": event, "device": device, "peer": peer, **facts}
        )
        with open(self.audit_path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _touch(db: sqlite3.Connection, device: str) -> None:
    db.execute(
        "INSERT OR IGNORE INTO devices (device, state, changed) VALUES (?, 'enrolled', ?)",
        (device, time.time()),
    )


def _hash(ticket: str) -> str:
    return hashlib.sha256(ticket.encode()).hexdigest()


def _row(row: sqlite3.Row) -> Row:
    values = dict(row)
    values["offer"] = parse_offer(values["offer"]) if values["offer"] else None
    values["receipt"] = json.loads(values["receipt"]) if values["receipt"] else None
    return Row(**values)
