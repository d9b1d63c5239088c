"""A larger tiny checkpoint made of a smaller one: more blocks, the same function, more room to learn.

The package ships no larger GPT-2 for lack of space, and needs none: after each block a copy is inserted whose output
projections are zero (block expansion, Wu et al., LLaMA Pro, ACL 2024). It starts as the smaller model and trains
as a deeper one.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from deepfusion.digests import checkpoint_digest
from deepfusion.folders import whole_folder
from deepfusion.models import cache
from deepfusion.models.checkpoints import copy_tokenizer

_BLOCK = re.compile(r"(.*\.h\.)(\d+)(\..*)")
_OUTPUT = re.compile(r".*\.c_proj\.(weight|bias)")


def deepen(source: Path, target: Path) -> Path:
    """Write a GPT-2 checkpoint with twice the blocks of `source` and the same function to `target`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            tensors[name] = tensor
            continue
        number = int(block[2])
        tensors[f"{block[1]}{2 * number}{block[3]}"] = tensor
        tensors[f"{block[1]}{2 * number + 1}{block[3]}"] = (
            torch.zeros_like(tensor) if _OUTPUT.fullmatch(name) else tensor.clone()
        )
    config = AutoConfig.from_pretrained(source)
    config.n_layer *= 2
    with whole_folder(target) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(part)
        GenerationConfig.from_pretrained(source).save_pretrained(part)
        copy_tokenizer(source, part)
    return target


def cached(source: Path, name: str) -> Path:
    """The deepened checkpoint of this very source in the user's cache, made once."""
    return cache.made_once(f"{name}-{checkpoint_digest(source)[:16]}", partial(deepen, source))
