"""What a person sees while a run works: lines on stderr and in log.txt, numbers in metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

_folder: Path | None = None
_said: set[str] = set()


def attach(folder: Path | None) -> None:
    """From now on also write to `folder`/log.txt and `folder`/metrics.jsonl (None: stderr only)."""
    global _folder  # noqa: PLW0603 - one process works on one run
    _folder = folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


def attached() -> Path | None:
    """The folder given to `attach`; worker processes attach to the same."""
    return _folder


def say(message: str) -> None:
    """One line for the person who waits."""
    print(message, file=sys.stderr, flush=True)
    if _folder is not None:
        _append(_folder / "log.txt", f"{time.strftime('%H:%M:%S')} {message}")


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
    return psutil.Process().memory_info().rss


def _append(path: Path, line: str) -> None:
    # O_APPEND: several worker processes write to the same file, and a short line is written whole. Names of files may
    # hold
    # bytes that are no text.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(line + "\n")
