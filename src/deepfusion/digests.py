"""SHA-256 of files and checkpoint folders, and the memory of those that were read; needs no model framework."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from deepfusion.errors import InputError
from deepfusion.folders import write_whole

MEMORY = ".digests.json"
"""File in a run folder with what `Digests` remembers."""


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """SHA-256 of files, each read once: what was read is known again by its path, size, inode, and when content and
    inode were changed.

    Args:
        memory: file that keeps it for the next process; a damaged one is forgotten.
    """

    def __init__(self, memory: Path) -> None:
        self._memory, self._home = memory, memory.parent
        self._known = _read_memory(memory)
        self._new = False

    def sha256(self, path: Path | str) -> str:
        """Of a file, 64 hex digits."""
        name, stat = self._name(Path(path)), Path(path).stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(name)
        if known is None or known[:-1] != mark:
            known = self._known[name] = [*mark, sha256_file(path)]
            self._new = True
        return str(known[-1])

    def moved(self, old: Path, new: Path) -> None:
        """What is known of a file or folder is known of it under its new name too."""
        before, after = self._name(old), self._name(new)
        for name in [n for n in self._known if n == before or n.startswith(f"{before}/")]:
            self._known[after + name[len(before) :]] = self._known.pop(name)
            self._new = True

    def save(self) -> None:
        """Keep it for the next process."""
        if self._new:
            write_whole(self._memory, json.dumps(self._known))
            self._new = False

    def _name(self, path: Path) -> str:
        """What lies in the folder of the memory is named from there, so that the folder may move."""
        path = path.absolute()
        return (path.relative_to(self._home) if path.is_relative_to(self._home) else path).as_posix()


def _read_memory(path: Path) -> dict[str, list[int | str]]:
    try:
        found = json.loads(path.read_text("utf-8"))
        return {
            name: [*(int(number) for number in mark), str(digest)] for name, (*mark, digest) in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def tree_digest(path: Path, sha256: Callable[[Path], str] = sha256_file) -> str:
    """SHA-256 of a file, or over the names and contents of all files below a folder; 64 hex digits.

    Model cards only tell about what is beside them, and are not part of it.

    Args:
        sha256: of a file; `Digests.sha256` reads each once.
    """
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_model_card(p))
    lines = "".join(f"{p.relative_to(path)} {sha256(p)}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _is_model_card(path: Path) -> bool:
    return path.name == "README.md" and (path.parent / "config.json").is_file()


def checkpoint_digest(folder: Path | str, sha256: Callable[[Path], str] = sha256_file) -> str:
    """SHA-256 over the names and contents of the files of a checkpoint: weights, config, tokenizer; 64 hex digits.

    Its model card only tells about them, and folders in it (an output, perhaps) are not part of it.

    Args:
        sha256: of a file; `Digests.sha256` reads each once.
    """
    files = sorted(
        path
        for path in Path(folder).iterdir()
        if path.is_file() and path.name != "README.md" and path.name[0] != "."
    )
    return hashlib.sha256("".join(f"{path.name}\0{sha256(path)}\n" for path in files).encode()).hexdigest()


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


def hub_revision(name: str, kind: Literal["model", "dataset"]) -> str:
    """`OWNER/NAME@COMMIT` of what the cache of the hub holds as its newest; empty where it holds nothing of it."""
    from huggingface_hub import constants  # seconds of import time for some who only hash files
    from huggingface_hub.file_download import repo_folder_name

    newest = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "refs", "main")
    try:
        return f"{name}@{newest.read_text('utf-8').strip()}"
    except OSError:
        return ""
