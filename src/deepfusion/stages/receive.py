"""In place of training devices: take a folder of uploads, or of plain checkpoints and adapters that nobody prepared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.folders import copy_folder
from deepfusion.jobs import run_jobs
from deepfusion.learning.corpus import sample_texts
from deepfusion.models.adapters import merged_model
from deepfusion.models.architecture import stored_dtype
from deepfusion.models.checkpoints import copy_tokenizer, tokenizer_files
from deepfusion.records import Problem
from deepfusion.report.artefacts import write_transport
from deepfusion.schema import Config
from deepfusion.text.embedding import embed
from deepfusion.uploads.adopt import adopt_checkpoint
from deepfusion.uploads.check import write_refusal
from deepfusion.uploads.intake import Given, survey

SAMPLES = 64  # texts a plain checkpoint samples so that its knowledge can be embedded


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Copy the uploads in `given`, and in `late` if there is such a folder, to `out`/uploads.

    Plain checkpoints get a card and an embedding of what they sample, adapters are merged into their bases before.
    What cannot be read leaves its reason there. The registry decides what is sound. `out`/transport.json counts
    bytes.
    """
    found = survey(inputs["given"], inputs.get("late"))
    if found.left_out:
        progress.say(f"left out: {', '.join(found.left_out)}")
    target = out / "uploads"
    target.mkdir(parents=True, exist_ok=True)
    plain = []
    for model in found.models:
        if model.kind == "upload":
            copy_folder(model.folder, target / model.id)
        else:
            plain.append(
                {
                    "model": model,
                    "out": target / model.id,
                    "work": out / "merged" / model.id,
                    "config": config,
                }
            )
    run_jobs(_adopt, plain, config.jobs)
    write_transport(target, out / "transport.json")
    return {"uploads": len(found.models), "plain_checkpoints": len(plain), "left_out": len(found.left_out)}


def _adopt(model: Given, out: Path, work: Path, config: Config) -> None:
    """Make an upload of a plain checkpoint, or write down why that cannot be."""
    if (out / "card.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    folder = model.folder
    what = "a plain checkpoint" if model.base is None else f"an adapter, merged into {model.base.name}"
    named = "" if folder.name == model.id else f" ({folder})"
    progress.say(f"[device {model.id}] {what}{named}: embedding what it samples")
    try:
        if model.base is not None:
            _merge(folder, model.base, work)
            folder = work
        texts = sample_texts(folder, SAMPLES, 512, config.seed, config.precision, f"device {model.id}")
        if not texts:
            raise InputError("the checkpoint samples no text", where=model.folder, code="silent-checkpoint")
    except InputError as error:
        write_refusal(out, Problem(error.code, _without_place(error), model.folder.name))
        return
    except Exception as error:  # No checkpoint may stop the others, whatever it makes a library do.
        write_refusal(
            out, Problem("unreadable", f"{type(error).__name__}: {str(error)[:200]}", model.folder.name)
        )
        return
    embedding = embed(texts, config.device.encoder, config.device.embedding_size)
    adopt_checkpoint(folder, out, model.id, embedding, config.device.encoder)
    shutil.rmtree(work, ignore_errors=True)


def _without_place(error: InputError) -> str:
    return error.what if error.fix is None else f"{error.what}; fix: {error.fix}"


def _merge(adapter: Path, base: Path, out: Path) -> None:
    """Write the whole model that an adapter stands for, in the dtype of its base, with the tokenizer that came with
    it.
    """
    merged: Any = merged_model(adapter, base)
    merged.to(stored_dtype(base) or torch.float32).save_pretrained(out)
    copy_tokenizer(
        adapter if (adapter / "tokenizer.json").is_file() or not tokenizer_files(base) else base, out
    )
