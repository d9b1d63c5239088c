"""What the operator sees while devices come and go: a live table in a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deepfusion import progress
from deepfusion.federation.server.home import Home
from deepfusion.federation.server.ledger import Ledger, Row

OFFLINE_SECONDS = 90.0
_OVER = ("done", "late", "rejected", "failed")


class View:
    """A context manager that shows the ledger.

    Args:
        home: whose enrolled devices are shown before they were ever seen.
        pause: seconds between two looks.
    """

    def __init__(self, ledger: Ledger, home: Home, pause: float = 1.0) -> None:
        self.ledger, self.home, self.pause = ledger, home, pause
        self._console = Console(stderr=True)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if sys.stderr.isatty() else None
        )
        self._shown: dict[str, str] = {}
        self._before: dict[str, tuple[float, int]] = {}
        self._rates: dict[str, float] = {}

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show()

    def wait(self, until: Callable[[], bool | None]) -> None:
        """Show what happens until `until` holds."""
        if self._live is not None:
            with self._live:
                self._loop(until)
        else:
            self._loop(until)
        self._show()

    def _loop(self, until: Callable[[], bool | None]) -> None:
        while not until():
            self._show()
            time.sleep(self.pause)

    def _show(self) -> None:
        rows = self.ledger.devices()
        for row in rows.values():
            self._measure(row)
            state = row.state if row.state in _OVER or row.state == "uploading" else self._state(row)
            if self._shown.get(row.device) != state:
                self._shown[row.device] = state
                detail = f": {row.detail}" if row.detail else ""
                size = f" {_bytes(row.size)}" if row.size and state in ("uploading", "done", "late") else ""
                progress.say(f"[{row.device}] {state}{size}{detail}")
        if self._live is not None and self._live.is_started:
            self._live.update(self._table(rows), refresh=True)

    def _measure(self, row: Row) -> None:
        now = time.monotonic()
        since, received = self._before.get(row.device, (now, row.received))
        if row.device not in self._before or now - since >= 3:
            self._before[row.device] = (now, row.received)
            self._rates[row.device] = (row.received - received) / (now - since) if now > since else 0.0

    def _state(self, row: Row) -> str:
        offline = row.seen is not None and time.time() - row.seen > OFFLINE_SECONDS
        return (
            f"{row.state}, not seen for {progress.duration(60 * ((time.time() - (row.seen or 0)) // 60))}"
            if offline
            else row.state
        )

    def _table(self, rows: dict[str, Row]) -> Table:
        table = Table("device", "state", "upload", "rate", "eta", "")
        for name in sorted(
            {*rows, *(name for name, device in self.home.devices.items() if not device.revoked)}
        ):
            row = rows.get(name)
            if row is None:
                table.add_row(escape(name), "enrolled", "", "", "", "")
                continue
            rate, left = self._rates.get(name, 0.0), row.size - row.received
            moving = row.state == "uploading" and rate > 0
            table.add_row(
                escape(name), self._state(row), f"{_bytes(row.received)} of {_bytes(row.size)}" if row.size else "",
                f"{_bytes(rate)}/s" if moving else "", progress.duration(left / rate) if moving else "",
                escape(row.detail[:80]),
            )  # fmt: skip
        return table


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
