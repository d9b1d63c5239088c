"""SHA-256 of files and checkpoint folders; needs no model framework."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deepfusion.errors import InputError


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path | str) -> str:
    """SHA-256 over the relative names and contents of all safetensors files below `folder`, 64 hex digits.

    Raises:
        InputError: there are none.
    """
    folder = Path(folder)
    files = sorted(folder.rglob("*.safetensors"), key=lambda path: path.relative_to(folder).as_posix())
    if not files:
        raise InputError("no safetensors files", where=folder, code="weights-missing")
    lines = [f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
