"""What lies in a folder that somebody wants fused: uploads, plain checkpoints, adapters, and what is none of these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepfusion.errors import InputError
from deepfusion.folders import local_path
from deepfusion.models.adapters import check_mergeable
from deepfusion.models.checkpoints import ADAPTER_CONFIG
from deepfusion.models.presets import resolve
from deepfusion.names import device_ids
from deepfusion.uploads.card import CARD, is_note

_MODEL = (CARD, "config.json", ADAPTER_CONFIG)
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Given:
    """A model that was given.

    Attributes:
        id: the device that it counts as.
        folder: where its files lie.
        kind: an upload with its card, a plain checkpoint, or an adapter without a card.
        base: of an adapter, the folder of the checkpoint that it changes.
    """

    id: str
    folder: Path
    kind: Literal["upload", "checkpoint", "adapter"]
    base: Path | None = None


@dataclass(frozen=True)
class Survey:
    """What was found: the models, in the order of their ids, and the names of all else with the reason."""

    models: list[Given]
    left_out: list[str]


def survey(given: Path, late: Path | None = None) -> Survey:
    """Looks through a folder of models, and a second one if it is there.

    A folder that holds one model in a folder of its own, as in the cache of the hub or after a training, stands
    for that model.

    Raises:
        InputError: no such folder; nothing in it; it is itself a model; a folder holds several models, so that
            nobody can tell which is meant; an adapter that cannot be merged, or whose base is not at hand.
    """
    roots = [given, *([late] if late is not None and late.is_dir() else [])]
    found: list[tuple[str, Path, Path]] = []
    left_out = []
    for root in roots:
        for entry in _entries(root):
            if is_note(entry):
                continue
            if not entry.is_dir():
                left_out.append(f"{entry.name} (not a folder)")
            elif folders := _models_in(entry):
                found.append((entry.name, _only(entry, folders), root))
            else:
                left_out.append(f"{entry.name} (no config.json)")
    if not found:
        raise InputError(
            "no upload and no checkpoint in this folder", where=given, code="no-uploads",
            allowed="subfolders with a card.json, a config.json or an adapter_config.json",
        )  # fmt: skip
    names = device_ids([name for name, _, _ in found])
    folders_by_name = {name: folder for name, folder, _ in found}
    taken = [
        _given(id, folder, root, folders_by_name) for id, (_, folder, root) in zip(names, found, strict=True)
    ]
    return Survey(sorted(taken, key=lambda model: model.id), left_out)


def given_folders(run_or_folder: Path) -> tuple[Path, Path | None]:
    """Where the models lie: the folder itself, or in a run folder its uploads and those that came late."""
    if (run_or_folder / "manifest.json").is_file():
        return run_or_folder / "uploads", run_or_folder / "late"
    return run_or_folder, None


def _entries(root: Path) -> list[Path]:
    if not root.is_dir():
        raise InputError(
            "there is no such folder",
            where=root,
            allowed="a folder of uploads or of checkpoints",
            code="no-uploads",
        )
    entries = sorted(root.iterdir())
    inside = any(_models_in(entry) for entry in entries if entry.is_dir())
    weights = any(True for pattern in _WEIGHTS for _ in root.glob(pattern))
    cached = (root / "snapshots").is_dir() and (root / "blobs").is_dir()
    if cached or (_is_model(root) and (weights or not inside)):
        fix = f"give the folder that holds it: {root.resolve().parent}"
        raise InputError(
            "this folder is itself one model, not a folder of models", where=root, fix=fix, code="no-uploads"
        )
    return entries


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL)


def _models_in(folder: Path) -> list[Path]:
    """The folder if it is a model, else the models right below it, or below its `snapshots` (the cache of the hub)."""
    if _is_model(folder):
        return [folder]
    below = folder / "snapshots" if (folder / "snapshots").is_dir() else folder
    main = folder / "refs" / "main"
    if main.is_file() and _is_model(current := below / main.read_text("utf-8", "replace").strip()):
        return [current]
    return sorted(path for path in below.iterdir() if path.is_dir() and _is_model(path))


def _only(entry: Path, folders: list[Path]) -> Path:
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        what = f"it holds {len(folders)} models ({names[:200]}): which one is meant?"
        fix = f"put the one that counts beside the others, or give {entry}"
        raise InputError(what, where=entry, fix=fix, code="several-models")
    return folders[0]


def _given(id: str, folder: Path, root: Path, beside: dict[str, Path]) -> Given:
    if (folder / CARD).is_file():
        return Given(id, folder, "upload")
    if not (folder / ADAPTER_CONFIG).is_file() or any(folder.glob("model*.safetensors")):
        return Given(id, folder, "checkpoint")
    path = folder / ADAPTER_CONFIG
    try:
        settings: Any = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError("not a JSON object", where=path, code="bad-json")
    check_mergeable(folder, settings)
    return Given(id, folder, "adapter", _base(folder, settings, root, beside))


def _base(folder: Path, settings: dict[str, Any], root: Path, beside: dict[str, Path]) -> Path:
    """The checkpoint that an adapter names, wherever it is at hand."""
    name = str(settings.get("base_model_name_or_path") or "")
    for path in _places(name, folder, root, beside):
        if (path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file():
            return path.resolve()
    fix = (
        f"put the base beside it, as {Path(name).name or 'BASE'}, or its path into "
        f"base_model_name_or_path of {ADAPTER_CONFIG}"
    )
    revision = settings.get("revision") or "main"
    reason = "no such folder and no model in the cache of the hub"
    if name and revision == "main":
        try:
            return Path(resolve(name)).resolve()
        except InputError as error:
            reason = error.what
    elif name:
        reason = f"revision {revision} of it, which only a folder can give"
    what = f"the adapter needs its base {name or '(it names none)'}, which is not at hand ({reason})"
    raise InputError(what, where=folder, fix=fix, code="adapter-base-missing")


def _places(name: str, folder: Path, root: Path, beside: dict[str, Path]) -> Iterator[Path]:
    if name:
        yield from (folder / local_path(name), root / name)  # an absolute path stays itself
        yield from (
            beside[key]
            for key in (name, Path(name).name, f"models--{name.replace('/', '--')}")
            if key in beside
        )
