"""A checkpoint that nobody prepared becomes an upload like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfusion import __version__
from deepfusion.models.architecture import architecture, read_config
from deepfusion.models.checkpoints import copy_tokenizer
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.models.signature import type_signature
from deepfusion.records import Card
from deepfusion.sections import Encoder
from deepfusion.uploads.card import write_card


def adopt_checkpoint(folder: Path, out: Path, device: str, embedding: np.ndarray, encoder: Encoder) -> Card:
    """Make an upload out of any Hugging Face checkpoint of a causal language model, which nobody prepared for this.

    The weights are loaded and saved again, so that checkpoints of older layouts get today's tensor names; values and
    dtype stay. Where it started from is unknown: equal architecture and tokenizer are taken to be averageable.

    Args:
        folder: the checkpoint, safetensors only, with its tokenizer.
        out: the upload folder to write.
        embedding: float [size], of length 1.

    Raises:
        InputError: it cannot be loaded.
    """
    config = read_config(folder)
    load_tokenizer(folder)
    out.mkdir(parents=True, exist_ok=True)
    model: Any = load_model(folder)
    model.to(config.dtype or torch.float32).save_pretrained(out)
    copy_tokenizer(folder, out)
    return write_card(
        out,
        Card(
            device=device,
            type=config.model_type,
            model_class=architecture(config).name,
            signature=type_signature(out),
            base="",
            base_digest="",
            method="full",
            embedding=embedding.tolist(),
            encoder=encoder,
            tokens=0,
            documents=0,
            loss_before=None,
            loss_after=None,
            steps=0,
            seed=0,
            deepfusion_version=__version__,
        ),
    )
