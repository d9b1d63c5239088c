"""Checkpoints that are made here once and kept in the user's cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def place(name: str) -> Path:
    """Where a checkpoint of this name is kept, whether it is there or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepfusion" / name


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder of a checkpoint that `make(folder)` writes unless it is there; several processes may ask at once."""
    folder = place(name)
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as own:
            made = Path(own) / name
            make(made)
            with suppress(OSError):  # another process was faster, with the same bytes
                os.rename(made, folder)
    return folder
