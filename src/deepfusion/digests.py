"""SHA-256 of files and checkpoint folders; needs no model framework."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from deepfusion.errors import InputError


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_digest(folder: Path | str) -> str:
    """SHA-256 over the names and contents of the files of a checkpoint: weights, config, tokenizer; 64 hex digits.

    Its model card only tells about them, and folders in it (an output, perhaps) are not part of it.
    """
    files = sorted(
        path
        for path in Path(folder).iterdir()
        if path.is_file() and path.name != "README.md" and path.name[0] != "."
    )
    found = [(path, path.stat()) for path in files]
    return _digest_of(tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found))


@lru_cache  # a run asks for each of its stages
def _digest_of(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    return hashlib.sha256(
        "".join(f"{path.name}\0{sha256_file(path)}\n" for path, *_ in files).encode()
    ).hexdigest()


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
