"""What a person sees while a run works: records of the logger `deepfusion`, lines of log.txt, rows of metrics.jsonl.

The command line prints the records on stderr (`to_terminal`). Whoever imports the library decides with `logging`: the
lines are of level INFO, so nothing is printed until that level is asked for; warnings are printed unless they are
silenced. Records of worker processes arrive in the process that started them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any

LOGGER = logging.getLogger("deepfusion")

MOST_BYTES = 3500
"""Of a line of a worker: with its header it is within what Linux writes to a pipe as a whole, 4096 bytes."""

_folder: Path | None = None
_said: set[str] = set()


def attach(folder: Path | None) -> None:
    """From now on also write to `folder`/log.txt and `folder`/metrics.jsonl (None: to no folder)."""
    global _folder  # noqa: PLW0603 - one process works on one run
    _folder = folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


def attached() -> Path | None:
    """The folder given to `attach`; worker processes attach to the same."""
    return _folder


def to_terminal() -> None:
    """From now on print the lines of this process and its workers on stderr, as they are, and nowhere else."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Terminal())


@contextmanager
def unheard() -> Iterator[None]:
    """Within, lines go to log.txt alone."""
    before, LOGGER.disabled = LOGGER.disabled, True
    try:
        yield
    finally:
        LOGGER.disabled = before


def say(message: str, level: int = logging.INFO) -> None:
    """One line for the person who waits."""
    # Names of files may hold bytes that are no text, which handlers that write to a file cannot encode.
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    LOGGER.log(level, message)
    if _folder is not None:
        _append(_folder / "log.txt", f"{time.strftime('%H:%M:%S')} {message}")


def warn(message: str) -> None:
    """One line about what should be changed."""
    say(message, logging.WARNING)


def say_once(message: str) -> None:
    """A line that this process says once, however often it comes about."""
    if message not in _said:
        _said.add(message)
        say(message)


def record(stage: str, unit: str, step: int, total_steps: int, values: dict[str, float]) -> None:
    """One row of metrics.jsonl."""
    if _folder is not None:
        row: dict[str, Any] = {
            "time": time.time(),
            "stage": stage,
            "unit": unit,
            "step": step,
            "total_steps": total_steps,
        }
        _append(_folder / "metrics.jsonl", json.dumps(row | values))


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    import psutil  # the command line says its help without it

    return psutil.Process().memory_info().rss


class _Terminal(logging.Handler):
    """Prints on the stderr of the moment; unlike those of `logging` it lets errors pass, for a closed pipe ends a
    command.
    """

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


class Relay:
    """Brings the lines of worker processes to the logger of this one.

    The pipe has no lock that a killed worker could keep: so few bytes are written whole, or not at all.
    """

    def __init__(self, ends: tuple[Connection, Connection]) -> None:
        self._reader, self._writer = ends
        self._emptied = Event()
        self._thread = Thread(target=self._forward, daemon=True)
        self._thread.start()

    @property
    def arguments(self) -> tuple[Connection, int]:
        """What `relay_to` takes in a worker."""
        return self._writer, LOGGER.getEffectiveLevel()

    def empty(self) -> None:
        """Returns when all that was said so far has been passed on."""
        self._emptied.clear()
        self._writer.send(None)
        self._emptied.wait(10)

    def close(self) -> None:
        """Ends the thread; whatever workers say afterwards is not passed on."""
        self._writer.send(False)
        self._thread.join(10)
        self._reader.close()
        self._writer.close()

    def _forward(self) -> None:
        while (said := self._reader.recv()) is not False:
            if said is None:
                self._emptied.set()
                continue
            with suppress(
                Exception
            ):  # such as a closed stderr: it shows itself when this process says something
                LOGGER.log(*said)


def relay_to(writer: Connection, level: int) -> None:
    """In a worker: send every line of this level and above to the process that started it."""
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    LOGGER.handlers = [_Relayed(writer)]


class _Relayed(logging.Handler):
    def __init__(self, writer: Connection) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().encode("utf-8")[:MOST_BYTES].decode("utf-8", "ignore")
        self._writer.send((record.levelno, message))


def _append(path: Path, line: str) -> None:
    # O_APPEND: several worker processes write to the same file, and a short line is written whole.
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
