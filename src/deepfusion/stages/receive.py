"""In place of training devices: take a folder of uploads, or of plain Hugging Face checkpoints that nobody prepared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deepfusion import progress
from deepfusion.artefacts import write_transport
from deepfusion.config import Config
from deepfusion.corpus import sample_texts
from deepfusion.embedding import embed
from deepfusion.errors import InputError
from deepfusion.folders import copy_folder
from deepfusion.jobs import run_jobs
from deepfusion.upload import adopt_checkpoint

SAMPLES = 64  # texts a plain checkpoint samples so that its knowledge can be embedded


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Copy the uploads in `given`, and in `late` if there is such a folder, to `out`/uploads.

    Plain checkpoints get a card and an embedding of what they sample.

    Uploads are only copied here; the registry decides which of them are sound. `out`/transport.json counts their bytes.
    """
    folders = _folders(inputs["given"])
    if "late" in inputs and inputs["late"].is_dir():
        folders += _folders(inputs["late"])
    target = out / "uploads"
    target.mkdir(parents=True, exist_ok=True)
    plain = []
    for folder in folders:
        if (folder / "card.json").exists():
            copy_folder(folder, target / folder.name)
        else:
            plain.append({"folder": folder, "out": target / _device_name(folder), "config": config})
    run_jobs(_adopt, plain, config.jobs)
    write_transport(target, out / "transport.json")
    return {"uploads": len(folders), "plain_checkpoints": len(plain)}


def upload_folders(given: Path) -> list[Path]:
    """The uploads or checkpoints below a folder, by name; of a run folder those that came in time and those that came late.

    Raises:
        InputError: no such folder, or nothing in it.
    """
    if (given / "manifest.json").is_file():
        late = given / "late"
        return _folders(given / "uploads") + (_folders(late) if late.is_dir() else [])
    return _folders(given)


def _folders(given: Path) -> list[Path]:
    if not given.is_dir():
        raise InputError("there is no such folder", where=given, allowed="a folder of uploads or of checkpoints", code="no-uploads")
    folders = sorted(p for p in given.iterdir() if p.is_dir() and ((p / "config.json").exists() or (p / "card.json").exists()))
    if not folders:
        raise InputError(
            "no upload and no checkpoint in this folder",
            where=given,
            allowed="subfolders with a card.json or a config.json",
            code="no-uploads",
        )
    return folders


def _device_name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", folder.name).lstrip(".")[:63]


def _adopt(folder: Path, out: Path, config: Config) -> None:
    if (out / "card.json").is_file():
        return
    progress.say(f"[device {out.name}] a plain checkpoint: embedding what it samples")
    texts = sample_texts(folder, SAMPLES, 512, config.seed, config.precision)
    if not texts:
        raise InputError("the checkpoint samples no text", where=folder, code="silent-checkpoint")
    embedding = embed(texts, config.device.encoder, config.device.embedding_size)
    adopt_checkpoint(folder, out, out.name, embedding, config.device.encoder)
